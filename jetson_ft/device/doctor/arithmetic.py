"""torch, the GPU and bitsandbytes: not whether they load, but whether they compute right."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from jetson_ft.device.doctor.finding import Finding, Machine, failure, ok, warning

_GIB = 2**30
_TOLERANCE = 1e-3  # of a product against the same in fp64, by its largest entry


def examine(machine: Machine) -> Iterator[Finding]:
    """Imports torch."""
    with warnings.catch_warnings():
        # What torch and bitsandbytes warn of is looked at here.
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        yield from _examine(machine)


def _examine(machine: Machine) -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield failure("torch.broken", error=_line(error))
        return
    yield _torch(torch, machine)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        found = [*_gpu(torch)]
        yield from found
        if any(one.status == "failure" for one in found):
            return  # a GPU whose kernels fail can't be used for anything more
    elif machine.board and torch.version.cuda:
        yield failure("gpu.unusable", error=_why(torch))
    elif not machine.board:
        yield ok("gpu.none")
    yield _bitsandbytes(torch, device, machine)


def _torch(torch: Any, machine: Machine) -> Finding:
    values = {"version": torch.__version__, "cuda": torch.version.cuda or ""}
    if torch.version.cuda:
        return ok("torch.cuda", **values)
    if machine.board:
        return failure("torch.cpu_on_board", **values)
    if shutil.which("nvidia-smi", path=machine.path):
        return warning("torch.cpu_with_gpu", **values)
    return ok("torch.cpu", **values)


def _why(torch: Any) -> str:
    """What the driver says."""
    try:
        torch.cuda.init()
    except Exception as error:
        return _line(error)
    return "torch.cuda.is_available() is false"


def _gpu(torch: Any) -> Iterator[Finding]:
    properties = torch.cuda.get_device_properties(0)
    built = torch.cuda.get_arch_list()
    own = f"sm_{properties.major}{properties.minor}"
    values = {"name": properties.name, "sm": own, "built": " ".join(built)}
    try:
        wrong = _error_of_product(torch, torch.bfloat16 if properties.major >= 8 else torch.float16)
    except Exception as error:
        yield failure("gpu.kernels", error=_line(error), **values)
        return
    if wrong > 0.02:  # of 16-bit numbers, whose last digit is 0.8 %
        yield failure("gpu.wrong", error=f"{wrong:.2g}", **values)
        return
    yield ok("gpu.right", **values) if own in built else warning("gpu.other_arch", **values)
    if not getattr(properties, "is_integrated", False):
        free, total = torch.cuda.mem_get_info(0)
        yield ok("gpu.memory", free=f"{free / _GIB:.1f}", total=f"{total / _GIB:.1f}")


def _error_of_product(torch: Any, dtype: Any) -> float:
    """Of a matrix product on the GPU against the processor's, by the largest entry."""
    first, second = torch.randn(64, 256), torch.randn(256, 64)
    theirs = (first.to("cuda", dtype) @ second.to("cuda", dtype)).float().cpu()
    exact = first.to(dtype).double() @ second.to(dtype).double()
    return _off(theirs, exact)


def _bitsandbytes(torch: Any, device: str, machine: Machine) -> Finding:
    """What training in nf4 does: quantise, multiply, and go back through the product."""
    version = _version()
    values = {"version": version, "device": device}
    if not version:
        return warning("bitsandbytes.missing", **values)
    key = "bitsandbytes.broken_on_board" if machine.board else "bitsandbytes.broken"
    try:
        wrong = _error_of_nf4(torch, device)
    except Exception as error:
        return warning(key, error=_line(error), **values)
    if not wrong < _TOLERANCE:
        return warning(key, error=f"nf4 products are off by {wrong:.2g}", **values)
    return ok("bitsandbytes.right", **values)


def _error_of_nf4(torch: Any, device: str) -> float:
    """Of the quantised product, one row and many, and of its gradient, against the same with the
    weights put back; by the largest entry. Infinite if quantising itself has gone wrong."""
    import bitsandbytes
    from bitsandbytes import functional

    weight = torch.randn(256, 128, device=device)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = functional.dequantize_4bit(packed, state)
    # Of normally distributed weights nf4 misses about a tenth.
    if not 0.03 < float((plain - weight).norm() / weight.norm()) < 0.2:
        return float("inf")
    one = torch.randn(1, 128, device=device)
    many = torch.randn(32, 128, device=device, requires_grad=True)
    # One row without a gradient, as in a chat, is multiplied by a kernel of its own.
    product, products = (bitsandbytes.matmul_4bit(rows, packed.t(), quant_state=state)
                         for rows in (one, many))  # fmt: skip
    products.sum().backward()
    exact = plain.double()
    return max(
        _off(product, one.double() @ exact.t()),
        _off(products, many.double() @ exact.t()),
        _off(many.grad, exact.sum(0).expand_as(many)),
    )


def _off(found: Any, exact: Any) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def _version() -> str:
    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return ""


def _line(error: Exception) -> str:
    """The first line of what it says, for one line of ours."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]
