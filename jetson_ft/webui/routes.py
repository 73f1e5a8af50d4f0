"""What the page asks for beside its forms: live pieces, actions on runs, files to take away.

Each action is one function of `runs`, the one that the command line calls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel
from starlette.background import BackgroundTask

from jetson_ft.errors import UserError
from jetson_ft.runs import jobs, rundir, shelf
from jetson_ft.runs.rundir import Run
from jetson_ft.webui.live import Piece, Pieces
from jetson_ft.webui.words import Words, asked

_REPORTS = ("report.html", "report.md", "report.json")
_ACTIONS: dict[str, Callable[[Run], Any]] = {
    "stop": jobs.stop, "resume": jobs.resume, "delete": shelf.delete,
}  # fmt: skip

Beside = Annotated[list[str], Query()]


class About(BaseModel):
    """What a person writes about a run."""

    title: str | None = None
    notes: str | None = None


def router(root: Path) -> APIRouter:
    """All of them, for the runs under `root`."""
    routes, pieces = APIRouter(), Pieces(root)

    @routes.get("/")
    def home(request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"/{_words(request).language}/{query}", 307)

    @routes.get("/live/{language}/runs")
    def runs(request: Request, language: str, chosen: str = "", beside: Beside = []) -> Response:  # noqa: B006
        return _piece(request, pieces.shelf(language, chosen, beside))

    @routes.get("/live/{language}/runs/{name}")
    def run(request: Request, language: str, name: str, beside: Beside = []) -> Response:  # noqa: B006
        return _piece(request, pieces.detail(language, name, beside))

    @routes.post("/runs/{name}/about")
    def describe(name: str, about: About) -> Response:
        shelf.describe(rundir.named(name, root), about.title, about.notes)
        return JSONResponse({"done": True})

    @routes.post("/runs/{name}/{action}")
    def act(name: str, action: str) -> Response:
        if action not in _ACTIONS:
            raise UserError("There is no such action.", action)
        _ACTIONS[action](rundir.named(name, root))
        return JSONResponse({"done": True})

    @routes.get("/runs/{name}/adapter.zip")
    def adapter(name: str) -> Response:
        run = rundir.named(name, root)
        folder = tempfile.TemporaryDirectory()
        path = shelf.zip_adapter(run, Path(folder.name) / "adapter.zip")
        done = BackgroundTask(folder.cleanup)
        return FileResponse(path, filename=f"{run.name}-adapter.zip", background=done)

    @routes.get("/runs/{name}/{file}")
    def report(name: str, file: str) -> Response:
        path = rundir.named(name, root).path / file
        if file not in _REPORTS or not path.is_file():
            raise UserError("There is no such file.", f"{name}/{file}")
        return FileResponse(path)

    return routes


def tell(request: Request, error: Exception) -> Response:
    """A `UserError` as the page's scripts read it, in the page's language."""
    if not isinstance(error, UserError):
        raise error
    return JSONResponse(_words(request).error(error), 422)


def _words(request: Request) -> Words:
    return Words(asked(request.url.path, request.headers))


def _piece(request: Request, piece: Piece) -> Response:
    headers = {"ETag": piece.etag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == piece.etag:
        return Response(status_code=304, headers=headers)
    return Response(piece.html, media_type="text/html; charset=utf-8", headers=headers)
