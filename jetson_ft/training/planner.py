"""How a step is cut into micro-batches and whether activations are recomputed.

Both change memory and speed, never the result: which rows form a step is the recipe's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from jetson_ft.device.probe import Device

# Below this much free memory on a GPU, activations of a 1.3 B model are recomputed.
_ROOMY = 10 * 2**30


@dataclass(frozen=True)
class Plan:
    """Choices for one device; may differ between attempts of the same run."""

    micro_batch_tokens: int
    checkpointing: bool
    peak_memory_bytes: int | None = None
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For `plan.json`."""
        return asdict(self)


def choose(device: Device, tokens_per_step: int, packing: bool) -> Plan:
    """Micro-batch size and checkpointing for this device."""
    tight = device.kind == "cuda" and device.memory_available < _ROOMY
    return Plan(
        micro_batch_tokens=min(1024, tokens_per_step) if packing else 0,
        checkpointing=tight,
    )
