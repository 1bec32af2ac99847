"""Puts the page together and serves it. Called by launch.py with the options of the command line."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware import Middleware
from starlette.routing import Mount

from moepic_core.calibrate import probe
from moepic_core.errors import MoepicError
from moepic_core.spec import Settings

from . import checkpoints, demo_checkpoint, views
from .guard import LOOPBACK_HOSTS, Guard
from .panels import answers, budget, chat, header, model
from .state import State
from .theme import theme

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SERVED = ("page.js", "page.css", "favicon.svg")
HEAD = '<link rel="stylesheet" href="ui/page.css"><script src="ui/page.js"></script>'


def serve(
    *,
    checkpoint: str | None,
    vram: str | None,
    device: str,
    link: str,
    strategy: str,
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    ready: Callable[[str], None],
) -> int:
    """Serves the page until Ctrl-C and returns the exit code; `ready` gets its address once it answers."""
    try:
        settings = first_settings(checkpoint, vram=vram, device=device, link=link, strategy=strategy)
        state = State(settings)
        state.check(settings)
    except MoepicError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    if settings.checkpoint == demo_checkpoint.NAME:
        print(f"No checkpoint was named, so this is a small one with {demo_checkpoint.WARNING}.")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def up(address: str) -> None:
        ready(address)
        state.load(settings)  # not sooner: importing the engine would slow the page's own start

    try:
        Server(build_app(state, host, auth), state, host, port, up).run()
    except KeyboardInterrupt:
        print("\nEnding ...")
    finally:
        state.close()
    return 0


def first_settings(checkpoint: str | None, vram: str | None = None, **settings: str) -> Settings:
    """What the command line asks for. Half the room is enough for the demo: with all of it there is nothing to see."""
    name = checkpoint or checkpoints.default_name()
    if vram is None:
        vram = "auto" if checkpoint else "50%"
    return Settings.create(checkpoint=name, vram=vram, **settings)


class Server(uvicorn.Server):
    """Says where it is as soon as it answers; when it ends, ends what open pages are being told."""

    def __init__(self, app: FastAPI, state: State, host: str, port: int, ready: Callable[[str], None]) -> None:
        host = host.strip("[]")
        super().__init__(uvicorn.Config(app, host, port, log_level="warning", timeout_graceful_shutdown=5))
        self._state = state
        self._gradio = next(app for app in map(_mounted, app.routes) if isinstance(app, gr.routes.App))
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._address = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready(self._address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.stop()
        self._gradio.stop_event.set()  # every open page holds a stream that nothing else would end
        await super().shutdown(sockets)


def _mounted(route: object) -> object:
    return route.app if isinstance(route, Mount) else None


def build_app(state: State, host: str = "127.0.0.1", auth: tuple[str, str] | None = None) -> FastAPI:
    """The whole server: guard, our own routes, Gradio's page."""
    hosts = None if auth else (*LOOPBACK_HOSTS, host.strip("[]"))  # who has to log in may come by any name
    app = FastAPI(openapi_url=None, middleware=[Middleware(Guard, hosts=hosts, login=auth)])

    @app.get("/ui/live")
    def live() -> JSONResponse:
        return JSONResponse(views.live(state.look()), headers={"Cache-Control": "no-store"})

    @app.get("/ui/{name}")
    def asset(name: str) -> Response:
        if name not in SERVED:
            return Response(status_code=404)
        return FileResponse(ASSETS / name, headers={"Cache-Control": "no-cache"})

    gr.mount_gradio_app(
        app,
        build_page(state),
        path="/",
        app_kwargs={"openapi_url": None},
        theme=theme(),
        head=HEAD,
        favicon_path=str(ASSETS / "favicon.svg"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size="1mb",
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    return app


def build_page(state: State) -> gr.Blocks:
    # Whether to report home. `Blocks` takes it as an argument too, but that does not reach the ChatInterface inside.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    device = probe(state.settings.device).device
    page = gr.Blocks(title="MoEpic", fill_width=True)
    with page:
        header.build()
        with gr.Row(elem_id="main"):
            talk = gr.Column(elem_id="talk", scale=3, min_width=320)
            controls = gr.Column(elem_id="controls", scale=2, min_width=320)
        with controls:
            model_panel = model.build(device)
            budget_panel = budget.build("RAM" if device == "cpu" else "VRAM")
            answers_panel = answers.build()
        with talk:
            chat_panel = chat.build()
        model.wire(model_panel, budget_panel, state, page)
        budget.wire(budget_panel, model_panel.selection, state)
        chat.wire(chat_panel, answers_panel, state)
    return page
