"""Base model and tokenizer into memory: fp32, bf16, fp16, int8 or nf4, on CUDA or CPU."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jetson_ft.errors import UserError
from jetson_ft.models import libraries
from jetson_ft.models.resolve import Base

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
class Weights:
    """How the frozen weights are kept."""

    precision: str  # fp32, bf16, fp16: arithmetic, and format of what is not quantised
    quantize: str = "none"  # none, int8, nf4
    double_quantize: bool = True

    def dtype(self) -> torch.dtype:
        """The torch type of the arithmetic."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            self.precision
        ]

    def __str__(self) -> str:
        return self.precision if self.quantize == "none" else f"{self.quantize}/{self.precision}"


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer with a chat template (its own, else `PLAIN_TEMPLATE`) and a pad token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, trust_remote_code=False, **_gguf(base)
        )
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(
            f"The tokenizer can't be loaded: {_first_line(error)}",
            str(base.folder),
            "Its files (tokenizer.json, tokenizer_config.json, …) lie beside the weights.",
        ) from error
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no end token.", str(base.folder), "Set eos_token in it.")
    if not tokenizer.chat_template:
        tokenizer.chat_template = _opening(tokenizer) + PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _opening(tokenizer: Any) -> str:
    """The start token for models that were trained with one before every text."""
    start = tokenizer.bos_token_id
    opens = start is not None and tokenizer("a")["input_ids"][0] == start
    return "{{ bos_token }}" if opens else ""


def load_config(base: Base) -> PretrainedConfig:
    """The model's config, of a GGUF file too.

    Raises:
        UserError: it is damaged, or of an architecture that can't be used.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base.folder, trust_remote_code=False, **_gguf(base))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The model can't be loaded: {_first_line(error)}", str(base.folder)
        ) from error


def load_model(base: Base, weights: Weights, device: str) -> PreTrainedModel:
    """The frozen base model on `device` ("cuda" or "cpu"), in evaluation mode.

    Raises:
        UserError: its files are damaged, pickled, or of an architecture that can't be used.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    libraries.load()
    _quieten()
    _leave_out_cudnn()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            base.folder, **_options(base, weights, device)
        )
    except SafetensorError as error:
        raise UserError(
            f"The model's weights are damaged or cut off: {_first_line(error)}",
            str(base.folder),
            "Delete the file and fetch it again.",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The model can't be loaded: {_first_line(error)}", str(base.folder)
        ) from error
    _require_all(base, found)
    model.requires_grad_(False)
    _straighten_for_head(model)
    return model.eval()


def _straighten_for_head(model: PreTrainedModel) -> None:
    """Lays the head's input out contiguously.

    While replies are written it is the last position of each row, with strides, and for such an
    input PyTorch's `linear` on a CPU copies the whole weight matrix once for each row.
    """
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _leave_out_cudnn() -> None:
    """Attention by PyTorch's own kernels: cuDNN's makes itself a plan for each new length.

    On an H100 that took a tenth of a second for each row of a length that hadn't been met.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def _quieten() -> None:
    """What the libraries say to programmers is not for the person at the screen.

    A bar for the seconds that weights take, and what PEFT calls that transformers will rename.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


def _require_all(base: Base, found: dict[str, Any]) -> None:
    """Refuses what transformers would fill with random numbers."""
    faulty = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    if faulty:
        raise UserError(
            f"{len(faulty)} of the model's tensors are missing from its weights, or of another "
            f"shape than its config says; {min(faulty)} is one.",
            str(base.folder),
            "Fetch the weights and config.json again, from one place.",
        )


def _options(base: Base, weights: Weights, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told."""
    import torch
    from transformers import GgufConfig

    options: dict[str, Any] = {
        "dtype": weights.dtype(),
        # Never "auto": on a board with one memory it has sent layers to the CPU.
        "device_map": {"": torch.device(device, 0) if device == "cuda" else device},
        # Else it asks in the terminal whether a repository's own code may run.
        "trust_remote_code": False,
        # Told afterwards (see `_require_all`), not raised among others' RuntimeErrors.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if base.gguf_file:
        if weights.quantize != "none":
            raise UserError(
                f"A GGUF file can't be loaded as {weights.quantize}.",
                str(base.folder / base.gguf_file),
                "Write `quantize: none`, or name a safetensors version of the model.",
            )
        return options | _gguf(base) | {"quantization_config": GgufConfig(dequantize=True)}
    options["use_safetensors"] = True  # never a pickle that lies beside them
    if weights.quantize != "none":
        options["quantization_config"] = _quantization(weights)
    return options


def _quantization(weights: Weights) -> Any:
    from transformers import BitsAndBytesConfig

    if weights.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=weights.double_quantize,
        bnb_4bit_compute_dtype=weights.dtype(),
    )


def _gguf(base: Base) -> dict[str, str]:
    return {"gguf_file": base.gguf_file} if base.gguf_file else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def bytes_per_part(model: Any) -> dict[str, int]:
    """Bytes of the weights by part: embedding, head, linear, adapter, other.

    A tied head is the embedding and is counted there alone.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {"embedding": 0, "head": 0, "linear": 0, "adapter": 0, "other": 0}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if "lora_" in f"{module_name}.{name}":
                part = "adapter"
            elif module is embedding:
                part = "embedding"
            elif module is head:
                part = "head"
            else:
                part = "linear" if isinstance(module, torch.nn.Linear) else "other"
            parts[part] += parameter.numel() * parameter.element_size() + _state_bytes(parameter)
    return parts


def _state_bytes(parameter: Any) -> int:
    """Bytes of the scales that bitsandbytes keeps beside a quantised weight."""
    total = 0
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        total += state.absmax.numel() * state.absmax.element_size()
        if state.nested:
            total += state.state2.absmax.numel() * state.state2.absmax.element_size()
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        total += scales.numel() * scales.element_size()
    return total
