"""Splitting the frozen layers among processes, for a model that outgrows each one's memory.

torch's FSDP keeps a part of each layer in every process and puts the layer together for as long
as it is computed (Rajbhandari et al. 2020, ZeRO, stage 3). The adapter stays whole everywhere:
its gradients are added up, stored and exported as ever. A layer is put together by all processes
at once, so all must make the same number of passes; who has nothing to compute makes idle ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jetson_ft.data.template import END
from jetson_ft.errors import UserError
from jetson_ft.models.packing import Pack, pack
from jetson_ft.training.group import Group


def split(model: Any, group: Group, device: str) -> None:
    """Leaves this process its part of each layer of a PEFT model, in place.

    Raises:
        UserError: the model's layers are not found.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (group.size,))
    for layer in _layers(model):
        trained = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


def _layers(model: Any) -> Sequence[Any]:
    from torch.nn import ModuleList

    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, ModuleList) and len(module) == count:
            return list(module)
    raise UserError(
        f"The layers of {type(model.get_base_model()).__name__} can't be split among processes.",
        fix="Choose a model that fits into each machine's memory.",
    )


def idle_pack() -> Pack:
    """Two tokens that count in no measure; a training adds their loss times zero."""
    return pack([{"input_ids": [0, 0], "parts": [0, END]}])
