"""Merged models: the same as PEFT's merge, and the same logits as base and adapter."""

from __future__ import annotations

import gc
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from tiny_models import CHAT_TEMPLATE, save_model

from jetson_ft import adapter
from jetson_ft.errors import UserError
from jetson_ft.export import merge
from jetson_ft.export.logits import logit_difference
from jetson_ft.export.merge import merge_adapter
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat, load_model, load_tokenizer
from jetson_ft.recipe import LoraRecipe

FP32 = WeightFormat("fp32")
ROWS = [[5, 6, 7, 8, 9, 10], [200, 100, 50, 3, 4]]


def base_in(folder: Path, gguf_file: str | None = None) -> BaseModelFiles:
    return BaseModelFiles(str(folder), folder, gguf_file)


def randomise(model: Any) -> None:
    """Give every trained tensor other values than its first ones."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def save_peft(base: BaseModelFiles, folder: Path, **config: Any) -> Path:
    """Save an adapter that PEFT makes by itself, as other programs do."""
    model = load_model(base, FP32, "cpu")
    peft_model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **config)
    )
    randomise(peft_model)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def save_ours(
    base: BaseModelFiles, folder: Path, weights: WeightFormat = FP32, **lora: Any
) -> Path:
    """Save an adapter as a run does."""
    model = adapter.attach_adapter(load_model(base, weights, "cpu"), LoraRecipe(rank=4, **lora), 0)
    randomise(model)
    adapter.save_adapter(model, load_tokenizer(base), base, folder)
    return folder


def logits_of(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits for ids in ROWS]


def assert_same_logits(base: BaseModelFiles, adapter_dir: Path, out: Path) -> None:
    expected = logits_of(
        PeftModel.from_pretrained(load_model(base, FP32, "cpu"), adapter_dir).eval()
    )
    merged = logits_of(load_model(base_in(out), FP32, "cpu"))
    plain = logits_of(load_model(base, FP32, "cpu"))
    for one, other, before in zip(expected, merged, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - before).abs().max() > 0.01  # the adapter changes something


def assert_same_as_peft(base: BaseModelFiles, adapter_dir: Path, out: Path) -> None:
    model = PeftModel.from_pretrained(load_model(base, FP32, "cpu"), adapter_dir)
    expected = model.merge_and_unload().state_dict()
    merged = load_model(base_in(out), FP32, "cpu").state_dict()
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, merged[name]), name


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 32},
    },
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "norm saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["final_layernorm"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 200, 258]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}  # fmt: skip


def is_tied(folder: Path) -> bool:
    """Return whether the head is the embedding, by the folder's config."""
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_pefts(kind: str, tiny_phi: Path, tmp_path: Path) -> None:
    base = base_in(tiny_phi)
    saved = save_peft(base, tmp_path / "adapter", **KINDS[kind])
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert not is_tied(tmp_path / "out")
    assert_same_as_peft(base, saved, tmp_path / "out")
    assert_same_logits(base, saved, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "stays_tied"),
    [
        ("plain", True), ("head", False), ("embedding", False), ("trained tokens", True),
        ("head saved whole", False), ("embedding saved whole", False),
    ],
)  # fmt: skip
def test_tied_head_is_untied_where_the_adapter_changes_one_side(
    kind: str, stays_tied: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """PEFT's own merge would change both sides."""
    base = base_in(tiny_llama)
    saved = save_peft(base, tmp_path / "adapter", **KINDS[kind])
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert is_tied(tmp_path / "out") == stays_tied
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) != stays_tied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == stays_tied
    assert_same_logits(base, saved, tmp_path / "out")


@pytest.mark.parametrize("lora", [{}, {"rslora": True}, {"dora": True}])
def test_layers_that_store_their_weights_transposed(
    lora: dict[str, Any], short_gpt2: Path, tmp_path: Path
) -> None:
    base = base_in(short_gpt2)
    saved = save_ours(base, tmp_path / "adapter", **lora)
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert_same_as_peft(base, saved, tmp_path / "out")
    assert_same_logits(base, saved, tmp_path / "out")


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_adapter_of_a_quantised_run_is_merged_into_the_unquantised_base(
    quantize: str, wide_phi: Path, tmp_path: Path
) -> None:
    base = base_in(wide_phi)
    saved = save_ours(base, tmp_path / "adapter", WeightFormat("fp32", quantize))
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_same_as_peft(base, saved, tmp_path / "out")


def test_gguf_base(tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf")
    base = base_in(tmp_path, "base.gguf")
    saved = save_ours(base, tmp_path / "adapter")
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert_same_logits(base, saved, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-0.6B", "google/gemma-3-270m", "microsoft/Phi-4-mini-instruct"]
)
def test_tensors_are_named_as_in_the_bases_files(
    name: str, tiny_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_in(tiny_model_of(name))
    saved = save_ours(base, tmp_path / "adapter")
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    names = load_file(base.folder / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names
    assert_same_as_peft(base, saved, tmp_path / "out")


def test_experts_are_written_as_the_base_has_them(tmp_path: Path) -> None:
    """Of Mixtral, transformers holds all experts as one tensor, and files have each."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    base = base_in(save_model(tmp_path / "base", config, CHAT_TEMPLATE))
    saved = save_ours(base, tmp_path / "adapter")
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    before = load_file(base.folder / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == before.keys() and any("experts.3" in name for name in merged)
    assert_same_logits(base, saved, tmp_path / "out")


def test_large_model_is_written_in_several_files(
    deep_phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_in(deep_phi)
    saved = save_ours(base, tmp_path / "adapter")
    monkeypatch.setattr(merge, "SHARD_BYTES", 100_000)
    steps: list[tuple[int, int]] = []
    parameters = merge_adapter(
        base, saved, tmp_path / "out", "fp32", lambda done, total: steps.append((done, total))
    )
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) > 2 and len({name[-16:] for name in names}) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == names
    assert index["metadata"] == {"total_parameters": parameters, "total_size": 4 * parameters}
    assert steps[0][0] == 0 and steps[-1] == (4 * parameters, 4 * parameters)
    assert sorted(steps) == steps
    assert_same_as_peft(base, saved, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_merged_in_fp32_and_rounded_once(
    dtype: str, torch_dtype: torch.dtype, tiny_phi: Path, tmp_path: Path
) -> None:
    base = base_in(tiny_phi)
    saved = save_ours(base, tmp_path / "adapter")
    for name in ("fp32", dtype):
        merge_adapter(base, saved, tmp_path / name, name)
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    rounded = load_file(tmp_path / dtype / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].to(torch_dtype)) for name in exact)
    config = json.loads((tmp_path / dtype / "config.json").read_text())
    assert config["dtype"] == str(torch_dtype).removeprefix("torch.")


def test_16_bit_base_is_not_rounded_before_the_sum(tmp_path: Path, tiny_phi: Path) -> None:
    base = base_in(tmp_path / "base")
    model = load_model(base_in(tiny_phi), WeightFormat("bf16"), "cpu")
    model.save_pretrained(base.folder)
    load_tokenizer(base_in(tiny_phi)).save_pretrained(base.folder)
    assert merge.stored_format(base) == WeightFormat("bf16")
    saved = save_ours(base, tmp_path / "adapter")
    merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert_same_as_peft(base, saved, tmp_path / "out")


def test_folder_has_what_other_programs_need(
    tiny_model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_in(tiny_model_of("Qwen/Qwen3-0.6B"))
    saved = save_ours(base, tmp_path / "adapter")
    (saved / "tokenizer.model").write_bytes(b"pieces")
    merge_adapter(base, saved, tmp_path / "out", "bf16")
    out = tmp_path / "out"
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    tokenizer = load_tokenizer(base_in(out))
    # The base's config ends a reply at another token than its chat template.
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_tensors_without_a_place_are_refused(tiny_phi: Path, tmp_path: Path) -> None:
    """PEFT loads such an adapter without a word."""
    base = base_in(tiny_phi)
    saved = save_ours(base, tmp_path / "adapter")
    tensors = load_file(saved / adapter.WEIGHTS_FILE)
    layer = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {layer: torch.zeros(4, 32)}, saved / adapter.WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"don't fit the model.*layers\.7"):
        merge_adapter(base, saved, tmp_path / "out", "fp32")
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, saved / adapter.WEIGHTS_FILE)
    with pytest.raises(UserError, match="1 of the adapter's tensors"):
        merge_adapter(base, saved, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


def test_weight_too_large_for_fp16_is_refused(tiny_phi: Path, tmp_path: Path) -> None:
    base = base_in(tiny_phi)
    saved = save_ours(base, tmp_path / "adapter")
    tensors = load_file(saved / adapter.WEIGHTS_FILE)
    save_file(
        {name: 1e3 * tensor for name, tensor in tensors.items()}, saved / adapter.WEIGHTS_FILE
    )
    with pytest.raises(UserError, match=r"not finite as float16(.|\n)*bf16"):
        merge_adapter(base, saved, tmp_path / "out", "fp16")
    merge_adapter(base, saved, tmp_path / "other", "bf16")


def test_base_is_written_without_the_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    base = base_in(tiny_llama)
    saved = save_ours(base, tmp_path / "adapter")
    merge_adapter(base, saved, tmp_path / "out", "fp32", apply=False)
    assert is_tied(tmp_path / "out")
    before = load_file(tiny_llama / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], written[name]) for name in before.keys() | written.keys())


def test_difference_of_logits(tiny_phi: Path, tmp_path: Path) -> None:
    base = base_in(tiny_phi)
    saved = save_ours(base, tmp_path / "adapter")
    relative = {}
    for dtype in ("fp32", "fp16", "bf16"):
        merge_adapter(base, saved, tmp_path / dtype, dtype)
        measured = logit_difference(base, saved, tmp_path / dtype, ROWS, "fp32", "cpu", tmp_path)
        assert (measured.positions, measured.rows) == (11, 2)
        assert not (tmp_path / "logits").exists()
        relative[dtype] = measured.relative
    assert relative["fp32"] < 1e-5 < relative["fp16"] < relative["bf16"] < 0.1
    merge_adapter(base, saved, tmp_path / "base", "fp32", apply=False)
    unmerged = logit_difference(base, saved, tmp_path / "base", ROWS, "fp32", "cpu", tmp_path)
    expected = max(
        float((one - other).abs().max())
        for one, other in zip(
            logits_of(PeftModel.from_pretrained(load_model(base, FP32, "cpu"), saved).eval()),
            logits_of(load_model(base, FP32, "cpu")),
            strict=True,
        )
    )
    assert unmerged.largest == pytest.approx(expected, rel=1e-4)
    assert unmerged.relative > 0.1


@pytest.mark.slow(minutes=0.1)
def test_memory_is_not_that_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=259, hidden_size=512, intermediate_size=1536, num_hidden_layers=16,
        num_attention_heads=8, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    save_model(tmp_path / "fp32", config, CHAT_TEMPLATE)
    base = base_in(tmp_path / "base")
    load_model(base_in(tmp_path / "fp32"), WeightFormat("bf16"), "cpu").save_pretrained(base.folder)
    load_tokenizer(base_in(tmp_path / "fp32")).save_pretrained(base.folder)
    saved = save_ours(base, tmp_path / "adapter")
    monkeypatch.setattr(merge, "SHARD_BYTES", 10**7)

    def private_bytes() -> int:
        line = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert line
        return 1024 * int(line[1])

    gc.collect()
    peak = before = private_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    written = 2 * merge_adapter(base, saved, tmp_path / "out", "fp16")
    ended.set()
    watcher.join()
    assert written > 100 * 10**6
    assert peak - before < written
