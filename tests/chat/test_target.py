"""What a chat's name means, and its model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jetson_ft import adapter
from jetson_ft.chat.session import ChatSession
from jetson_ft.chat.target import ChatTarget, open_session, resolve_target
from jetson_ft.errors import UserError
from jetson_ft.inference.generate import Sampling
from jetson_ft.models import files, loading
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import LoraRecipe, Recipe
from jetson_ft.runs import store
from jetson_ft.runs.store import Run


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fp32, whatever this machine would choose."""
    from jetson_ft.hardware.detect import Device

    monkeypatch.setattr(Device, "precision", lambda self, wanted: "fp32")


@pytest.fixture(scope="module")
def adapter_folder(tiny_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter that changes the replies."""
    import torch

    base = BaseModelFiles(str(tiny_phi), tiny_phi)
    model = adapter.attach_adapter(
        loading.load_model(base, loading.WeightFormat("fp32"), "cpu"), LoraRecipe(rank=2), 0
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    folder = tmp_path_factory.mktemp("adapter")
    adapter.save_adapter(model, loading.load_tokenizer(base), base, folder)
    return folder


def reply_to(chat: ChatSession, **options: Any) -> str:
    return "".join(chat.reply("你好", Sampling(max_new_tokens=8), **options))


def open_run(name: str, root: Path, **more: str) -> Any:
    return open_session(resolve_target(name, root, **more))


def copy_of_run(finished: Run, tmp_path: Path) -> Path:
    """Return a root with the finished run, renamed, and a newer run without adapter."""
    root = tmp_path / "runs"
    shutil.copytree(finished.path, root / finished.name)
    (root / finished.name).rename(root / "20000101-000000-old")
    store.create_run(Recipe(output_dir=str(root)), "new").write_state("queued")
    return root


@pytest.mark.parametrize("name", ["latest", "20000101-000000-old"])
def test_latest_is_the_newest_run_with_an_adapter(finished: Run, tmp_path: Path, name: str) -> None:
    root = copy_of_run(finished, tmp_path)
    chat = open_run(name, root)
    assert chat.has_adapter
    assert str(root / "20000101-000000-old" / "adapter") in chat.title and "fp32" in chat.title
    assert "".join(chat.reply("你好", Sampling(max_new_tokens=3)))


def test_run_without_adapter_is_refused_with_its_state(finished: Run, tmp_path: Path) -> None:
    root = copy_of_run(finished, tmp_path)
    with pytest.raises(UserError, match=r"has no adapter yet \(queued\)"):
        open_run(store.list_runs(root)[0].name, root)


def test_latest_without_any_adapter_suggests_the_base(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter yet") as caught:
        open_run("latest", tmp_path)
    assert "`base`" in str(caught.value.fix)


def test_model_folder_opens_without_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    chat = open_run(str(tiny_llama), tmp_path)
    assert not chat.has_adapter and chat.title.startswith(f"{tiny_llama} (fp32")


def test_names_of_base_models_are_distinct_from_names_of_runs(
    finished: Run, tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "runs").mkdir()
    bases = ["base", "embedded", "microsoft/phi-1_5", tiny_phi, tmp_path, tmp_path / "model.gguf"]
    others = [finished.name, finished.path, finished.adapter, "latest", "a-deleted-one",
              tmp_path / "runs" / "gone", "~nobody-here/x"]  # fmt: skip
    assert all(files.is_base_model(str(name)) for name in bases)
    assert not any(files.is_base_model(str(name)) for name in others)
    monkeypatch.chdir(tmp_path)
    assert not files.is_base_model("runs/gone"), "a path, even where there is no such run"
    (tmp_path / "base").mkdir()
    assert files.is_base_model("base"), "a folder of that name changes nothing"


def test_adapter_folder_opens_with_its_base(finished: Run, tmp_path: Path, tiny_phi: Path) -> None:
    chat = open_run(str(finished.adapter), tmp_path)
    assert chat.has_adapter and chat.title.startswith(str(tiny_phi))


@pytest.fixture
def foreign(finished: Run, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of an adapter of other software, with changes to its configuration."""

    def make(**changes: Any) -> Path:
        folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
        (folder / "base.json").unlink()
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return make


def test_adapter_of_other_software_opens_with_the_base_in_its_config(
    foreign: Callable[..., Path], tmp_path: Path
) -> None:
    folder = foreign(base_model_name_or_path="owner/name")
    assert resolve_target(str(folder), tmp_path).recipe.model == "owner/name"


@pytest.mark.parametrize("name", [None, ""])
def test_adapter_without_a_base_name_needs_one_given(
    foreign: Callable[..., Path], tmp_path: Path, tiny_phi: Path, name: str | None
) -> None:
    folder = foreign(base_model_name_or_path=name)
    with pytest.raises(UserError, match="names no base model") as caught:
        resolve_target(str(folder), tmp_path)
    assert str(caught.value.where).endswith("adapter_config.json")
    assert "--model" in str(caught.value.fix)
    chat = open_run(str(folder), tmp_path, model=str(tiny_phi))
    assert chat.has_adapter and chat.warning is None


def test_missing_base_is_reported_with_the_file_that_names_it(
    foreign: Callable[..., Path], tmp_path: Path, tiny_phi: Path
) -> None:
    folder = foreign(base_model_name_or_path="/data/of/others/base")
    with pytest.raises(UserError, match="Model not found") as caught:
        open_run(str(folder), tmp_path)
    assert "/data/of/others/base, named in" in str(caught.value.where)
    assert str(caught.value.where).endswith("adapter_config.json")
    assert "--model NAME" in str(caught.value.fix)
    chat = open_run(str(folder), tmp_path, model=str(tiny_phi))
    assert "made for /data/of/others/base" in str(chat.warning)


def test_missing_model_that_was_given_is_not_blamed_on_the_adapter(
    foreign: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="Model not found") as caught:
        open_run(str(foreign()), tmp_path, model="/no/such/model")
    assert str(caught.value.where) == "/no/such/model"


def test_tokenizer_and_template_of_the_adapter_are_used(
    foreign: Callable[..., Path], tmp_path: Path, tiny_phi: Path
) -> None:
    folder = foreign(base_model_name_or_path=str(tiny_phi))
    template = "{% for m in messages %}{{ 'Q: ' + m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": "<|im_end|>"})
    )
    chat = open_run(str(folder), tmp_path)
    assert (chat.tokenizer.chat_template, chat.tokenizer.eos_token) == (template, "<|im_end|>")
    (folder / "tokenizer.json").unlink()
    chat = open_run(str(folder), tmp_path)
    assert (chat.tokenizer.chat_template, chat.tokenizer.eos_token) == (template, "<|endoftext|>")


def test_adapter_without_template_uses_the_one_of_the_base(
    foreign: Callable[..., Path], tmp_path: Path, tiny_llama: Path, tiny_phi: Path
) -> None:
    folder = foreign()
    (folder / "chat_template.jinja").unlink()
    llama = BaseModelFiles("llama", tiny_llama)
    assert "<|im_start|>" in adapter.load_tokenizer(llama, folder).chat_template


@pytest.fixture
def enlarged(foreign: Callable[..., Path], tiny_phi: Path) -> Path:
    """Return an adapter with a token in its tokenizer that the base has no embedding for."""
    folder = foreign(base_model_name_or_path=str(tiny_phi))
    tokenizer = loading.load_tokenizer(BaseModelFiles("adapter", folder))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_added_token_without_an_embedding_is_refused_in_a_message_only(
    enlarged: Path, tmp_path: Path
) -> None:
    chat = open_run(str(enlarged), tmp_path)
    assert len(chat.tokenizer) == 260
    assert reply_to(chat)
    with pytest.raises(UserError, match="no embedding for: <new>"):
        chat.ask("a<new>b")


def test_template_with_a_token_without_an_embedding_is_refused(
    enlarged: Path, tmp_path: Path
) -> None:
    file = enlarged / "chat_template.jinja"
    file.write_text("<new>" + file.read_text())
    with pytest.raises(UserError, match=r"has 260 tokens, .* only 259 rows") as caught:
        open_run(str(enlarged), tmp_path)
    assert str(caught.value.where) == str(enlarged)
    assert str(caught.value.fix).startswith("Merge the adapter with the program that enlarged")


def test_adapter_of_another_base_is_refused(
    finished: Run, tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(UserError, match="made for another base"):
        open_run(str(finished.path), tmp_path, model=str(tiny_llama))


def test_base_opens_without_adapter(tmp_path: Path, tiny_phi: Path) -> None:
    chat = open_run("base", tmp_path, model=str(tiny_phi))
    assert not chat.has_adapter and " with " not in chat.title


def test_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantize can't be 'int4'"):
        open_run("base", tmp_path, quantize="int4")


def test_adapter_can_be_disabled_for_a_reply(
    tiny_phi: Path, adapter_folder: Path, phi: Any
) -> None:
    chat = open_session(ChatTarget(Recipe(model=str(tiny_phi)), adapter_folder))
    base = reply_to(ChatSession(phi.model, phi.tokenizer, False, 2048))
    assert chat.has_adapter and chat.context_length == 2048
    assert reply_to(chat, use_adapter=False) == base
    assert reply_to(chat) != base
    assert reply_to(chat, use_adapter=False) == base


def test_folder_without_adapter_is_refused(tiny_phi: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"[Nn]o adapter"):
        open_session(ChatTarget(Recipe(model=str(tiny_phi)), tmp_path))
