"""Puts the page together and serves it. Called by launch.py with the options of the command line."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import gradio as gr
import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.middleware import Middleware
from starlette.routing import Mount

from moepic_core.calibrate import probe
from moepic_core.errors import MoepicError

from . import assets, checkpoints, demo_checkpoint, explore_routes, terms
from .conversation_routes import add_routes
from .guard import LOOPBACK_HOSTS, Guard
from .helping import Helping
from .panels import answers, budget, chat, conversations, desk, explore, header, model, see, steer
from .sensors import MachineSource, Source
from .settings_store import SettingsStore, settings_path
from .state import State
from .store import Store, default_path
from .talk import Talk
from .theme import theme
from .watch import Watch

# Between two looks of Gradio's queue for questions, and for progress, which we tell otherwise. As it comes it looks a
# thousand times a second, and each time takes the interpreter from the model: a seventh of its speed.
QUEUE_LOOK_S, PROGRESS_LOOK_S = 0.02, 1.0


def serve(
    *,
    checkpoint: str | None,
    given: dict[str, str],
    host: str,
    port: int,
    auth: tuple[str, str] | None,
    ready: Callable[[str], None],
) -> int:
    """Serves the page until Ctrl-C and returns the exit code; `ready` gets its address once it answers.

    `given` has the settings that the command line names; for the others holds what was chosen on the page earlier.
    """
    try:
        kept = SettingsStore(settings_path(), given)
        settings = kept.of(checkpoint or checkpoints.default_name())
        state = State(settings, kept)
        state.check(settings)
    except MoepicError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2
    if settings.checkpoint == demo_checkpoint.NAME:
        print(f"The checkpoint {demo_checkpoint.NAME} has {demo_checkpoint.WARNING}.")
    store = Store(default_path())
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    def up(address: str) -> None:
        ready(address)
        state.load(settings)  # not sooner: importing the engine would slow the page's own start

    try:
        Server(build_app(state, host, auth, store=store), state, host, port, up).run()
    except KeyboardInterrupt:
        print("\nEnding ...")
    finally:
        state.close()
        store.close()
    return 0


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


def build_app(
    state: State,
    host: str = "127.0.0.1",
    auth: tuple[str, str] | None = None,
    sensors: Callable[[], Source] = MachineSource,
    store: Store | None = None,
) -> FastAPI:
    """The whole server: guard, our own routes, Gradio's page. Watches the engine for as long as it runs."""
    watch, store = Watch(state, sensors), store or Store()
    workshop = explore_routes.Workshop(state, Helping(state, store), lambda: watch.sample)

    @asynccontextmanager
    async def watching(_: FastAPI) -> AsyncIterator[None]:
        watch.start()
        yield
        workshop.close()
        watch.close()

    hosts = None if auth else (*LOOPBACK_HOSTS, host.strip("[]"))  # who has to log in may come by any name
    app = FastAPI(openapi_url=None, lifespan=watching, middleware=[Middleware(Guard, hosts=hosts, login=auth)])
    add_routes(app, store)
    explore_routes.add_routes(app, workshop)
    _add_page_routes(app, watch, store)
    assets.run_first()
    gr.mount_gradio_app(
        app,
        build_page(state, store),
        path="/",
        app_kwargs={"openapi_url": None},
        theme=theme(),
        head=assets.STYLE_TAGS,
        favicon_path=str(assets.FOLDER / assets.ICON),
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


def _add_page_routes(app: FastAPI, watch: Watch, store: Store) -> None:
    """The last routes of ours: one of them takes every name."""
    server = secrets.token_hex(4)  # pages that see another one begin anew

    @app.get("/ui/live")
    def live(seen: str = "", panels: bool = True) -> Response:
        answer = {**watch.live(seen, panels), "conversations": store.version(), "server": server}
        return Response(orjson.dumps(answer), media_type="application/json", headers={"Cache-Control": "no-store"})

    @app.get("/ui/metrics")
    def metrics() -> HTMLResponse:
        return HTMLResponse(terms.page())

    @app.get("/ui/{name}")
    def asset(name: str) -> Response:
        if name not in assets.SERVED:
            return Response(status_code=404)
        return FileResponse(assets.FOLDER / name, headers={"Cache-Control": "no-cache"})


def build_page(state: State, store: Store) -> gr.Blocks:
    # Whether to report home. `Blocks` takes it as an argument too, but that does not reach the ChatInterface inside.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    device = probe(state.settings.device).device
    page = gr.Blocks(title="MoEpic", fill_width=True)
    with page:
        with gr.Sidebar(open=False, width=300, elem_id="side"):
            opened = conversations.build()
            answers_panel = answers.build()
        header.build()
        explore.build()
        with gr.Row(elem_id="main"):
            talk = gr.Column(elem_id="talk", scale=9, min_width=320)
            controls = gr.Column(elem_id="controls", scale=11, min_width=320)
        with controls:
            model_panel = model.build(device)
            budget_panel = budget.build(device)
            steer_panel = steer.build()
            see.build(device)
        with talk:
            chat_panel = chat.build()
        desk.wire(desk.Desk(state, model_panel, steer_panel, budget_panel, gr.State(None)), page)
        answers.wire(answers_panel, state)
        chat.wire(chat_panel, opened, answers_panel, page, model_panel.refresh, Talk(store, state))
    for block in page.blocks.values():
        if isinstance(block, gr.HTML):
            block.head = assets.SCRIPT_TAGS
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = QUEUE_LOOK_S, PROGRESS_LOOK_S
    return page
