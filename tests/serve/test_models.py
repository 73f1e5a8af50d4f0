"""What is served, from runs on disk: by llama.cpp where it can be, else by transformers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from gguf import GGUFReader, LlamaFileType
from run_folders import make_run
from served_api import ServedApi, serve_api
from tiny_exports import save_tiny_model
from tiny_gguf import write_gguf
from workbench import wait_for

from jetson_ft.chat import memory_guard, target
from jetson_ft.errors import UserError
from jetson_ft.export import gguf
from jetson_ft.files import cache_dir, sha256_file
from jetson_ft.hardware import detect
from jetson_ft.inference.generate import Sampling
from jetson_ft.models import files
from jetson_ft.runs.store import Run
from jetson_ft.serve import models
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.fields import CompletionFields
from jetson_ft.serve.models import EngineSettings, Serving
from jetson_ft.serve.transformers_process import TransformersServer, _overlap, _Replies, _whole

SETTINGS = EngineSettings(context=256, parallel=2)


def prepare(*names: str, root: Path) -> Serving:
    """Return what would be served."""
    return models.prepare(names, root, SETTINGS, lambda line: None)


@pytest.fixture(scope="module")
def by_transformers(finished: Run) -> Iterator[ServedApi]:
    """Serve a run whose tokenizer llama.cpp's converter doesn't know."""
    serving = prepare(finished.name, root=finished.path.parent)
    engine = Engine(serving.process, lambda: False, lambda: True, lambda: None)
    assert "transformers answers" in serving.notes[0]
    with serve_api(engine, serving.models, context=SETTINGS.context) as api:
        yield api


def test_what_gguf_cant_express_is_answered_by_transformers(
    by_transformers: ServedApi, finished: Run
) -> None:
    entries = {model.id: model.model_dump() for model in by_transformers.client.models.list()}
    assert list(entries) == [finished.name, "base"]
    assert entries["base"]["engine"] == "transformers"
    assert entries[finished.name]["aliases"] == ["uninterrupted"]
    session = target.open_session(target.resolve_target(finished.name, finished.path.parent))
    for name, use_adapter in ((finished.name, True), ("base", False)):
        expected = "".join(session.reply("一加一", Sampling(12), use_adapter))
        assert by_transformers.chat(name, "一加一", max_tokens=12) == expected
    chunks = by_transformers.client.chat.completions.create(
        model="uninterrupted", messages=[{"role": "user", "content": "一加一"}], max_tokens=12,
        temperature=0, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    parts = list(chunks)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == by_transformers.chat("uninterrupted", "一加一", max_tokens=12)
    assert parts[-1].usage and parts[-1].usage.prompt_tokens > 0


def test_transformers_stops_at_stop_texts_and_refuses_what_it_cant(
    by_transformers: ServedApi,
) -> None:
    text = by_transformers.complete("base", "abc", max_tokens=20)
    stop = text[4:6]
    assert (
        by_transformers.complete("base", "abc", max_tokens=20, stop=[stop])
        == (text[: text.index(stop)])
    )
    # Each letter is a token: the prompt is longer than `--context`, not than the model's limit.
    for fields in ({"presence_penalty": 1}, {"logprobs": 1}, {"prompt": "a" * SETTINGS.context}):
        with pytest.raises(openai.BadRequestError):
            by_transformers.client.completions.create(
                **{"model": "base", "prompt": "abc", **fields}
            )


def test_a_disconnect_ends_transformers_reply(by_transformers: ServedApi) -> None:
    stream = by_transformers.client.completions.create(
        model="base", prompt="abc", max_tokens=240, temperature=1, stream=True
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: by_transformers.api.pending == 0)
    assert by_transformers.complete("base", "abc", max_tokens=8)


def test_transformers_counts_the_tokens_that_it_wrote(by_transformers: ServedApi) -> None:
    for seed in range(6):
        answer = by_transformers.client.completions.create(
            model="base", prompt="abc", max_tokens=12, temperature=2, seed=seed
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage and answer.usage.completion_tokens == 12
    stop = answer.choices[0].text[:1]
    answer = by_transformers.client.completions.create(
        model="base", prompt="abc", max_tokens=12, temperature=2, seed=seed, stop=[stop]
    )
    assert (answer.choices[0].finish_reason, answer.choices[0].text) == ("stop", "")


def test_a_cancelled_reply_ends_before_the_next_can_begin(finished: Run) -> None:
    session = target.open_session(target.resolve_target(finished.name, finished.path.parent))
    replies = _Replies(session, "key")
    prompt = session.tokenizer("abc")["input_ids"]
    fields = CompletionFields(model="base", prompt="abc", temperature=1.0, seed=1)

    def is_writing() -> bool:
        return any(thread.name == "reply" for thread in threading.enumerate())

    async def cancel() -> None:
        limit = session.context_length
        events = replies._events(fields.engine_fields(limit), prompt, is_chat=False)
        reply = asyncio.ensure_future(_whole(events))
        while not is_writing():
            await asyncio.sleep(0)
        reply.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reply
        assert not is_writing() and not replies._lock.locked()

    asyncio.run(cancel())


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("abc", "cd", 1), ("abc", "bcd", 2), ("abc", "abc", 0), ("", "x", 0), ("aa", "aaa", 2)],
)
def test_the_beginning_of_a_stop_text_is_held_back(text: str, stop: str, expected: int) -> None:
    assert _overlap(text, stop) == expected


def test_a_process_that_cant_load_its_model_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"), TransformersServer("nothing", tmp_path, 9):
        pass


def test_labels_are_names_only_where_they_are_unique(tmp_path: Path) -> None:
    names = ["20260101-000000-a", "20260102-000000-b", "20260103-000000-b", "odd",
             "20260104-000000-base", "20260105-000000-odd"]  # fmt: skip
    runs = [make_run(tmp_path, name) for name in names]
    assert models._labels(runs) == [("a",), (), (), (), (), ()]


def test_runs_with_other_templates_are_not_served_together(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.gguf, "require_expressible", lambda *_: None)
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    (tmp_path / "two/adapter/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match="another tokenizer or chat template") as caught:
        prepare("one", "two", root=tmp_path)
    assert "one at a time" in str(caught.value.fix)


def test_runs_of_different_bases_are_refused(finished: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    base = Path(finished.recipe().model)
    shutil.copytree(base, tmp_path / "base-model")
    weights = tmp_path / "base-model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    recipe = tmp_path / "two/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), str(tmp_path / "base-model")))
    with pytest.raises(UserError, match="different bases"):
        prepare("one", "two", root=tmp_path)


def test_limits_are_read_from_the_file(tiny_gguf: Path) -> None:
    context, kv_bytes = gguf.read_limits(tiny_gguf)
    assert (context, kv_bytes) == (512, 2 * 2 * 32)  # keys and values, of fp16, of one layer
    assert prepare(str(tiny_gguf), root=Path()).context == SETTINGS.context


def test_too_little_memory_is_refused_before_the_start(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_PROCESS_BYTES", 2**60)
    with pytest.raises(UserError, match="Too little memory"):
        prepare(str(tiny_gguf), root=Path())


def test_beside_a_training_run_it_fits_by_plan_or_is_busy(
    tiny_gguf: Path, light_runs: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = light_runs.launch("endless")  # type: ignore[attr-defined]
    light_runs.worker(run)  # type: ignore[attr-defined]
    free = detect.detect_cpu().memory_available
    monkeypatch.setattr(memory_guard, "remaining_memory", lambda *_: 0.0)
    assert prepare(str(tiny_gguf), root=Path())
    monkeypatch.setattr(memory_guard, "remaining_memory", lambda *_: float(free))
    with pytest.raises(UserError, match="Busy: a run is training"):
        prepare(str(tiny_gguf), root=Path())


@pytest.fixture
def exported(finished: Run, tmp_path: Path) -> Run:
    """Return a run with an export of kind `lora`, whose GGUF file is empty."""
    shutil.copytree(finished.path, tmp_path / "run")
    folder = tmp_path / "run/export/lora"
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"")
    entries = [{"name": "check.json"}, {"name": "x.gguf"}]
    sha256 = sha256_file(finished.adapter / "adapter_model.safetensors")
    export = {"schema": 1, "kind": "lora", "name": "lora", "created": "", "files": entries,
              "adapter": {"sha256": sha256}}  # fmt: skip
    (folder / "export.json").write_text(json.dumps(export))
    (folder / "check.json").write_text('{"schema": 1, "checked": false}')
    return Run(tmp_path / "run")


def test_a_new_adapter_makes_an_old_export_unusable(exported: Run) -> None:
    file = exported.path / "export/lora/x.gguf"
    assert models._made_export(exported, "lora") == file
    weights = exported.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    os.utime(weights, (0, 0))  # older than the export, as in a copied run
    assert models._made_export(exported, "lora") is None


def test_a_deleted_file_is_made_again_and_a_further_one_is_ignored(exported: Run) -> None:
    folder = exported.path / "export/lora"
    (folder / "another.gguf").write_bytes(b"")
    assert models._made_export(exported, "lora") == folder / "x.gguf"
    (folder / "x.gguf").unlink()
    assert models._made_export(exported, "lora") is None
    (folder / "export.json").unlink()
    assert models._made_export(exported, "lora") is None


@pytest.mark.parametrize("file_type", ["f16", "q4_0"])
def test_the_base_is_made_as_exports_make_it(
    file_type: str, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the converter alone, which doesn't know this tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(finished.recipe().model, folder)
    (folder / "tokenizer.model").write_bytes(b"some converters need it")
    converted: list[str] = []

    def convert(model: Path, out: Path, kind: str, name: str) -> None:
        assert name == "model"
        assert (model / "model.safetensors").is_file() and (model / "tokenizer.model").is_file()
        converted.append(kind)
        write_gguf(out)

    monkeypatch.setattr(gguf, "convert_model", convert)
    settings = EngineSettings(file_type)
    base = files.resolve_model(str(folder))
    path = models._base_gguf(base, finished.adapter, settings, lambda line: None)
    assert models._base_gguf(base, finished.adapter, settings, lambda line: None) == path
    assert converted == ["f16"] and path.parent == cache_dir("gguf")
    with monkeypatch.context() as later:
        later.setattr(models, "_VERSION", models._VERSION + 1)
        assert models._base_path(base, finished.adapter, settings) != path
    if file_type != "f16":
        stored = GGUFReader(path).fields["general.file_type"].contents()
        assert stored == LlamaFileType[f"MOSTLY_{file_type.upper()}"]


@pytest.mark.slow(minutes=0.5)
def test_a_model_is_served_quantised_and_without_its_path(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "my-model", "llama")
    settings = EngineSettings("q4_k_m", context=64, parallel=1)
    serving = models.prepare([str(folder)], tmp_path, settings, lambda line: None)
    assert serving.models[0].aliases == ("my-model",)
    engine = Engine(serving.process, lambda: False, lambda: True, lambda: None)
    with serve_api(engine, serving.models, context=64) as served:
        assert served.complete("my-model", "abc")
        assert str(tmp_path) not in served.client.models.list().model_dump_json()
