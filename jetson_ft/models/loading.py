"""Load base model and tokenizer: fp32, bf16, fp16, int8 or nf4, on CUDA or CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetson_ft.data import render_template
from jetson_ft.data.conversation import prepare_conversation
from jetson_ft.data.render_template import TemplateLimitError
from jetson_ft.data.template_files import read_template
from jetson_ft.data.templates import CHOOSE_TEMPLATE, TEMPLATES
from jetson_ft.errors import UserError, _
from jetson_ft.files import read_json
from jetson_ft.hardware.detect import Device
from jetson_ft.models import fast_import
from jetson_ft.models.files import BaseModelFiles, has_architecture
from jetson_ft.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MERGE_ADAPTER = _("Merge the adapter with the program that enlarged the vocabulary.")
_PACKED_OUTPUTS = 32  # of bitsandbytes' nf4 layers on a CPU with AVX512-BF16


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


def load_tokenizer(
    base: BaseModelFiles, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a chat template and a pad token.

    Args:
        chat_template: a recipe's `data.chat_template`; None: the tokenizer's own, or `plain`.

    Raises:
        UserError: it is missing or damaged, or has no end token; or the template is.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**_source(base))
    except Exception as error:  # the tokenizers library raises bare ones
        settings = base.folder / "tokenizer_config.json"
        if settings.is_file() and "auto_map" in read_json(settings):
            raise UserError(
                _("The tokenizer needs code from its repository, which is never run."),
                str(base.folder),
                _("Choose a model whose tokenizer transformers has itself."),
            ) from error
        fix = _("Put its files (tokenizer.json, tokenizer_config.json, …) beside the weights.")
        raise _load_error(base, error, _("The tokenizer can't be loaded: {error}"), fix) from error
    if tokenizer.eos_token is None:
        raise UserError(
            _("The tokenizer has no end token."), str(base.folder), _("Set eos_token in it.")
        )
    name = chat_template or (None if tokenizer.chat_template else "plain")
    if name:
        # Models that were trained with a start token before every text need it here too.
        start = tokenizer.bos_token_id
        has_start = start is not None and tokenizer("a")["input_ids"][0] == start
        prefix = "{{ bos_token }}" if has_start and name in TEMPLATES else ""
        tokenizer.chat_template = prefix + read_template(name)
    template = tokenizer.chat_template  # or several by name
    for text in template.values() if isinstance(template, dict) else [template]:
        if not isinstance(text, str):
            what = _("The chat template is not text.")
            raise UserError(what, str(base.folder), CHOOSE_TEMPLATE)
        render_template.check_size(len(text), str(base.folder))
    with suppress(ValueError):  # several without a default: the rendering reports that
        render_template.prepare(str(tokenizer.get_chat_template()))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(base: BaseModelFiles) -> PretrainedConfig:
    """Return the model's config, of a GGUF file too.

    Raises:
        UserError: it is missing, damaged, or of an architecture that transformers doesn't have.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(**_source(base))
        # transformers' default: what a config names could load kernels of others from the Hub.
        config._attn_implementation = config._experts_implementation = None
        return config
    except Exception as error:  # a config's class checks the types of its values, in its own ways
        path = base.folder / "config.json"
        config = read_json(path) if path.is_file() and not base.gguf_file else {}
        model_type = config.get("model_type") if isinstance(config, dict) else None
        if model_type and not has_architecture(model_type):
            raise UserError(
                _("The model can't be loaded: transformers {version} has no architecture {name}."),
                str(base.folder),
                _("Update it (`pip install -U transformers`), or choose another model."),
                version=transformers.__version__,
                name=json.dumps(model_type),
            ) from error
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
    except (OSError, ValueError, LookupError, ImportError, AttributeError, TypeError) as error:
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
    _repair_quantized_layers(model)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers 5.20, which JetPack 6's Python is limited to, drops the soft cap elsewhere.
        model.set_attn_implementation("eager")
    # While replies are written, the head's input is the last position of each row, with strides.
    # For such an input PyTorch's `linear` on a CPU copies the whole weight matrix for each row.
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return model.eval()


def _repair_quantized_layers(model: PreTrainedModel) -> None:
    """Let bitsandbytes' layers (0.50) evaluate where they would raise an error.

    Before the first reply on a CPU with AVX512-BF16, nf4 layers are packed: 32 outputs together,
    with whole blocks of a row's weights. Layers of another shape are excluded from that.
    int8 layers take inputs of at most three dimensions; DeepSeek's attention has four.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            block = module.weight.quant_state.blocksize
            fits = module.out_features % _PACKED_OUTPUTS == 0 and module.in_features % block == 0
            module.support_avx512bf16_for_cpu = fits
        elif type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_flat_forward, module.forward)


def _flat_forward(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """[..., in] to [..., out], by a function for at most three dimensions."""
    if x.ndim <= 3:
        return forward(x)
    return forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    base: BaseModelFiles,
    adapter: Path | None = None,
    texts: Iterable[Iterable[int]] = (),
) -> None:
    """Check that the embedding, of `rows` rows, has one for each token that any text can have.

    Added tokens that neither the chat template nor the tokenizer puts into a text may be without
    one: Gemma 3's tokenizer has a token for images, also beside models without it.

    Args:
        adapter: the folder of the adapter that the tokenizer or its template is from.
        texts: token ids of texts that the model will read.

    Raises:
        UserError: it has not, or the chat template passes a bound.
    """
    ids = [tokenizer.vocab_size - 1, tokenizer.eos_token_id, tokenizer.pad_token_id]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    try:
        text = prepare_conversation(tokenizer, messages, "").render()
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    except TemplateLimitError:
        raise
    except UserError:  # a template that refuses these messages may take those of the rows
        pass
    if len(tokenizer) > rows:  # else no text has such a token
        ids += [max(text, default=0) for text in texts]
    if max(ids) >= rows:
        fix = _("Download tokenizer and weights again, from one place.")
        raise UserError(
            _("The tokenizer has {tokens:,} tokens, but the model's embedding only {rows:,} rows."),
            str(adapter or base.folder),
            MERGE_ADAPTER if adapter else fix,
            tokens=max(len(tokenizer), max(ids) + 1),
            rows=rows,
        )


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
    options["config"] = load_config(base)  # without its choice of kernels
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
