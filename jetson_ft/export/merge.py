"""Merge an adapter into its unquantised base model: a folder that transformers loads.

The base is read in the format of its files, which are mapped into memory: the system can drop these
pages again. One decoder layer at a time is converted to fp32, merged by PEFT, cast once, and held
until a file is full. So peak memory is that of the adapter, a layer and a file, not of the model.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft import adapter
from jetson_ft.data.chat_template import end_ids
from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors, write_json
from jetson_ft.models import loading
from jetson_ft.models.dims import ModelDims
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.models.loading import WeightFormat
from jetson_ft.training.checkpoint import safetensors_errors

if TYPE_CHECKING:
    import torch

MergeProgress = Callable[[int, int], None]  # (bytes written, bytes in all)
SHARD_BYTES = 10**9  # of a file of weights, and of what is held until it is written
_LAYER = re.compile(r"(.*?\.\d+)\.")
_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def stored_format(base: BaseModelFiles) -> WeightFormat:
    """Return the narrowest format that holds all tensors of the base's files exactly.

    A GGUF file is fp32: transformers converts what is quantised in it.
    """
    from safetensors import safe_open

    if base.gguf_file:
        return WeightFormat("fp32")
    formats = set()
    for path in base.weight_files():
        with safe_open(path, "pt") as tensors:
            formats |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    formats &= {*_FORMATS}  # integers are no weights
    return WeightFormat(_FORMATS[formats.pop()] if len(formats) == 1 else "fp32")


def merge_memory(base: BaseModelFiles, adapter_dir: Path, dims: ModelDims, dtype: str) -> int:
    """Return the bytes that `merge_adapter` allocates at most, without libraries."""
    parameters = dims.parameters * (4 if base.gguf_file else 0)  # which is no mapped file
    part = max(dims.embedding_parameters, dims.parameters // dims.layers)
    number = WeightFormat(dtype).bytes_per_number
    weights = (adapter_dir / adapter.WEIGHTS_FILE).stat().st_size
    file = min(SHARD_BYTES, number * dims.parameters)
    # A layer in fp32 and its update, the tensors cast, and a full file before them.
    return parameters + 2 * weights + part * (4 + 4 + number) + file


def merge_adapter(
    base: BaseModelFiles,
    adapter_dir: Path,
    out: Path,
    dtype: str,
    on_progress: MergeProgress = lambda done, total: None,
    *,
    apply: bool = True,
) -> int:
    """Write the merged model with tokenizer, chat template and configs into the folder `out`.

    Return the number of its parameters.

    Args:
        dtype: of the written weights: bf16, fp16 or fp32.
        apply: False writes the base itself with the adapter's tokenizer, for a program that adds
            the adapter while it computes.

    Raises:
        UserError: the adapter isn't the base's, parts of it don't fit the model, a weight is too
            large for fp16, or the disk is full.
    """
    tokenizer = adapter.load_tokenizer(base, adapter_dir)
    model = loading.load_model(base, stored_format(base), "cpu")
    loading.check_vocabulary(tokenizer, len(model.get_input_embeddings().weight), base, adapter_dir)
    names, weights = list(model.state_dict()), WeightFormat(dtype)
    total = weights.bytes_per_number * sum(part.numel() for part in model.parameters())
    if apply:
        _require_all_tensors(adapter.load_adapter(model, base, adapter_dir), adapter_dir)
    with disk_errors(out), safetensors_errors():
        out.mkdir(exist_ok=True)
        parts = _merged_parts(model, names, weights.dtype())
        parameters = _write_shards(parts, out, lambda done: on_progress(done, total))
        _write_small_files(model, tokenizer, (adapter_dir, base.folder), out, weights)
    return parameters


def _require_all_tensors(peft_model: Any, folder: Path) -> None:
    """Refuse an adapter with tensors that the model has no place for: PEFT passes over them."""
    loaded = peft_model.load_adapter(str(folder), peft_model.active_adapter)
    if keys := sorted([*loaded.unexpected_keys, *loaded.missing_keys]):
        raise UserError(
            _("{count} of the adapter's tensors don't fit the model, or are missing; {example} is "
              "one."),
            str(folder),
            _("Merge the adapter with the program that made it."),
            count=len(keys),
            example=keys[0],
        )  # fmt: skip


def _merged_parts(
    model: Any, names: list[str], dtype: torch.dtype
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of the merged model as they are named in files, a layer at a time.

    Args:
        model: the base model, with an adapter attached in place; it is used up.
        names: its tensors before that.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers.core_model_loading import revert_weight_conversion

    adapted: list[str] = []  # paths of PEFT's modules, the outermost ones
    for path, module in model.named_modules():
        is_peft = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if is_peft and not any(path.startswith(f"{outer}.") for outer in adapted):
            adapted.append(path)
    tied = dict(model.all_tied_weights_keys)  # name of the copy -> name of the original
    for copy, original in list(tied.items()):
        paths = {
            path for name in (copy, original) for path in adapted if name.startswith(f"{path}.")
        }
        for path in paths:
            _merge_module(model, path)
            adapted.remove(path)
        if paths and not model.get_parameter(copy).equal(model.get_parameter(original)):
            del tied[copy]
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False

    def part_of(name: str) -> str:
        layer = _LAYER.match(name)
        return layer[1] if layer else name.rpartition(".")[0]

    for part, group in itertools.groupby(names, part_of):
        for path in adapted:
            if f"{path}.".startswith(f"{part}.") or part.startswith(f"{path}."):
                _merge_module(model, path)
        adapted = [path for path in adapted if not f"{path}.".startswith(f"{part}.")]
        module, tensors = model.get_submodule(part), {}
        stored = {f"{part}.{name}".lstrip("."): t for name, t in module.state_dict().items()}
        for name in group:
            if name not in tied:
                tensors[name] = _cast(stored[name], dtype, name)
        yield revert_weight_conversion(model, tensors)
        if part:
            module.to("meta")  # frees it
    assert not adapted, f"not merged: {adapted}"


def _merge_module(model: Any, path: str) -> None:
    """Replace PEFT's module by the layer that it wraps, merged in fp32."""
    import torch

    parent_path, _dot, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = parent.get_submodule(name)
    for child in module.modules():
        for key, parameter in child.named_parameters(recurse=False):
            # A copy: tied weights belong to another layer too.
            exact = parameter.to(torch.float32, copy=True)
            setattr(child, key, torch.nn.Parameter(exact, requires_grad=False))
    if hasattr(module, "unload_and_optionally_merge_module"):
        merged = module.unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
    else:
        module.merge()
        merged = module.get_base_layer()
    setattr(parent, name, merged)


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype).contiguous()
    if not cast.isfinite().all():
        raise UserError(
            _("The merged model has weights that are not finite as {format}; {name} has one."),
            fix=_("Choose bf16, which has the range of fp32; if that fails too, the adapter is "
                  "damaged."),
            format=str(dtype).removeprefix("torch."),
            name=name,
        )  # fmt: skip
    return cast


def _write_shards(
    parts: Iterable[dict[str, torch.Tensor]], out: Path, on_progress: Callable[[int], None]
) -> int:
    """Write safetensors of about `SHARD_BYTES` and their index; return the number of parameters."""
    from safetensors.torch import save_file

    shards: list[dict[str, int]] = []  # of each file: parameters by name
    shard: dict[str, torch.Tensor] = {}
    written = 0

    def flush() -> None:
        nonlocal shard
        save_file(shard, out / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.numel() for name, tensor in shard.items()})
        shard = {}
        on_progress(written)

    on_progress(0)
    held = 0
    for part in parts:
        size = sum(tensor.nbytes for tensor in part.values())
        if shard and held + size > SHARD_BYTES:
            flush()
            held = 0
        # A tensor that shares memory with another, or is a view of one, can't be stored.
        shard |= {name: tensor.contiguous() for name, tensor in part.items()}
        held, written = held + size, written + size
    flush()
    weight_map: dict[str, str] = {}
    count = len(shards)
    for number, names in enumerate(shards):
        file = (
            f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        )
        (out / f"part-{number}").rename(out / file)
        weight_map |= dict.fromkeys(names, file)
    parameters = sum(sum(names.values()) for names in shards)
    if count > 1:
        metadata = {"total_parameters": parameters, "total_size": written}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_json(out / "model.safetensors.index.json", index)
    return parameters


def _write_small_files(
    model: Any, tokenizer: Any, sources: Iterable[Path], out: Path, weights: WeightFormat
) -> None:
    """Write configs and tokenizer.

    Args:
        sources: folders whose `tokenizer.model` some converters need beside `tokenizer.json`.
    """
    config, generation = model.config, model.generation_config
    config.dtype = config.get_text_config().dtype = weights.dtype()
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    # A reply ends at the chat template's end of turn too, in every program that reads this.
    ends = end_ids(tokenizer, model)
    generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    generation.to_json_file(out / "generation_config.json")
    tokenizer.save_pretrained(out)
    for source in sources:
        file = source / "tokenizer.model"
        if file.is_file() and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
