"""Our own routes for what is made on demand: the comparison, pictures, the report, and what is exported and imported.

assets/explore.js asks them. The guard in front of the server lets in no other site's page, and nobody without the login
where there is one. What cannot be done is answered with one sentence under `error`.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from fastapi import Body, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from moepic_core.errors import BadSettings, MoepicError

from . import share
from .explorer import VIEWS, Explorer
from .helping import Helping, adopt, table
from .jobs import Job, Tell
from .report import report
from .sensors import Sample
from .state import State

FRESH = {"Cache-Control": "no-store"}
LIVE = ("vram", "strategy", "split", "eviction", "prefetch")  # settings that change without loading


class Workshop:
    """What works on demand for the page; closed with the server."""

    def __init__(self, state: State, helping: Helping, sample: Callable[[], Sample | None]) -> None:
        """`sample` gives the newest readings of the sensors."""
        self.state = state
        self.helping = helping
        self._sample = sample
        self.explorer = Explorer(state)
        self.reporting = Job("moepic-report")

    def close(self) -> None:
        self.reporting.stop()
        self.helping.close()
        self.explorer.close()
        self.reporting.close()

    def recorded(self) -> share.Recorded:
        """Raises BadSettings when there is nothing to share."""
        return share.recorded(self.state, self._sample())

    def start_report(self) -> None:
        """All pictures that can be made now, then the file. Raises BadSettings when there is nothing to share."""
        self.recorded()
        self.reporting.start(self._report)

    def _report(self, tell: Tell) -> str:
        figures = {}
        for view in VIEWS:
            with suppress(BadSettings):  # a picture that cannot be made yet is left out
                figures[view] = self.explorer.figure(view) or self.explorer.make(view, tell).figure
        measured = self.helping.measured
        comparison = table(measured) if measured is not None else None
        script = plotly_js().read_text(encoding="utf-8")
        return report(self.recorded(), figures, comparison, script, time.strftime("%Y-%m-%d %H:%M"))


def plotly_js() -> Path:
    """Plotly's JavaScript as it comes with the installed package. Raises BadSettings when that is missing."""
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path
    raise BadSettings("plotly is not installed here; start with launch.py, which installs it, or: pip install plotly")


def import_settings(state: State, data: bytes) -> str:
    """Puts settings from a file in force, by loading when they need that; says what was done. Raises a MoepicError."""
    loaded = state.look().loaded
    present = loaded.settings if loaded is not None else state.settings
    wanted = share.read_settings(data, present)
    ours, theirs = share.settings_of(present), share.settings_of(wanted)
    changes = {name: value for name, value in theirs.items() if value != ours[name]}
    if loaded is not None and not changes:
        return "These settings are in force already."
    if loaded is not None and set(changes) <= set(LIVE):
        adopt(state, changes)
        return f"In force now: {', '.join(f'{name} {value}' for name, value in changes.items())}."
    state.check(wanted)
    state.load(wanted)
    state.kept.keep(theirs.pop("checkpoint"), **theirs)
    return f"Loading {wanted.checkpoint} with these settings."


def add_routes(app: FastAPI, workshop: Workshop) -> None:
    _add_comparison(app, workshop.helping)
    _add_pictures(app, workshop)
    _add_files(app, workshop)

    @app.get("/ui/plotly.js")
    def plotly() -> Response:
        try:
            return FileResponse(plotly_js(), media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})
        except BadSettings:
            return Response(status_code=404)


def _add_comparison(app: FastAPI, helping: Helping) -> None:
    @app.get("/ui/helping")
    def compared() -> JSONResponse:
        return JSONResponse(helping.view(), headers=FRESH)

    @app.post("/ui/helping")
    def compare(text: Annotated[str, Body()] = "", opened: Annotated[str, Body()] = "") -> JSONResponse:
        return _said(lambda: helping.start(text, opened or None))

    @app.post("/ui/helping/stop")
    def stop_comparing() -> JSONResponse:
        return _said(helping.stop)

    @app.post("/ui/helping/use")
    def use() -> JSONResponse:
        return _said(helping.use)


def _add_pictures(app: FastAPI, workshop: Workshop) -> None:
    explorer, reporting = workshop.explorer, workshop.reporting

    @app.get("/ui/explore/{view}")
    def explored(view: str) -> Response:
        if view == "report":
            return JSONResponse(reporting.view(), headers=FRESH)
        return JSONResponse(explorer.view(view), headers=FRESH) if view in VIEWS else Response(status_code=404)

    @app.post("/ui/explore/{view}")
    def explore(view: str) -> Response:
        if view == "report":
            return _said(workshop.start_report)
        return _said(lambda: explorer.start(view)) if view in VIEWS else Response(status_code=404)

    @app.post("/ui/explore/{view}/stop")
    def stop_exploring(view: str) -> Response:
        if view == "report":
            return _said(reporting.stop)
        return _said(lambda: explorer.stop(view)) if view in VIEWS else Response(status_code=404)


def _add_files(app: FastAPI, workshop: Workshop) -> None:
    state = workshop.state

    @app.get("/ui/share/{name}")
    def shared(name: str) -> Response:
        try:
            if name == "trace.npz":
                return _file(share.trace_npz(workshop.recorded()), "application/octet-stream")
            if name == "trace.json":
                return _file(share.about_json(workshop.recorded()), "application/json")
            if name == "settings.json":
                loaded = state.look().loaded
                return _file(share.settings_json(loaded.settings if loaded else state.settings), "application/json")
            if name == "report.html" and workshop.reporting.result is not None:
                return _file(workshop.reporting.result, "application/octet-stream")  # never a page of this server
        except MoepicError as error:
            return JSONResponse({"error": str(error)}, headers=FRESH)
        return Response(status_code=404)

    @app.post("/ui/share/settings")
    async def receive(request: Request) -> JSONResponse:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > share.LIMIT_BYTES:
                break
        return await run_in_threadpool(_said, lambda: import_settings(state, bytes(data)))


def _said(act: Callable[[], str | None]) -> JSONResponse:
    """What `act` says under `done`, or what is wrong under `error`: a status of failure would upset browsers."""
    try:
        return JSONResponse({"done": act() or ""})
    except MoepicError as error:
        return JSONResponse({"error": str(error)})


def _file(content: str | bytes, media_type: str) -> Response:
    return Response(content, media_type=media_type, headers={"Content-Disposition": "attachment", **FRESH})
