"""Serve models to OpenAI's clients, with a key unless only this machine can reach them."""

from __future__ import annotations

import json
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jetson_ft.chat import memory_guard
from jetson_ft.files import printable, quoted
from jetson_ft.hardware import detect
from jetson_ft.http_access import host_of_address, is_loopback, listen, make_server
from jetson_ft.runs import processes, queue
from jetson_ft.serve import models
from jetson_ft.serve.engine import Engine
from jetson_ft.serve.models import EngineSettings
from jetson_ft.serve.transformers_process import TransformersServer

_MAX_REQUESTS = 64  # replies that are written or wait


def serve(
    names: Sequence[str],
    runs: Path,
    host: str,
    port: int,
    settings: EngineSettings,
    host_names: tuple[str, ...] = (),
    reached_as: str = "",
    origins: tuple[str, ...] = (),
    as_json: bool = False,
) -> None:
    """Serve until the process is interrupted; print the address, the key and a command to try.

    Args:
        names: as in `models.prepare`.
        runs: the folder of the runs.
        host: the address to listen on; beyond loopback a key is required.
        host_names: names accepted as `Host` besides IP addresses and localhost.
        reached_as: HOST or HOST:PORT of the address, where it differs from `host`: in a container.
        origins: other sites whose pages may send requests.
        as_json: once it is ready, print one JSON object to stdout; all else goes to stderr.

    Raises:
        UserError: the port is taken, or as `models.prepare`; the engine can't be started, or has
            ended too often.
    """
    if reached_as:
        host_names = (*host_names, host_of_address(reached_as))
    key = "" if is_loopback(host) else secrets.token_hex(16)
    listener = listen(host, port)
    # Until uvicorn handles it, a SIGTERM ends the process as Ctrl-C does: child processes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def report(line: str) -> None:
        print(printable(line), file=sys.stderr if as_json else sys.stdout, flush=True)

    processes.silence_libraries()
    serving = models.prepare(names, runs, settings, report)
    from jetson_ft.serve.app import Api

    def give_up() -> None:
        server.should_exit = True

    engine = Engine(
        serving.process,
        lambda: memory_guard.is_memory_short(detect.detect_cpu),
        lambda: queue.running_run() is None,
        give_up,
    )
    report(f"loading {', '.join(model.name for model in serving.models)}")
    with engine:
        context = serving.context
        if isinstance(serving.process, TransformersServer):
            context = min(context, serving.process.context)
        api = Api(engine, serving.models, context, _MAX_REQUESTS)
        app = api.app(key, host_names, origins)
        port = listener.getsockname()[1]
        address = f"http://{processes.reachable_address(host, port, reached_as)}/v1"

        def greet() -> None:
            if as_json:
                ready = [model.name for model in serving.models]
                print(json.dumps({"schema": 1, "url": address, "models": ready, "api_key": key}))
                sys.stdout.flush()
            for line in serving.notes if as_json else _greeting(address, key, serving):
                report(line)

        # With proxy headers a client of this machine could choose its address.
        server = make_server(app, greet, proxy_headers=False)
        server.run([listener])
    if engine.failure:
        raise engine.failure


def _greeting(address: str, key: str, serving: models.Serving) -> list[str]:
    """Return the lines that a person needs to use the server."""
    lines = [f"models: {', '.join(model.name for model in serving.models)}", *serving.notes]
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    body = {"model": serving.models[0].name, "messages": [{"role": "user", "content": "Hello"}]}
    lines.append(f"try: curl {address}/chat/completions{header} -d {quoted(json.dumps(body))}")
    if key:
        lines.append(f"key: {key}")
    else:
        lines.append("From another machine: --host 0.0.0.0 (it then needs a key).")
    return [*lines, f"serving: {address}"]
