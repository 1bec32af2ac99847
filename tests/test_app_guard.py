"""What the server refuses, asked as other people's pages and programs would ask. No browser, no model."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Iterator

import pytest
from fastapi.routing import APIRoute
from gradio.queueing import Queue
from starlette.testclient import TestClient

from app.guard import HEADERS
from app.main import PROGRESS_LOOK_S, QUEUE_LOOK_S, build_app
from app.state import State
from moepic_core.spec import Settings

ADDRESS = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(build_app(State(Settings.create(checkpoint="none"))), ADDRESS) as client:
        yield client


@pytest.fixture(scope="module")
def guarded() -> Iterator[TestClient]:
    """A server that other machines may reach."""
    state = State(Settings.create(checkpoint="none"))
    with TestClient(build_app(state, "0.0.0.0", ("ann", "sesame")), "http://192.168.1.7:7860") as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/ui/live", "/ui/page.js", "/config", "/gradio_api/info"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "[::2]", "", "a[b"])
def test_foreign_names_are_not_answered(client: TestClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_our_own_names_are(client: TestClient, host: str) -> None:
    assert client.get("/ui/live", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/component_server", "/"])
def test_foreign_pages_change_nothing(client: TestClient, path: str, headers: dict[str, str]) -> None:
    answer = client.post(path, content='{"fn_index": 0, "data": []}', headers={"Content-Type": "text/plain", **headers})
    assert answer.status_code == 403


def test_our_own_page_and_programs_may_post(client: TestClient) -> None:
    for headers in ({"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}, {}):
        assert client.post("/gradio_api/reset", json={"event_id": "x"}, headers=headers).status_code not in (403, 421)


def test_every_answer_forbids_framing_and_foreign_content(client: TestClient) -> None:
    for path in ("/", "/ui/live", "/ui/page.css", "/no/such/page"):
        answer = client.get(path)
        assert HEADERS.items() <= {name: answer.headers.get(name) for name in HEADERS}.items()
    assert "default-src 'self'" in HEADERS["Content-Security-Policy"]


def test_only_the_page_s_own_files_are_served(client: TestClient) -> None:
    assert client.get("/ui/page.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))
    for path in ("/ui/launch.py", "/ui/..%2Flaunch.py", "/ui/%2Fetc%2Fpasswd", "/gradio_api/file=/etc/passwd"):
        assert client.get(path).status_code in (403, 404)


def test_nothing_is_documented_to_programs(client: TestClient) -> None:
    assert client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    assert client.get("/openapi.json").status_code == 404


def test_building_the_page_asks_nobody_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: asked.append(host) or [])
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    before = set(threading.enumerate())
    build_app(State(Settings.create(checkpoint="none")))
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
    assert asked == []


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_with_a_login_nothing_is_served_without_it(guarded: TestClient) -> None:
    for path in ("/", "/ui/live", "/ui/page.js", "/config", "/gradio_api/heartbeat/x"):
        for headers in ({}, basic("ann:wrong"), basic("ann"), {"Authorization": "Basic ???"}):
            answer = guarded.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Basic")
    assert guarded.get("/ui/live", headers=basic("ann:sesame")).status_code == 200


def test_with_a_login_foreign_pages_still_change_nothing(guarded: TestClient) -> None:
    headers = {**basic("ann:sesame"), "Origin": "http://evil.example"}
    assert guarded.post("/gradio_api/queue/join", json={}, headers=headers).status_code == 403


def own_routes(client: TestClient) -> list[tuple[str, str]]:
    """(method, path) of every route of ours, whoever added it."""
    routes = [route for route in client.app.routes if isinstance(route, APIRoute)]  # type: ignore[attr-defined]
    found = [(method, re.sub(r"{[^}]*}", "x", route.path)) for route in routes for method in route.methods]
    assert ("GET", "/ui/live") in found
    assert ("DELETE", "/ui/conversations/x") in found
    return found


def test_every_route_of_ours_is_under_the_same_login(guarded: TestClient) -> None:
    for method, path in own_routes(guarded):
        assert guarded.request(method, path).status_code == 401, (method, path)


def test_every_route_of_ours_refuses_foreign_names_and_pages(client: TestClient) -> None:
    for method, path in own_routes(client):
        assert client.request(method, path, headers={"Host": "evil.example"}).status_code == 421, (method, path)
        if method != "GET":
            foreign = client.request(method, path, headers={"Origin": "http://evil.example"})
            assert foreign.status_code == 403, (method, path)


def test_uploads_are_small_or_refused(client: TestClient) -> None:
    upload = {"files": ("big.txt", b"x" * 2_000_000)}
    assert client.post("/gradio_api/upload", files=upload).status_code == 413


def test_no_function_of_the_page_has_a_name_for_programs(client: TestClient) -> None:
    dependencies = client.get("/config").json()["dependencies"]
    assert len(dependencies) > 10
    assert {each["api_visibility"] for each in dependencies} == {"private"}


def test_gradio_s_queue_leaves_the_interpreter_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Queue] = []
    monkeypatch.setattr(Queue, "start", lambda queue: started.append(queue))
    with TestClient(build_app(State(Settings.create(checkpoint="none"))), ADDRESS):
        pass
    assert {(queue.sleep_when_free, queue.progress_update_sleep_when_free) for queue in started} == {
        (QUEUE_LOOK_S, PROGRESS_LOOK_S)
    }
