"""A model's name is resolved to files; unsafe ones are refused before they are read."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_gguf

from jetson_ft import hub
from jetson_ft.errors import UserError
from jetson_ft.models import embedded
from jetson_ft.models.files import BaseModelFiles, has_tokenizer, resolve_model
from jetson_ft.models.loading import load_tokenizer


@pytest.fixture
def copy(tiny_phi: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Phi to be changed."""
    return Path(shutil.copytree(tiny_phi, tmp_path / "copy"))


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Folders and files


def test_a_folder_is_resolved_by_its_path(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(copy)) == BaseModelFiles(str(copy), copy)
    monkeypatch.chdir(copy.parent)
    assert resolve_model("copy") == BaseModelFiles("copy", copy)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert resolve_model("~/copy").folder == copy


def test_embedded_is_the_bundled_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "embedded_folder", lambda: copy)
    assert resolve_model("embedded") == BaseModelFiles("embedded", copy)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "./a b", "x.gguf", "../up/and/away"])
def test_an_unknown_name_is_refused_with_what_may_be_given(name: str) -> None:
    with pytest.raises(UserError, match="Model not found") as caught:
        resolve_model(name)
    assert str(caught.value.where) == name
    assert "`embedded`" in str(caught.value.fix)


def test_a_single_gguf_file_is_used(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    assert resolve_model(str(tmp_path)) == BaseModelFiles(str(tmp_path), tmp_path, "tiny.gguf")
    assert resolve_model(str(file)) == BaseModelFiles(str(file), tmp_path, "tiny.gguf")


def test_a_link_to_a_gguf_file_is_used_by_its_own_name(tmp_path: Path) -> None:
    # The Hub's client keeps files in `blobs`, named by their hashes, and links in `snapshots`.
    for folder in ("blobs", "snapshots"):
        (tmp_path / folder).mkdir()
    blob = write_gguf(tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "snapshots" / "tiny.gguf"
    link.symlink_to("../blobs/0123abcd")
    base = resolve_model(str(link))
    assert base == BaseModelFiles(str(link), link.parent, "tiny.gguf")
    (tmp_path / "tiny.gguf").write_bytes(blob.read_bytes())
    assert base.fingerprint() == BaseModelFiles("x", tmp_path, "tiny.gguf").fingerprint()
    assert load_tokenizer(base).eos_token == "<|im_end|>"


def test_several_gguf_files_are_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="Several GGUF files") as caught:
        resolve_model(str(tmp_path))
    assert str(caught.value.fix) == "Name one: a.gguf, b.gguf."
    assert resolve_model(str(tmp_path / "b.gguf")).gguf_file == "b.gguf"


def test_safetensors_are_preferred_to_gguf(copy: Path) -> None:
    (copy / "x.gguf").touch()
    assert resolve_model(str(copy)).gguf_file is None


# What is refused


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickled_weights_are_refused(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(UserError, match="pickled weights only") as caught:
        resolve_model(str(copy))
    assert str(caught.value.where) == str(copy)
    assert "safetensors" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model.safetensors", "No weights found"), ("config.json", "config.json is missing")],
)
def test_a_missing_file_is_named(copy: Path, missing: str, message: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(UserError, match=message):
        resolve_model(str(copy))


def test_weights_may_be_missing_when_not_needed(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert resolve_model(str(copy), weights=False).folder == copy


def test_an_adapter_is_refused_as_base(copy: Path) -> None:
    # transformers would load whatever base this file names, unchecked.
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    with pytest.raises(UserError, match="Expected a base model, found an adapter"):
        resolve_model(str(copy))


def test_auto_map_is_ignored_where_transformers_has_the_class(copy: Path) -> None:
    # As in older copies of Phi-1.5.
    set_config(copy, auto_map={"AutoModelForCausalLM": "modeling_phi.PhiForCausalLM"})
    assert resolve_model(str(copy)).folder == copy


def test_an_architecture_that_needs_its_own_code_is_refused(copy: Path) -> None:
    set_config(copy, auto_map={"AutoConfig": "evil.Config"}, model_type="mixformer-sequential")
    with pytest.raises(UserError, match='"mixformer-sequential" needs code from its repository'):
        resolve_model(str(copy))


def test_a_damaged_config_is_named(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        resolve_model(str(copy))
    assert str(caught.value.where) == str(copy / "config.json")


# The hub


class FakeHub:
    """A repository's files; `fetch` copies the wanted ones as a download would."""

    def __init__(self, files: list[str], source: Path) -> None:
        self.files, self.source = files, source
        self.fetched: list[str] = []

    def list_files(self, repo: str, kind: str) -> list[str]:
        assert (repo, kind) == ("owner/name", "model")
        return self.files

    def fetch(self, repo: str, kind: str, patterns: list[str]) -> Path:
        self.fetched = patterns
        return self.source


def offer(monkeypatch: pytest.MonkeyPatch, source: Path, *files: str) -> FakeHub:
    fake = FakeHub(list(files), source)
    monkeypatch.setattr(hub, "list_files", fake.list_files)
    monkeypatch.setattr(hub, "fetch", fake.fetch)
    return fake


def test_a_hub_id_is_downloaded(
    tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["config.json", "model-1.safetensors", "model-2.safetensors"]
    others = ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"]
    fake = offer(monkeypatch, tiny_phi, *files, *others)
    assert resolve_model("owner/name") == BaseModelFiles("owner/name", tiny_phi)
    assert [f for f in fake.fetched if "*" not in f and "." in f and "safetensors" in f] == files[
        1:
    ]
    assert "*.json" in fake.fetched and not any(f.endswith(".bin") for f in fake.fetched)
    resolve_model("owner/name", weights=False)
    assert not any("safetensors" in f for f in fake.fetched)


@pytest.mark.parametrize(
    ("file", "message"),
    [("pytorch_model.bin", "pickled weights only"), ("m.gguf", "No weights found")],
)
def test_a_hub_id_without_safetensors_is_refused_before_a_download(
    tiny_phi: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str
) -> None:
    fake = offer(monkeypatch, tiny_phi, "config.json", file)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model("owner/name")
    assert str(caught.value.where) == "owner/name"
    assert fake.fetched == []


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("spiece.model", True),
        ("vocab.json", True),
        ("vocab.txt", True),
        ("tokenizer_config.json", False),
        ("merges.txt", False),
    ],
)
def test_each_file_of_a_tokenizer_is_recognized_and_downloaded(
    tiny_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, expected: bool
) -> None:
    (tmp_path / file).touch()
    assert has_tokenizer(tmp_path) == expected
    fake = offer(monkeypatch, tiny_phi, "config.json")
    resolve_model("owner/name", weights=False)
    assert any(fnmatch(file, pattern) for pattern in fake.fetched)


# Fingerprints


def test_fingerprints_differ_wherever_weights_differ(tmp_path: Path) -> None:
    content = bytearray(400_000)
    fingerprints = set()
    for place in (None, 0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        fingerprints.add(BaseModelFiles("x", tmp_path).fingerprint())
    (tmp_path / "model.safetensors").write_bytes(content + b"\0")
    fingerprints.add(BaseModelFiles("x", tmp_path).fingerprint())
    assert len(fingerprints) == 5


def test_a_fingerprint_depends_on_the_weights_alone(copy: Path, tiny_phi: Path) -> None:
    (copy / "README.md").write_text("other")
    assert BaseModelFiles("a", copy).fingerprint() == BaseModelFiles("b", tiny_phi).fingerprint()


def test_a_gguf_model_has_the_fingerprint_of_its_file(tmp_path: Path) -> None:
    for name, seed in (("a.gguf", 0), ("b.gguf", 1)):
        write_gguf(tmp_path / name, seed)
    first, second = (
        BaseModelFiles("x", tmp_path, name).fingerprint() for name in ("a.gguf", "b.gguf")
    )
    assert first != second
