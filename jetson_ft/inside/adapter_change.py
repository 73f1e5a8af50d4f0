"""What an adapter changed: the size of each layer's update, and how many directions it uses.

A LoRA update is scale · B A, of rank r at most. Its norm and singular values follow from the small
factors: with B = Q_b R_b and Aᵀ = Q_a R_a (QR), they are those of the r x r matrix
scale · R_b R_aᵀ. The matrix in the layer's full size is never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _
from jetson_ft.inside.model import LoadedModel, View, significant

if TYPE_CHECKING:
    import torch

_ENERGY = 0.9  # share of the sum of squares


@dataclass(frozen=True)
class LayerChange(View):
    """The update of one linear layer."""

    path: str
    layer: int  # number of its decoder layer
    target: str  # q_proj, …
    relative_norm: float  # Frobenius norm of scale · BA over that of the base's weights
    norm: float
    singular_values: list[float]  # of scale · BA, largest first
    effective_rank: float
    rank_90: int  # singular values that hold 90 % of the sum of squares

    @property
    def rank(self) -> int:
        return len(self.singular_values)


@dataclass(frozen=True)
class AdapterChange(View):
    """The updates of all layers with an adapter."""

    layers: list[LayerChange]
    targets: list[str]
    rank: int
    scale: float  # alpha / r, or alpha / sqrt(r) with rank stabilisation
    is_dora: bool  # the rows' lengths are changed too, which isn't counted
    mean_effective_rank: float


def view_adapter(loaded: LoadedModel) -> AdapterChange:
    """Return what the adapter of a loaded model changes."""
    return compute_adapter_change(loaded.model, loaded.adapter_name if loaded.has_adapter else "")


def compute_adapter_change(model: Any, name: str = "default") -> AdapterChange:
    """Return what an adapter of a PEFT model changes, in fp32, one layer at a time.

    Args:
        name: of the adapter, among those that the model has.

    Raises:
        UserError: the model has no such adapter.
    """
    changes, scales, is_dora = [], [], False
    for path, module in model.named_modules():
        if name not in getattr(module, "lora_A", ()):
            continue
        scales.append(float(module.scaling[name]))
        is_dora = is_dora or bool(getattr(module, "use_dora", {}).get(name))
        values = singular_values(module.lora_B[name].weight, module.lora_A[name].weight, scales[-1])
        norm = float(values.square().sum().sqrt())
        base_norm = _weight_norm(module.get_base_layer())
        path = path.removeprefix("base_model.model.")
        numbers = [int(part) for part in path.split(".") if part.isdecimal()]
        changes.append(
            LayerChange(
                path=path,
                layer=numbers[0] if numbers else 0,
                target=path.rpartition(".")[2],
                relative_norm=significant(norm / base_norm) if base_norm else 0.0,
                norm=significant(norm),
                singular_values=[significant(value) for value in values],
                effective_rank=significant(effective_rank(values)),
                rank_90=rank_of_energy(values, _ENERGY),
            )
        )
    if not changes:
        what, fix = _("The model has no adapter."), _("Name a run, or an adapter's folder.")
        raise UserError(what, fix=fix)
    return AdapterChange(
        layers=changes,
        targets=list(dict.fromkeys(change.target for change in changes)),
        rank=max(change.rank for change in changes),
        scale=scales[0],
        is_dora=is_dora,
        mean_effective_rank=significant(
            sum(change.effective_rank for change in changes) / len(changes)
        ),
    )


def singular_values(b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the singular values of scale · BA, largest first; B is [outputs, r], A [r, inputs]."""
    import torch

    r_b = torch.linalg.qr(b.detach().float(), mode="r").R
    r_a = torch.linalg.qr(a.detach().float().T, mode="r").R
    values: torch.Tensor = scale * torch.linalg.svdvals(r_b @ r_a.T)
    return values.cpu()


def effective_rank(values: torch.Tensor) -> float:
    """Return exp(-sum p ln p) with p the values over their sum (Roy & Vetterli 2007).

    It is r for r equal values, 1 for a single one, and 0 where all are 0.
    """
    import torch

    total = values.sum()
    if total <= 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


def rank_of_energy(values: torch.Tensor, share: float) -> int:
    """Return how many of the largest values have this share of the sum of squares; 0 for zeros."""
    energy = values.square().cumsum(0)
    if energy[-1] <= 0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1


def _weight_norm(layer: Any) -> float:
    """Return the Frobenius norm of a layer's weights; quantized ones are dequantized for it."""
    from peft.utils.integrations import dequantize_module_weight

    return float(dequantize_module_weight(layer).detach().float().norm())
