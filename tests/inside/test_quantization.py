"""A matrix before and after int8 and nf4, against their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from jetson_ft.errors import UserError
from jetson_ft.inside.quantization import BINS, compute_quantization, describe_matrix
from jetson_ft.models import catalog
from jetson_ft.models.files import BaseModelFiles


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(96, 128, generator=torch.Generator().manual_seed(3)) * 0.05


def test_int8_is_a_scale_for_each_row(weight: torch.Tensor) -> None:
    int8, _nf4 = describe_matrix(weight, "w", ["w"]).roundings
    half = weight.half().float()
    scales = half.abs().amax(1, keepdim=True) / 127
    error = (half / scales).round() * scales - weight
    assert int8.rms_error == pytest.approx(float(error.square().mean().sqrt()), rel=1e-2)
    assert int8.max_error == pytest.approx(float(error.abs().max()), rel=0.05)
    assert int8.bits_per_weight == pytest.approx(8 + 32 / 128)


def test_nf4_takes_the_nearest_of_16_levels_of_each_block(weight: torch.Tensor) -> None:
    shown = describe_matrix(weight, "w", ["w"])
    scale = max(map(abs, shown.block_nf4))
    assert scale == pytest.approx(max(map(abs, shown.block)), rel=0.05)
    for before, after in zip(shown.block, shown.block_nf4, strict=True):
        nearest = min(shown.levels, key=lambda level: abs(level * scale - before))
        assert after == pytest.approx(nearest * scale, abs=1e-6)


def test_levels_are_counted_over_the_whole_matrix(weight: torch.Tensor) -> None:
    shown = describe_matrix(weight, "w", ["w"])
    assert sum(shown.level_counts) == sum(shown.scaled_counts) == weight.numel()
    scaled = weight.view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True)
    nearest = (scaled.flatten()[:, None] - torch.tensor(shown.levels)).abs().argmin(1)
    expected = nearest.bincount(minlength=16)
    assert torch.tensor(shown.level_counts).tolist() == pytest.approx(expected.tolist(), abs=4)


def test_errors_histogram_and_ratio_follow_from_the_weights(weight: torch.Tensor) -> None:
    shown = describe_matrix(weight, "w", ["w"])
    int8, nf4 = shown.roundings
    assert len(shown.counts) == len(nf4.counts) == BINS
    assert sum(shown.counts) == pytest.approx(weight.numel(), rel=1e-3)
    for each in (int8, nf4):
        assert each.snr_db == pytest.approx(20 * math.log10(shown.rms / each.rms_error), abs=1e-3)
    assert int8.snr_db > nf4.snr_db + 15
    assert shown.to_json()["roundings"][1]["snr_db"] == float(f"{nf4.snr_db:.4g}")


def test_matrix_of_zeros_has_no_error() -> None:
    shown = describe_matrix(torch.zeros(64, 64), "w", ["w"])
    assert [each.max_error for each in shown.roundings] == [0, 0]
    assert shown.to_json()["roundings"][0]["snr_db"] is None


def test_one_matrix_is_read_from_the_files(tiny_phi: Path) -> None:
    base = BaseModelFiles(str(tiny_phi), tiny_phi)
    dims = catalog.model_dims(base)
    shown = compute_quantization(base, dims, "model.layers.1.mlp.fc2")
    from safetensors.torch import load_file

    stored = load_file(tiny_phi / "model.safetensors")["model.layers.1.mlp.fc2.weight"].float()
    assert shown.shape == tuple(stored.shape)
    assert shown.block == stored.flatten()[:64].tolist()
    assert shown.path in shown.layers and len(shown.layers) == 12


def test_unknown_layer_and_gguf_are_refused(tiny_phi: Path, tmp_path: Path) -> None:
    base = BaseModelFiles(str(tiny_phi), tiny_phi)
    dims = catalog.model_dims(base)
    with pytest.raises(UserError, match=r"(?s)no quantized layer x.*model\.layers\.0\."):
        compute_quantization(base, dims, "x")
    with pytest.raises(UserError, match="safetensors version"):
        compute_quantization(BaseModelFiles("m", tmp_path, "m.gguf"), dims)
