"""Routes beside the Gradio page: HTML fragments, actions on runs, downloads.

Each action is the function of `runs` that its command calls.
"""

from __future__ import annotations

import hashlib
import tempfile
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Body, Query, Request, Response
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    StreamingResponse,
)
from starlette.background import BackgroundTask

from jetson_ft.errors import UserError, _
from jetson_ft.files import disk_errors
from jetson_ft.runs import exports, jobs, log_reader, manager, oom, store
from jetson_ft.webui import after_training, run_charts
from jetson_ft.webui.changed_items import SentLists
from jetson_ft.webui.cli_json import run_cli_json
from jetson_ft.webui.fragments import Fragments
from jetson_ft.webui.limits import BusyError, costly
from jetson_ft.webui.render import Locale, render, request_language
from jetson_ft.webui.run_table import MAX_COMPARED

Drawn = Annotated[tuple[str, ...], Query()]
View = Literal["overview", "samples", "settings", "charts", "log", "export"]
NewText = Annotated[str | None, Body()]  # null: unchanged


def router(root: Path) -> APIRouter:
    """Return the routes for the runs under `root`."""
    routes, fragments, sent = APIRouter(), Fragments(root), SentLists()

    def done() -> Response:
        """Respond to an action, which the fragments show from now on."""
        fragments.expire()
        return JSONResponse({"done": True})

    @routes.get("/")
    def home(request: Request) -> Response:
        language = request_language(request.url.path, request.headers)
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(f"/{language}/{query}", 307)

    @routes.get("/live/{language}/runs")
    def runs(
        request: Request, language: str, chosen: str = "", drawn: Drawn = (), sort: str = "",
        filter: str = "", view: Literal["list", "table"] = "list",
    ) -> Response:  # fmt: skip
        if view == "table":
            return fragment(request, fragments.run_table(language, dict(request.query_params)))
        html = fragments.run_list(language, chosen, drawn, sort, filter)
        return fragment(request, html, sent=sent)

    @routes.get("/progress/{language}")
    def progress(request: Request, language: str, watched: Drawn = ()) -> Response:
        return fragment(request, fragments.progress(language, watched), "application/json")

    @routes.get("/live/{language}/curves")
    def curves(
        request: Request, view: Literal["overview", "charts"], drawn: Drawn = ()
    ) -> Response:
        return fragment(request, fragments.curves(view, drawn), "application/json")

    @routes.get("/live/{language}/runs/{name}/head")
    def head(request: Request, language: str, name: str, view: View = "overview") -> Response:
        return fragment(request, fragments.run_head(language, name, view))

    @routes.get("/live/{language}/runs/{name}")
    def run(
        request: Request, language: str, name: str, view: View = "overview", drawn: Drawn = ()
    ) -> Response:
        query = dict(request.query_params)
        return fragment(request, fragments.run_view(language, name, view, drawn, query))

    @routes.get("/static/chart.js")
    def chart_library() -> Response:
        return run_charts.library()

    @routes.get("/runs/compare.{kind}")
    def compare(kind: Literal["html", "md"], run: Drawn = ()) -> Response:
        paths = [str(store.run_by_name(name, root).path) for name in run[:MAX_COMPARED]]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "comparison"
            option = "--html" if kind == "html" else "--markdown"
            run_cli_json("compare", *paths, option, str(file), "--json")
            text = file.read_text("utf-8")
        if kind == "html":
            return HTMLResponse(text)
        name = {"Content-Disposition": 'attachment; filename="comparison.md"'}
        return Response(text, media_type="text/markdown", headers=name)

    @routes.post("/runs/{name}/about")
    def describe(name: str, title: NewText = None, notes: NewText = None) -> Response:
        manager.set_title_and_notes(store.run_by_name(name, root), title, notes)
        return done()

    @routes.post("/runs/{name}/export")
    def export(
        name: str, choice: Annotated[str, Body()], unchecked: Annotated[bool, Body()] = False
    ) -> Response:
        run = store.run_by_name(name, root)
        jobs.start(run, "export", after_training.export_arguments(run, choice, unchecked))
        return done()

    @routes.post("/runs/{name}/serve")
    def serve(name: str) -> Response:
        run = store.run_by_name(name, root)
        jobs.start(run, "serve", after_training.serve_arguments(run))
        return done()

    @routes.post("/runs/{name}/jobs/{job}/stop")
    def stop_job(name: str, job: Literal["export", "serve"]) -> Response:
        jobs.stop(store.run_by_name(name, root), job)
        return done()

    @routes.post("/runs/{name}/exports/{export}/delete")
    def delete_export(name: str, export: str) -> Response:
        exports.delete_export(store.run_by_name(name, root), export)
        return done()

    @routes.get("/runs/{name}/exports/{export}/{file}")
    def export_file(name: str, export: str, file: str) -> Response:
        path = after_training.export_file(store.run_by_name(name, root), export, file)
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)

    @routes.post("/runs/{name}/resume-smaller")
    def resume_smaller(name: str) -> Response:
        run = store.run_by_name(name, root)
        manager.resume(run, oom.smaller_plan_settings(run))
        return done()

    @routes.post("/runs/{name}/{action}")
    def act(name: str, action: Literal["stop", "resume", "delete"]) -> Response:
        getattr(manager, action)(store.run_by_name(name, root))
        return done()

    @routes.get("/runs/{name}/adapter.zip")
    def adapter(name: str) -> Response:
        run = store.run_by_name(name, root)
        folder = tempfile.TemporaryDirectory()
        with costly():
            path = manager.zip_adapter(run, Path(folder.name) / "adapter.zip")
        cleanup = BackgroundTask(folder.cleanup)
        return FileResponse(path, filename=f"{run.name}-adapter.zip", background=cleanup)

    @routes.get("/runs/{name}/log.txt")
    def log(name: str) -> Response:
        run = store.run_by_name(name, root)
        blocks = log_reader.iter_bytes(run.path)
        first = next(blocks, b"")  # raises here what would end a response that has begun
        file = {"Content-Disposition": f'attachment; filename="{run.name}-log.txt"'}
        return StreamingResponse(chain([first], blocks), media_type="text/plain", headers=file)

    @routes.get("/runs/{name}/{file}")
    def report(name: str, file: Literal["report.html", "report.md", "report.json"]) -> Response:
        path = store.run_by_name(name, root).path / file
        with disk_errors(path):  # a folder or file of someone else
            if not path.is_file():
                raise UserError(_("File not found."), f"{name}/{file}")
            path.open("rb").close()
        return FileResponse(path)

    return routes


def error_response(request: Request, error: Exception) -> Response:
    """Return a `UserError` in the page's language: as JSON, as a page where a link was opened."""
    assert isinstance(error, UserError)
    t = Locale(request_language(request.url.path, request.headers))
    texts = {"what": t(error.what), "where": t(error.where), "fix": t(error.fix)}
    status, headers = (429, {"Retry-After": "10"}) if isinstance(error, BusyError) else (422, {})
    if "text/html" in request.headers.get("accept", ""):  # which scripts don't ask for
        return HTMLResponse(render("error.jinja", t, **texts), status, headers)
    return JSONResponse(texts, status, headers)


def fragment(
    request: Request, content: str, media_type: str = "text/html", sent: SentLists | None = None
) -> Response:
    """Return the content, or nothing where the browser has it already.

    Args:
        sent: for a list: those that were sent before; its unchanged items are left out.
    """
    etag = f'"{hashlib.sha256(content.encode()).hexdigest()[:24]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if known == etag:
        return Response(status_code=304, headers=headers)
    if sent:
        content = sent.changes(content, etag, known)
    return Response(content, headers=headers, media_type=media_type)
