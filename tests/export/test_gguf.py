"""GGUF files by llama.cpp's converters: what they can't express is refused first."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf as gguf_format
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_exports import save_tiny_model

from jetson_ft.errors import UserError
from jetson_ft.export import gguf
from jetson_ft.export.quantize import quantize_file
from jetson_ft.models.files import BaseModelFiles

_LORA = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
         "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]  # fmt: skip


def _adapter(folder: Path, names: list[str], **config: Any) -> Path:
    folder.mkdir()
    save_file({name: torch.ones(2, 2) for name in names}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("names", "config", "model_type", "reason"),
    [
        (_LORA, {"use_dora": True}, "llama", "DoRA"),
        ([*_LORA, "base_model.model.model.embed_tokens.weight"], {}, "llama", "embeddings"),
        ([*_LORA, "base_model.model.lm_head.lora_A.weight"], {}, "llama", "head"),
        ([*_LORA, "base_model.model.model.norm.weight"], {}, "llama", "modules_to_save"),
        (_LORA, {"alpha_pattern": {"q_proj": 8}}, "llama", "different scales"),
        (_LORA, {"rank_pattern": {"q_proj": 8}, "use_rslora": True}, "llama", "different scales"),
        (_LORA, {}, "qwen3_5_text", "architecture wrongly"),
        (_LORA, {}, "gemma4", "architecture wrongly"),
    ],
)
def test_an_adapter_that_gguf_cant_express_is_refused(
    tmp_path: Path, names: list[str], config: dict[str, Any], model_type: str, reason: str
) -> None:
    model, out = tmp_path / "model", tmp_path / "lora.gguf"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    adapter = _adapter(tmp_path / "adapter", names, **config)
    with pytest.raises(UserError, match=reason) as error:
        gguf.convert_adapter(model, adapter, out)
    assert "--format gguf" in str(error.value)
    assert not out.exists()


def test_an_unknown_tokenizer_is_refused_before_the_merge(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", _LORA)
    with pytest.raises(UserError, match="doesn't know this tokenizer") as error:
        gguf.require_expressible(BaseModelFiles("tiny", tiny_llama), adapter, "gguf")
    assert "--format merged" in str(error.value)
    gguf.require_expressible(BaseModelFiles("tiny", tiny_llama), adapter, "merged")


def test_a_tokenizer_is_checked_once_until_it_changes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[Path] = []
    monkeypatch.setattr(gguf, "_run_converter", lambda _script, _words, out: checks.append(out))
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for number in range(2):
        adapter = _adapter(tmp_path / f"adapter-{number}", _LORA)
        gguf.require_expressible(BaseModelFiles("tiny", model), adapter, "lora")
    assert len(checks) == 1
    with open(model / "chat_template.jinja", "a") as template:
        template.write("{# another #}")
    gguf.require_expressible(BaseModelFiles("tiny", model), adapter, "lora")
    assert len(checks) == 2
    more = model / "additional_chat_templates"
    more.mkdir()
    shutil.copy(model / "chat_template.jinja", more / "tool_use.jinja")
    for _ in range(2):
        gguf.require_expressible(BaseModelFiles("tiny", model), adapter, "lora")
    assert len(checks) == 3


@pytest.mark.parametrize(
    ("output", "code", "what"),
    [
        ("NotImplementedError: BPE pre-tokenizer was not recognized - update", 1, "tokenizer"),
        ("NotImplementedError: Architecture 'FooForCausalLM' not supported!", 1, "FooForCausalLM"),
        ("ERROR:hf-to-gguf:Model BarForCausalLM is not supported", 1, "BarForCausalLM"),
        (
            "FileNotFoundError: Missing /tmp/x/tokenizer.model",
            1,
            "needs the model's tokenizer.model",
        ),
        ("OSError: [Errno 28] No space left on device", 1, "disk is full|space"),
        ("numpy.core._exceptions._ArrayMemoryError: MemoryError", 1, "out of memory"),
        ("", -9, "out of memory"),
        ("Traceback\nValueError: Can not map tensor 'x'", 1, "Can not map tensor 'x'"),
        ("", 1, "exit code 1"),
    ],
)
def test_the_converters_errors_become_plain(
    tmp_path: Path, output: str, code: int, what: str
) -> None:
    error = gguf._explain_failure(output, code, tmp_path / "out.gguf")
    assert isinstance(error, UserError)
    assert re.search(what, str(error), re.IGNORECASE), str(error)


def test_without_the_converter_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="jetson-ft\\[export\\]"):
        gguf._run_converter("convert_hf_to_gguf.py", [], tmp_path / "out.gguf")


@pytest.mark.slow(minutes=0.4)
def test_q8_0_is_the_converters_own(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    for file_type in ("f16", "q8_0"):
        gguf.convert_model(model, tmp_path / f"{file_type}.gguf", file_type, name="-zh 好")
    quantize_file(tmp_path / "f16.gguf", tmp_path / "ours.gguf", "q8_0")
    readers = [gguf_format.GGUFReader(tmp_path / name) for name in ("ours.gguf", "q8_0.gguf")]
    ours, theirs = ({tensor.name: tensor for tensor in reader.tensors} for reader in readers)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(tensor.data, theirs[name].data), name
    fields = [{key: value.contents() for key, value in reader.fields.items()} for reader in readers]
    assert fields[0] == fields[1]
    assert fields[0]["general.name"] == "-zh 好"


@pytest.mark.slow(minutes=0.3)
def test_an_adapters_file_has_its_own_name(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    hidden, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    adapter = _adapter(tmp_path / "adapter", [], target_modules=["q_proj"])
    weights = dict(zip(_LORA, (torch.ones(2, hidden), torch.ones(width, 2)), strict=True))
    save_file(weights, adapter / "adapter_model.safetensors")
    gguf.convert_adapter(model, adapter, tmp_path / "my-run-lora.gguf")
    fields = gguf_format.GGUFReader(tmp_path / "my-run-lora.gguf").fields
    assert fields["general.name"].contents() == "My Run Lora"


def test_a_models_code_is_never_run(tiny_llama: Path, tmp_path: Path) -> None:
    """A tokenizer that names code beside it: the converter asks transformers to run it."""

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    proof = tmp_path / "proof"
    (model / "own.py").write_text(
        f"import pathlib; pathlib.Path({str(proof)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast as Own\n"
    )
    (model / gguf.TOKENS_FILE).write_text('{"add_bos": false, "ends": {}, "chat_template": "x"}')
    with pytest.raises(UserError):
        gguf._run_converter(
            "convert_hf_to_gguf.py", [str(model), "--vocab-only", "--outfile", "x.gguf"],
            tmp_path / "x.gguf",
        )  # fmt: skip
    assert not proof.exists()
