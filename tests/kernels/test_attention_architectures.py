"""Every architecture is packed without a leak, or computed row by row, as documented."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_architectures
import torch
import transformers
from packing_verdicts import PACKED, documented_verdicts, packing_verdict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jetson_ft.kernels.attention import use_packed_attention
from jetson_ft.kernels.lm_head_loss import token_losses
from jetson_ft.kernels.packing import pack_rows

VERSION, VERDICTS = documented_verdicts()
IS_DOCUMENTED_VERSION = transformers.__version__ == VERSION


def rows() -> list[dict[str, Any]]:
    """Rows after the same four tokens, longer than the tiny models' windows and convolutions."""
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 150, (size,), generator=random) for size in (40, 23, 60)]
    prefix = torch.tensor([50, 51, 52, 53])
    return [
        {
            "input_ids": torch.cat((prefix, own)),
            "segments": torch.cat((torch.zeros(4), torch.ones(len(own)))),
        }
        for own in ids
    ]


def packed_difference(model: Any, packed: bool) -> float:
    """Return the largest difference of a token's loss from that of its row alone."""
    alone = torch.cat([token_losses(model, pack_rows([row])) for row in rows()])
    assert alone.isfinite().all()  # the trial left no state behind
    if not packed:
        return 0.0
    pack = pack_rows(rows())
    assert pack.shared_prefix == 4
    with use_packed_attention(model):
        return float((token_losses(model, pack) - alone).abs().max())


@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
@torch.no_grad()
def test_packed_rows_have_the_losses_of_each_row_alone(kind: str) -> None:
    if kind in tiny_architectures.NOT_BUILT:
        pytest.skip(tiny_architectures.NOT_BUILT[kind])
    try:
        model = tiny_architectures.tiny_model(kind)
    except Exception as error:
        if IS_DOCUMENTED_VERSION:
            raise
        pytest.skip(f"this version of transformers can't build it: {error!r}")
    verdict = packing_verdict(model)
    if IS_DOCUMENTED_VERSION:
        assert VERDICTS.get(kind) == verdict, "run scripts/document_packing.py"
    difference = packed_difference(model, verdict == PACKED)
    if difference > 1e-5:  # sharp attention makes 3e-5 of fp32's rounding (Gemma 4)
        difference = packed_difference(model.double(), verdict == PACKED)
    assert difference < 1e-5


@pytest.mark.skipif(not IS_DOCUMENTED_VERSION, reason="another version is documented")
def test_the_documentation_names_every_architecture() -> None:
    built = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(tiny_architectures.NOT_BUILT)
    assert set(VERDICTS) == built


# Convolutions and recurrences of each kind (RG-LRU, Mamba 2, gated convolutions, Gated DeltaNet);
# positions that begin at 2; a model that returns all logits.
ROW_BY_ROW = ["recurrent_gemma", "falcon_h1", "lfm2", "qwen3_next", "qwen3_5_text", "roberta",
              "xlstm"]  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_row_by_row_gives_plain_pefts_loss_and_gradients(kind: str, checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    from jetson_ft.adapter import attach_adapter
    from jetson_ft.kernels.fused_layers import fuse_layers
    from jetson_ft.kernels.lm_head_loss import chunked_lm_head
    from jetson_ft.recipe import LoraRecipe

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def randomize(model: Any) -> None:
        random = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)

    ours, base = (tiny_architectures.tiny_model(kind).requires_grad_(False) for _ in range(2))
    ours = attach_adapter(ours, LoraRecipe(rank=4, alpha=8), seed=0)
    targets = ours.peft_config["default"].target_modules
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    peft = get_peft_model(base, settings)
    randomize(ours), randomize(peft)
    fuse_layers(ours)
    assert packing_verdict(ours) != PACKED
    ours.train(), peft.train()
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.enable_input_require_grads()
    with chunked_lm_head(ours):
        for row in rows():
            loss = token_losses(ours, pack_rows([row])).sum()
            labels = row["input_ids"].masked_fill(row["segments"] == 0, -100)[None]
            own = peft(input_ids=row["input_ids"][None], labels=labels, use_cache=False).loss
            count = int(row["segments"].sum())
            assert abs(float(loss) / count - float(own)) < 1e-5
            (loss / count).backward()
            own.backward()
    expected = gradients(peft)
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5), name
