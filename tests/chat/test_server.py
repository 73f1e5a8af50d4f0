"""What the chat's process keeps in memory: one base with adapters, or a GGUF file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf

from jetson_ft.chat import server, target
from jetson_ft.chat.gguf_session import GgufSession
from jetson_ft.chat.training_rows import training_pairs
from jetson_ft.data.sources import BUNDLED
from jetson_ft.errors import UserError

pytestmark = pytest.mark.slow(minutes=1)
SAMPLING = {"max_new_tokens": 8}


class Server(server.ChatServer):
    """The chat's server in this process; `sent` has the messages of the last call."""

    sent: list[dict[str, Any]]

    def ask(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return a reply's `end` with its text."""
        self.load(name)
        self.sent.clear()
        fields = {"text": "1加2等于几？", "turns": [], "sampling": SAMPLING, "system": "",
                  "examples": [], "use_adapter": True, "prefill": ""}  # fmt: skip
        self._generate(**fields | changes)
        *deltas, end = self.sent
        return {**end, "text": "".join(delta["text"] for delta in deltas)}


@pytest.fixture
def chat(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Return a server of four runs of one base, whose adapters differ."""
    for number in range(4):
        run = tmp_path / f"run-{number}"
        shutil.copytree(finished.path, run)
        weights = run / "adapter/adapter_model.safetensors"
        scale = (1, -3, 5, -7)[number]
        save_file({name: scale * one for name, one in load_file(weights).items()}, weights)
    opened = Server(tmp_path)
    opened.sent = []
    monkeypatch.setattr(server, "send", lambda kind, **rest: opened.sent.append(rest))
    yield opened
    opened._unload()


def test_adapters_of_one_base_share_it(chat: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load_model = target.loading.load_model
    monkeypatch.setattr(
        target.loading, "load_model", lambda *args: loads.append(args) or load_model(*args)
    )
    base = chat.ask("run-0", use_adapter=False)["text"]
    alone = [chat.ask(f"run-{number}")["text"] for number in range(4)]
    assert len({base, *alone}) > 2, "the adapters differ"
    for number in (0, 1, 3, 2, 0):
        assert chat.ask(f"run-{number}")["text"] == alone[number]
        assert chat.ask(f"run-{number}", use_adapter=False)["text"] == base
    assert len(loads) == 1
    adapters = chat.chat.model.peft_config  # type: ignore[union-attr]
    assert len(chat._chats) == len(adapters) == 3, "of other runs nothing is kept"


def test_the_base_alone_stays_the_base_beside_an_adapter(chat: Server, finished: Any) -> None:
    model = finished.recipe().model
    base = target.with_weight_times(target.resolve_target(model, chat.root))
    run = target.resolve_target("run-0", chat.root)
    precision = {"precision": run.recipe.precision}
    assert not target.shares_base(base, run), "it would be in another precision"
    same = replace(base, recipe=base.recipe.model_copy(update=precision))
    session = chat._open(same)
    chat._chats.append((same, session))
    before = "".join(session.reply("1加2等于几？", server.Sampling(8)))
    adapted = chat.ask("run-1")["text"]
    assert len(chat._chats) == 2
    assert "".join(session.reply("1加2等于几？", server.Sampling(8))) == before != adapted


def test_a_reply_reports_whether_it_is_cut_off_and_goes_on(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chat.ask("run-0")
    assert whole["tokens"] == 8 and not whole["ended"] and not whole["stopped"]
    assert chat.ask("run-0", prefill="等于")["text"] not in ("", whole["text"])
    chat._stop.set()
    monkeypatch.setattr(chat._stop, "clear", lambda: None)
    stopped = chat.ask("run-0")
    assert stopped["stopped"] and not stopped["ended"] and stopped["tokens"] < 8


def test_a_gguf_file_is_answered_by_llama_cpp(chat: Server, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = write_gguf(tmp_path / "tiny.gguf", context=512)
    whole = chat.ask(str(file))
    assert isinstance(chat.chat, GgufSession) and whole["tokens"] <= 8
    process = chat.chat.server
    assert chat.ask(str(file))["text"] == whole["text"] and chat.chat.server is process
    first = chat.ask(str(file), sampling={"max_new_tokens": 3})
    assert not first["ended"] and whole["text"].startswith(first["text"])
    rest = chat.ask(str(file), sampling={"max_new_tokens": 5}, prefill=first["text"])
    assert first["text"] + rest["text"] == whole["text"]
    chat._stop.set()
    stream = chat.chat.reply("a", server.Sampling(400), should_stop=lambda: True)
    assert len(list(stream)) == 1
    with pytest.raises(UserError, match="reads"):
        list(chat.chat.reply("long " * 4000, server.Sampling(8)))
    chat.ask("run-0")
    assert not process.is_alive, "its memory is free for the next model"


def test_a_llama_cpp_that_has_ended_is_replaced(chat: Server, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = write_gguf(tmp_path / "tiny.gguf", context=512)
    text = chat.ask(str(file))["text"]
    process = chat.chat.server._process  # type: ignore[union-attr]
    process.kill()  # type: ignore[union-attr]
    process.wait()  # type: ignore[union-attr]
    assert chat.ask(str(file))["text"] == text


def test_a_file_for_llama_cpp_shares_nothing_with_a_run_on_it(
    chat: Server, finished: Any, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    file = write_gguf(tmp_path / "tiny.gguf", context=512)
    recipe = finished.recipe().model_copy(update={"model": str(file), "precision": "fp32"})
    run = target.ChatTarget(recipe, finished.adapter)
    same = target.ChatTarget(recipe)
    assert target.shares_base(run, replace(run, adapter_dir=tmp_path))
    assert not target.shares_base(run, same) and not target.shares_base(same, run)


def test_weights_that_were_written_again_are_loaded_again(chat: Server, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = write_gguf(tmp_path / "tiny.gguf", context=512)
    chat.ask(str(file))
    process = chat.chat.server  # type: ignore[union-attr]
    write_gguf(file, seed=1, context=512)
    os.utime(file, ns=(1, 1))
    chat.ask(str(file))
    assert not process.is_alive, "the old weights are not used any more"


def test_an_adapter_that_cannot_be_loaded_leaves_no_changed_base(
    chat: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = chat.ask("run-0")["text"]
    weights = chat.root / "run-1/adapter/adapter_model.safetensors"
    save_file({name: one[:1] for name, one in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="doesn't fit"):
        chat.ask("run-1")
    assert not chat._chats, "PEFT has changed its layers already"
    assert chat.ask("run-0")["text"] == text


def test_examples_come_from_the_rows_of_the_run(finished: Any, tmp_path: Path) -> None:
    pairs = training_pairs(finished.name, finished.path.parent)
    rows = Path(finished.recipe().data.train).read_text(encoding="utf-8")
    assert len(pairs) == 3
    assert all(question in rows and answer in rows for question, answer in pairs)
    bundled = BUNDLED["bundled"].train.read_text(encoding="utf-8")
    assert all(question in bundled for question, _answer in training_pairs("base", tmp_path))
