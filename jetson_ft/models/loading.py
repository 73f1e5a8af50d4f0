"""Load base model and tokenizer: fp32, bf16, fp16, int8 or nf4, on CUDA or CPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError, _
from jetson_ft.hardware.detect import Device
from jetson_ft.models import fast_import
from jetson_ft.models.files import BaseModelFiles
from jetson_ft.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# GPT-2 style base models have no chat format; this one is plain text whose end token is
# supervised, so that the model learns to stop.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class WeightFormat:
    """The number formats of the frozen weights."""

    precision: str  # fp32, bf16, fp16: arithmetic, and format of what is not quantized
    quantize: str = "none"  # none, int8, nf4
    double_quantize: bool = True

    @property
    def bytes_per_number(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def dtype(self) -> torch.dtype:
        import torch

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes[self.precision]

    def __str__(self) -> str:
        return self.precision if self.quantize == "none" else f"{self.quantize}/{self.precision}"


def weight_format(recipe: Recipe, device: Device) -> WeightFormat:
    """Return the format in which the device would hold the recipe's frozen weights."""
    return WeightFormat(device.precision(recipe.precision), recipe.quantize, recipe.double_quantize)


def load_tokenizer(base: BaseModelFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template (else `PLAIN_TEMPLATE`) and a pad token.

    Raises:
        UserError: it is missing or damaged, or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**_source(base))
    except Exception as error:  # the tokenizers library raises bare ones
        fix = _("Put its files (tokenizer.json, tokenizer_config.json, …) beside the weights.")
        raise _load_error(base, error, _("The tokenizer can't be loaded: {error}"), fix) from error
    if tokenizer.eos_token is None:
        raise UserError(
            _("The tokenizer has no end token."), str(base.folder), _("Set eos_token in it.")
        )
    if not tokenizer.chat_template:
        # Models that were trained with a start token before every text need it here too.
        start = tokenizer.bos_token_id
        has_start = start is not None and tokenizer("a")["input_ids"][0] == start
        tokenizer.chat_template = ("{{ bos_token }}" if has_start else "") + PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: BaseModelFiles) -> PretrainedConfig:
    """Return the model's config, of a GGUF file too."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**_source(base))
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(base, error) from error


def load_model(base: BaseModelFiles, weights: WeightFormat, device: str) -> PreTrainedModel:
    """Return the frozen base model on `device` ("cuda" or "cpu"), in evaluation mode.

    Raises:
        UserError: its files are damaged, pickled, or of an architecture that can't be used.
    """
    fast_import.import_libraries()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # for PEFT
    # PyTorch's own attention kernels: cuDNN's plans each new length anew, which took a tenth of a
    # second for each row of a new length on an H100.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(**_options(base, weights, device))
    except SafetensorError as error:
        what = _("The model's weights are damaged or cut off: {error}")
        fix = _("Delete the file and download it again.")
        raise _load_error(base, error, what, fix) from error
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(base, error) from error
    # transformers would fill these with random numbers.
    faulty = [*info["missing_keys"], *(key for key, *_shapes in info["mismatched_keys"])]
    if faulty:
        raise UserError(
            _(
                "{count} of the model's tensors are missing from its weights, or have another "
                "shape than in its config; {example} is one."
            ),
            str(base.folder),
            _("Download the weights and config.json again, from one place."),
            count=len(faulty),
            example=min(faulty),
        )
    model.requires_grad_(False)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers 5.20, which JetPack 6's Python is limited to, drops the soft cap elsewhere.
        model.set_attn_implementation("eager")
    # While replies are written, the head's input is the last position of each row, with strides.
    # For such an input PyTorch's `linear` on a CPU copies the whole weight matrix for each row.
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return model.eval()


def _options(base: BaseModelFiles, weights: WeightFormat, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`."""
    import torch
    from transformers import BitsAndBytesConfig, GgufConfig

    options = _source(base) | {
        "dtype": weights.dtype(),
        # Never "auto": on a board with shared memory it has put layers on the CPU.
        "device_map": {"": torch.device(device, 0) if device == "cuda" else device},
        # `load_model` checks the loading info; transformers would raise a RuntimeError.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if base.gguf_file:
        if weights.quantize != "none":
            raise UserError(
                _("A GGUF file can't be loaded as {format}."),
                str(base.folder / base.gguf_file),
                _("Write `quantize: none`, or name a safetensors version of the model."),
                format=weights.quantize,
            )
        return options | {"quantization_config": GgufConfig(dequantize=True)}
    options["use_safetensors"] = True  # never a pickle beside them
    if weights.quantize != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=weights.quantize == "int8",
            load_in_4bit=weights.quantize == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=weights.double_quantize,
            bnb_4bit_compute_dtype=weights.dtype(),
        )
    return options


def _source(base: BaseModelFiles) -> dict[str, Any]:
    # Without trust_remote_code, transformers prompts in the terminal before it runs foreign code.
    source = {"pretrained_model_name_or_path": base.folder, "trust_remote_code": False}
    return source | ({"gguf_file": base.gguf_file} if base.gguf_file else {})


def _load_error(base: BaseModelFiles, error: Exception, what: str = "", fix: str = "") -> UserError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    what = what or _("The model can't be loaded: {error}")
    return UserError(what, str(base.folder), fix, error=first_line)


def bytes_per_part(model: Any) -> dict[str, int]:
    """Return the bytes of the weights: embedding (tied head too), head, linear, adapter, other."""
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {"embedding": 0, "head": 0, "linear": 0, "adapter": 0, "other": 0}
    for name, parameter in model.named_parameters():  # each once
        module = model.get_submodule(name.rpartition(".")[0])
        if "lora_" in name:
            part = "adapter"
        elif module is embedding:
            part = "embedding"
        elif module is head:
            part = "head"
        else:
            part = "linear" if isinstance(module, torch.nn.Linear) else "other"
        tensors = [parameter, getattr(parameter, "SCB", None)]  # SCB: int8's scales
        if state := getattr(parameter, "quant_state", None):
            tensors += [state.absmax, state.state2.absmax if state.nested else None]
        parts[part] += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return parts
