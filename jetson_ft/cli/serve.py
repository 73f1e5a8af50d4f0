"""`jetson-ft serve`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from jetson_ft.cli.output import (
    RUNS,
    HostNameOption,
    JsonOption,
    ReachedAsOption,
    RunsOption,
    json_errors,
)


def serve(
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="[RUN]... | MODEL | FILE.gguf",
            help="Runs with one base (by default `latest`), `base`, a model or a GGUF file.",
        ),
    ] = None,
    host: Annotated[
        str,
        Option(envvar="JETSON_FT_HOST", help="Address to serve on; other machines need a key."),
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    quantize: Annotated[
        str, Option(help="Type of GGUF files that are made: f16, q8_0, q4_k_m, q4_0, ….")
    ] = "f16",
    context: Annotated[
        int, Option(min=64, help="Most tokens of prompt and reply; the model's limit if lower.")
    ] = 4096,
    parallel: Annotated[
        int, Option(min=1, max=64, help="Replies at a time; each has memory for its context.")
    ] = 4,
    host_name: HostNameOption = None,
    reached_as: ReachedAsOption = "",
    allow_origin: Annotated[
        list[str] | None,
        Option(metavar="ORIGIN", help="Site whose pages may send requests; repeatable."),
    ] = None,
    as_json: JsonOption = False,
    runs: RunsOption = RUNS,
) -> None:
    """Serve runs or a model to clients of OpenAI's API."""
    from jetson_ft.serve import server
    from jetson_ft.serve.models import EngineSettings

    settings = EngineSettings(quantize, context, parallel)
    with json_errors(as_json):
        server.serve(
            names or ["latest"], runs, host, port, settings,
            tuple(host_name or ()), reached_as, tuple(allow_origin or ()), as_json,
        )  # fmt: skip
