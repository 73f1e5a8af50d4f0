"""The process of llama.cpp's server: `python -m jetson_ft.export.llama_process`.

Standard input is a JSON object with the settings (`llama.LlamaServer`). With a `program` the
process becomes that `llama-server`; without one it runs xllamacpp's. It ends with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from jetson_ft.child_process import end_with_parent
from jetson_ft.export.llama import HOST


def main() -> None:
    """Serve until the process is ended."""
    end_with_parent()
    settings = json.load(sys.stdin)
    if settings["program"]:
        os.environ["LLAMA_API_KEY"] = settings["api_key"]
        program = settings["program"]
        os.execv(program, [program, *program_arguments(settings)])  # noqa: S606
    _serve(settings)


def program_arguments(settings: dict[str, Any]) -> list[str]:
    """Return the arguments of `llama-server` for what `_serve` sets by attributes."""
    arguments = {
        "--model": settings["model"],
        "--host": HOST, "--port": settings["port"],
        "--ctx-size": settings["n_ctx"], "--parallel": settings["n_parallel"],
        "--threads": settings["threads"], "--cache-ram": 0, "--reasoning-format": "none",
    }  # fmt: skip
    if settings["lora"]:
        csv_fields = ['"{}"'.format(path.replace('"', '""')) for path in settings["lora"]]
        arguments["--lora"] = ",".join(csv_fields)
    words = [str(word) for pair in arguments.items() for word in pair]
    return [*words, "--lora-init-without-apply", "--no-slots", "--no-ui", "--offline", "--jinja"]


def _serve(settings: dict[str, Any]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames, params.port = [HOST], settings["port"]
    params.api_keys = [settings["api_key"]]
    params.n_ctx, params.n_parallel = settings["n_ctx"], settings["n_parallel"]
    params.cpuparams.n_threads = settings["threads"]
    adapters = []
    for path in settings["lora"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 1.0
        adapters.append(adapter)
    params.lora_adapters = adapters
    params.lora_init_without_apply = True
    params.endpoint_slots = params.ui = False
    params.offline = params.use_jinja = True
    params.cache_ram_mib = 0  # its default keeps 8 GiB of earlier requests
    # The text as the model wrote it, its thoughts too.
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    try:
        server = xllamacpp.Server(params)
    except Exception as error:
        # An ordinary exit: llama.cpp then writes the rest of its log, which says why.
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"listening on {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
