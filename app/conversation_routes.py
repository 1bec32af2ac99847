"""Our own routes for conversations: list and search, rename, delete and restore, export and import.

The page's script asks them; the guard in front of the server lets in no other site's page, and nobody without the
login where there is one. What cannot be done is answered with one sentence under `error`.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from moepic_core.errors import MoepicError

from . import transcripts
from .store import Store

FRESH = {"Cache-Control": "no-store"}


def add_routes(app: FastAPI, store: Store) -> None:
    _add_reading(app, store)
    _add_changing(app, store)


def _add_reading(app: FastAPI, store: Store) -> None:
    @app.get("/ui/conversations")
    def conversations(search: str = "", opened: str = "") -> JSONResponse:
        found = store.get(opened)
        answer = {
            "version": store.version(),
            "opened": found.changed if found else None,
            "problem": store.problem,
            "entries": [entry._asdict() for entry in store.entries(search)],
        }
        return JSONResponse(answer, headers=FRESH)

    @app.get("/ui/conversations.json")
    def export_all() -> Response:
        found = [store.get(entry.id) for entry in store.entries()]
        text = transcripts.to_json([conversation for conversation in found if conversation is not None])
        return _download(text, "conversations.json", "application/json")

    @app.get("/ui/conversations/{id}/{kind}")
    def export(id: str, kind: str) -> Response:
        conversation = store.get(id)
        if conversation is None or kind not in ("json", "md"):
            return Response(status_code=404)
        name = transcripts.file_name(conversation, kind)
        if kind == "json":
            return _download(transcripts.to_json([conversation]), name, "application/json")
        return _download(transcripts.to_markdown(conversation), name, "text/markdown")


def _add_changing(app: FastAPI, store: Store) -> None:
    @app.patch("/ui/conversations/{id}")
    def rename(id: str, title: Annotated[str, Body(embed=True)]) -> Response:
        try:
            store.rename(id, title)
        except MoepicError as error:
            return _refuse(error)
        return Response(status_code=204)

    @app.delete("/ui/conversations/{id}")
    def delete(id: str) -> Response:
        store.delete(id)
        return Response(status_code=204)

    @app.post("/ui/conversations/{id}/restore")
    def restore(id: str) -> Response:
        store.restore(id)
        return Response(status_code=204)

    @app.post("/ui/conversations")
    async def import_(request: Request, name: str = "the file") -> Response:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > transcripts.LIMIT_BYTES:
                break
        try:
            found = await run_in_threadpool(transcripts.read, bytes(data), name)
        except MoepicError as error:
            return _refuse(error)
        ids = [await run_in_threadpool(store.insert, conversation) for conversation in found]
        return JSONResponse({"ids": ids})


def _download(text: str, name: str, media_type: str) -> Response:
    headers: dict[str, Any] = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}", **FRESH}
    return Response(text, media_type=media_type, headers=headers)


def _refuse(error: MoepicError) -> JSONResponse:
    return JSONResponse({"error": str(error)})  # no status of failure, which browsers would complain about
