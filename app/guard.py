"""Keeps other people's web pages away from ours: the outermost layer of the server, in front of every route.

A server on this machine can be reached by any page that its user visits. So requests for foreign host names are refused
(DNS rebinding), requests from foreign origins may not change anything (CSRF), and the browser is told to load nothing
from elsewhere: not even a picture that a model's answer asks for. With a login, nothing is served without it.
Pure ASGI: answers are passed on unread, so streams stay streams.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    # Gradio's page needs inline scripts and styles, and `eval` for the small scripts of its HTML components.
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


class Guard:
    """Wraps `app`. `hosts` are the names it answers to (None: any), `login` a user and a password (None: no login)."""

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str] | None = LOOPBACK_HOSTS, login: tuple[str, str] | None = None
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.login = "Basic " + base64.b64encode(":".join(login).encode()).decode() if login else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no part of the page uses web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return PlainTextResponse(f"this server does not answer to the name {host!r}", 421)
        if method not in ("GET", "HEAD", "OPTIONS") and _is_foreign(headers, host):
            return PlainTextResponse("a page of another site sent this request", 403)
        if self.login is not None:
            given = headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), self.login.encode()):
                return PlainTextResponse(
                    "log in first", 401, {"WWW-Authenticate": 'Basic realm="MoEpic", charset="UTF-8"'}
                )
        return None


def _name(host: str) -> str:
    """The name in a Host header, without port and brackets; empty for what cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser says that another site's page sent this. Programs send neither header and are welcome."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return True
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
