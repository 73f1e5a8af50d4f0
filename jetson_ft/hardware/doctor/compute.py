"""Checks of torch, the GPU and bitsandbytes: whether they compute correctly, not only load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

from jetson_ft.errors import Message, _
from jetson_ft.hardware import detect, jetpack
from jetson_ft.hardware.doctor.finding import Finding, Machine, failure, ok, warning

_GIB = 2**30
_NF4_TOLERANCE = 1e-3  # of a product, relative to the largest entry in fp64
_16_BIT_TOLERANCE = 0.02  # of a product, relative to the largest; bf16's last digit is 0.8 %
_REINSTALL = "make clean && make setup"
_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
# The published wheel is built for Arm servers (SBSA), whose symbols don't match those of JetPack 6.
_BUILD_BITSANDBYTES = (
    "git clone --depth 1 --branch {version} "
    "https://github.com/bitsandbytes-foundation/bitsandbytes && cd bitsandbytes && "
    "cmake -DCOMPUTE_BACKEND=cuda -DCOMPUTE_CAPABILITY=87 -S . && make -j4 && "
    "../.venv/bin/pip install --no-deps ."
)


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield the findings. Imports torch."""
    with warnings.catch_warnings():
        # The checks cover what torch and bitsandbytes warn about.
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            import torch
        except Exception as error:
            fix = _("`sudo apt install libopenblas0`, then `{reinstall}`")
            text, line = _("can't be loaded: {error}"), _error_line(error)
            yield failure("torch.broken", text, fix, error=line, reinstall=_REINSTALL)
            return
        yield _torch(torch, machine)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            finding = _gpu(torch)
            yield finding
            if finding.status == "failure":
                return  # bitsandbytes can't use such a GPU either
            if not getattr(torch.cuda.get_device_properties(0), "is_integrated", False):
                free, total = (size / _GIB for size in torch.cuda.mem_get_info(0))
                text = _("{free:.1f} of {total:.1f} GiB free")
                yield ok("gpu.memory", text, free=free, total=total)
        elif machine.board and torch.version.cuda:
            yield _unusable_gpu(torch)
        elif not machine.board:
            yield ok("gpu.none", _("none with CUDA; training runs on the processor"))
        yield _bitsandbytes(torch, device, machine)


def _torch(torch: Any, machine: Machine) -> Finding:
    values = {"version": torch.__version__, "cuda": torch.version.cuda or ""}
    if torch.version.cuda:
        return ok("torch.cuda", _("{version}, built for CUDA {cuda}"), **values)
    if machine.board:
        text = _("{version} is built for the processor only: the board's GPU can't be used")
        index = "https://pypi.jetson-ai-lab.io/jp6/cu126/+simple/"
        if _has_jetpack_7(machine):
            index = _CUDA_INDEX
        return failure("torch.cpu_on_board", text, f"{_REINSTALL} TORCH_INDEX={index}", **values)
    if detect.has_nvidia_driver(machine.root, machine.path):
        text = _("{version}, built for the processor only, but there is an NVIDIA GPU")
        fix = f"make setup TORCH_INDEX={_CUDA_INDEX}"
        return warning("torch.cpu_with_gpu", text, fix, **values)
    return ok("torch.cpu", _("{version}, built for the processor"), **values)


def _has_jetpack_7(machine: Machine) -> bool:
    """Return whether the board has JetPack 7, which takes PyTorch's own builds for CUDA."""
    l4t = jetpack.read_l4t(machine.root)
    return l4t is not None and l4t.major == 7


def _unusable_gpu(torch: Any) -> Finding:
    error = "torch.cuda.is_available() is false"
    try:
        torch.cuda.init()
    except Exception as exception:
        error = _error_line(exception)
    fix = _("See the lines on device files and JetPack above; then `{reinstall}`")
    text = _("can't be used: {error}")
    return failure("gpu.unusable", text, fix, error=error, reinstall=_REINSTALL)


def _gpu(torch: Any) -> Finding:
    gpu = torch.cuda.get_device_properties(0)
    built, arch = torch.cuda.get_arch_list(), f"sm_{gpu.major}{gpu.minor}"
    values = {"name": gpu.name, "sm": arch, "built": " ".join(built)}
    try:
        error = _product_error(torch, torch.bfloat16 if gpu.major >= 8 else torch.float16)
    except Exception as exception:
        values["error"] = _error_line(exception)
        text = _("{name} ({sm}) can't run this PyTorch, built for {built}: {error}")
        return failure("gpu.kernels", text, _REINSTALL, **values)
    if error > _16_BIT_TOLERANCE:
        text = _("{name} ({sm}) computes incorrectly: the error of a product is {error}")
        return failure("gpu.wrong", text, _REINSTALL, error=f"{error:.2g}", **values)
    if arch in built:
        return ok("gpu.correct", _("{name} ({sm}) computes correctly"), **values)
    # A GPU runs machine code of its own major version up to its minor version: sm_80 on an Orin.
    if {f"sm_{gpu.major}{minor}" for minor in range(gpu.minor)} & set(built):
        text = _("{name} ({sm}) computes correctly, by PyTorch's code for {built}")
        return ok("gpu.compatible", text, **values)
    text = _("{name} ({sm}) computes correctly, though PyTorch was built for {built}")
    return warning("gpu.other_arch", text, **values)


def _product_error(torch: Any, dtype: Any) -> float:
    """Return the error of a matrix product on the GPU."""
    left, right = torch.randn(64, 256), torch.randn(256, 64)
    product = (left.to("cuda", dtype) @ right.to("cuda", dtype)).float().cpu()
    return _relative_error(product, left.to(dtype).double() @ right.to(dtype).double())


def _bitsandbytes(torch: Any, device: str, machine: Machine) -> Finding:
    """Quantize, multiply and differentiate as training with nf4 does."""
    fix = _("Recipes without `quantize` work as they are.")
    values: dict[str, Any] = {"version": detect.package_version("bitsandbytes"), "device": device}
    if not values["version"]:
        return warning("bitsandbytes.missing", _("not installed: `quantize` can't be used"), fix)
    try:
        error = _nf4_error(torch, device)
        if error < _NF4_TOLERANCE:
            text = _("{version}: quantizes and multiplies nf4 correctly ({device})")
            return ok("bitsandbytes.correct", text, **values)
        text = _("the error of nf4 products is {error}")
        values["error"] = Message(text, {"error": f"{error:.2g}"})
    except Exception as exception:
        values["error"] = _error_line(exception)
    text = _("{version} can't quantize here ({device}): {error}")
    if not machine.board:
        return warning("bitsandbytes.broken", text, fix, **values)
    build = _REINSTALL if _has_jetpack_7(machine) else _BUILD_BITSANDBYTES.format(**values)
    values["build"] = build
    fix = _("Recipes without `quantize` work as they are. For 4 bits: `{build}`")
    return warning("bitsandbytes.broken_on_board", text, fix, **values)


def _nf4_error(torch: Any, device: str) -> float:
    """Return the largest error of quantized products and of their gradient.

    The reference is the same product with the dequantized weights. Infinite: the weights
    themselves are wrong.
    """
    import bitsandbytes
    from bitsandbytes import functional

    weight = torch.randn(256, 128, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    dequantized = functional.dequantize_4bit(packed, state)
    # nf4 changes normally distributed weights by about a tenth.
    if not 0.03 < float((dequantized - weight).norm() / weight.norm()) < 0.2:
        return float("inf")
    row = torch.randn(1, 128, device=device)
    rows = torch.randn(32, 128, device=device, requires_grad=True)
    # A single row without gradient, as in a chat, has a kernel of its own.
    product, products = (bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
                         for x in (row, rows))  # fmt: skip
    products.sum().backward()
    exact = dequantized.double()
    return max(
        _relative_error(product, row.double() @ exact.t()),
        _relative_error(products, rows.double() @ exact.t()),
        _relative_error(rows.grad, exact.sum(0).expand_as(rows)),
    )


def _relative_error(result: Any, exact: Any) -> float:
    """Return the largest difference, as a share of the largest entry."""
    return float((result - exact).abs().max() / exact.abs().max())


def _error_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]
