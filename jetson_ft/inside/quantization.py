"""What int8 and nf4 do to one weight matrix, by bitsandbytes' own kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _
from jetson_ft.inside.model import LoadedModel, View, significant
from jetson_ft.models import catalog, fast_import, files
from jetson_ft.models.dims import ModelDims
from jetson_ft.models.files import BaseModelFiles

if TYPE_CHECKING:
    import torch

BINS = 81  # of the histogram; an odd number has a bin around 0
_BLOCK = 64  # weights that share a scale in nf4
_PART = 1 << 20  # weights that are computed with in fp64 at a time
_EDGE = 0.9999  # share of the weights that the histogram shows; a few are far outside


@dataclass(frozen=True)
class Rounding(View):
    """A format's effect on a matrix. Errors are those of single weights."""

    format: str  # int8, nf4
    bits_per_weight: float  # with the scales
    counts: list[int]  # of the dequantized weights, in the histogram's bins
    max_error: float
    rms_error: float
    snr_db: float  # 10 log10(sum of squares of the weights over that of the errors)


@dataclass(frozen=True)
class Quantization(View):
    """A weight matrix, its histogram, and what each format makes of it."""

    path: str  # of the layer in the model
    shape: tuple[int, int]
    edges: tuple[float, float]  # of the histogram's `BINS` equal bins; outer weights are left out
    counts: list[int]
    rms: float
    max: float
    roundings: list[Rounding]
    levels: list[float]  # nf4's 16, from -1 to 1; a weight is one of them times its block's scale
    level_counts: list[int]  # weights at each level
    scaled_counts: list[int]  # of the weights over their block's largest, in `BINS` from -1 to 1
    block: list[float]  # weights that share a scale in nf4: the first of the matrix
    block_nf4: list[float]  # the same after nf4
    layers: list[str]  # paths of the matrices to choose from

    def to_json(self) -> dict[str, Any]:
        """Return the view's data, with numbers of four digits."""
        return {name: _rounded(value) for name, value in super().to_json().items()}


def view_quantization(loaded: LoadedModel, path: str = "") -> Quantization:
    """Return what quantization does to a weight matrix of a loaded model's base."""
    base = files.resolve_model(loaded.recipe.model)
    return compute_quantization(base, catalog.model_dims(base), path)


def compute_quantization(base: BaseModelFiles, dims: ModelDims, path: str = "") -> Quantization:
    """Return what quantization does to the weights of the layer `path`, by default a middle one.

    Raises:
        UserError: the model has no such layer, or no safetensors to read it from.
    """
    layers = quantized_paths(dims)
    if not layers:
        raise UserError(_("bitsandbytes quantizes no layer of this model."), base.name)
    path = path or layers[len(layers) // 2]
    if path not in layers:
        what, fix = _("The model has no quantized layer {path}."), _("One of them is {example}.")
        raise UserError(what, base.name, fix, path=path, example=layers[0])
    return describe_matrix(read_weight(base, path), path, layers)


def quantized_paths(dims: ModelDims) -> list[str]:
    """Return the paths of the layers that are quantized, one layer of the decoder after another."""
    paths = []
    for layer in range(dims.layers):
        for group in dims.linears:
            if group.is_quantized and layer < group.count:
                paths.append(group.path.replace("*", str(layer), 1).replace("*", "0"))
    return paths


def read_weight(base: BaseModelFiles, path: str) -> torch.Tensor:
    """Read one matrix [outputs, inputs] from the model's safetensors, in fp32.

    Raises:
        UserError: it isn't there under the layer's name, as in a GGUF file.
    """
    from safetensors import safe_open

    for file in base.weight_files():
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, "pt") as tensors:
            # A file of the decoder alone has paths without the outermost module.
            names = [name for name in tensors.keys() if f".{path}.weight".endswith(f".{name}")]  # noqa: SIM118
            if names:
                return tensors.get_tensor(max(names, key=len)).float()
    what = _("The weights of {path} can't be read one by one from this model's files.")
    fix = _("Name a safetensors version of the model.")
    raise UserError(what, str(base.folder), fix, path=path)


def describe_matrix(weight: torch.Tensor, path: str, layers: list[str]) -> Quantization:
    """Return the histogram, the errors and an example block of a matrix [outputs, inputs].

    In nf4 each block of 64 weights is divided by its largest magnitude, and each weight becomes the
    nearest of 16 levels (Dettmers et al. 2023, QLoRA, section 3); the scales are quantized too.
    """
    fast_import.import_libraries()
    from bitsandbytes import functional

    limit = float(weight.abs().flatten().kthvalue(math.ceil(_EDGE * weight.numel())).values) or 1.0
    rms = _rms(weight)
    packed, state = functional.quantize_4bit(
        weight, blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
    )
    nf4 = functional.dequantize_4bit(packed, state)
    block_nf4 = nf4.flatten()[:_BLOCK].tolist()
    # Scales of one byte, those of 256 blocks in fp32, and their mean.
    nf4_bytes = sum(
        tensor.nbytes for tensor in (packed, state.absmax, state.state2.absmax, state.offset)
    )
    levels = packed.flatten()  # of two weights in a byte
    level_counts = (levels >> 4).int().bincount(minlength=16)
    level_counts += (levels & 15).int().bincount(minlength=16)
    level_counts[7] -= 2 * levels.numel() - weight.numel()  # level 7 is 0, which fills a last byte
    # A matrix can have gigabytes: there is one copy of it at a time.
    nf4_rounding = _describe_rounding("nf4", weight, rms, nf4, nf4_bytes, limit)
    del packed, levels, nf4
    int8_rounding = _describe_rounding("int8", weight, rms, *_int8(weight), limit)
    return Quantization(
        path=path,
        shape=(weight.shape[0], weight.shape[1]),
        edges=(-limit, limit),
        counts=_histogram(weight, limit),
        rms=rms,
        max=float(weight.abs().max()),
        roundings=[int8_rounding, nf4_rounding],
        levels=state.code.tolist(),
        level_counts=level_counts.tolist(),
        scaled_counts=_histogram(_over_largest(weight), 1.0),
        block=weight.flatten()[:_BLOCK].tolist(),
        block_nf4=block_nf4,
        layers=layers,
    )


def _over_largest(weight: torch.Tensor) -> torch.Tensor:
    """Return each weight over the largest magnitude in its block; a last part of a block is cut."""
    flat = weight.flatten()
    blocks = flat[: len(flat) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    return blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the matrix after int8 and its stored bytes: a scale for each row (absmax / 127)."""
    from bitsandbytes import functional

    values, scales, _outliers = functional.int8_vectorwise_quant(weight.half())
    restored = functional.int8_vectorwise_dequant(values, scales)
    return restored.float(), values.nbytes + scales.nbytes


def _describe_rounding(
    name: str, weight: torch.Tensor, rms: float, restored: torch.Tensor, size: int, limit: float
) -> Rounding:
    error = restored - weight
    rms_error = _rms(error)
    return Rounding(
        format=name,
        bits_per_weight=8 * size / weight.numel(),
        counts=_histogram(restored, limit),
        max_error=float(error.abs().max()),
        rms_error=rms_error,
        snr_db=20 * math.log10(rms / rms_error) if rms and rms_error else math.inf,
    )


def _rms(values: torch.Tensor) -> float:
    """Return the root of the mean square, summed in fp64, which only a part is copied to."""
    parts = values.flatten().split(_PART)
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts) / values.numel())


def _histogram(values: torch.Tensor, limit: float) -> list[int]:
    return [int(count) for count in values.histc(BINS, -limit, limit)]


def _rounded(value: Any) -> Any:
    """Return the object with each fraction cut to four digits; None for an infinite one."""
    if isinstance(value, float):
        return significant(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return value
