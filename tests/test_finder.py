"""Folders, the hub cache and a hub on this machine: what is found, what is incomplete, and what the errors say."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants
from tiny_checkpoints import write_sparse

from moepic_core import finder
from moepic_core.errors import BadCheckpoint, Cancelled
from moepic_core.finder import list_cached, list_folder, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "handmade",
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


def save(folder: Path, num_shards: int = 1, present: int | None = None, **config: Any) -> Path:
    """A checkpoint of two experts in `num_shards` files, the first `present` of which are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    names = [f"model.layers.0.mlp.experts.{expert}.{way}_proj.weight" for expert in range(2) for way in ("up", "down")]
    for number in range(num_shards if present is None else present):
        shard = folder / f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        write_sparse(shard, {name: ("BF16", [6, 6]) for name in names[number::num_shards]})
    return folder


def snapshot(cache: Path, name: str, commit: str = COMMIT) -> Path:
    """The snapshot folder of hub id `name` in `cache`, with `main` pointing to it."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_folder_is_itself(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "model")
    assert resolve(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == folder


def test_a_file_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"'README.md' is a file; give the folder that holds config.json and"):
        resolve("README.md")


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./model", "a/b/c", "~/model"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(BadCheckpoint) as raised:
        resolve(name)
    assert str(raised.value).startswith(f"{name!r} is neither a folder nor a hub id; give a folder with config.json")


def test_a_complete_snapshot_is_found_by_id_branch_and_commit(cache: Path) -> None:
    folder = save(snapshot(cache, "org/model"), num_shards=2)
    assert resolve("org/model") == folder
    assert resolve("org/model", "main") == folder
    assert resolve("org/model", COMMIT) == folder


def test_offline_errors_say_what_is_missing(cache: Path) -> None:
    message = "'org/model' is no folder; as a hub id: it is not in the local cache; the network is off, so unset HF_HUB"
    with pytest.raises(BadCheckpoint, match=message):
        resolve("org/model")
    save(snapshot(cache, "org/model"), num_shards=4, present=1)
    with pytest.raises(BadCheckpoint, match=r"is incomplete: 3 of 4 weight files are missing .* the network is off"):
        resolve("org/model")
    with pytest.raises(BadCheckpoint, match="it is not in the local cache"):
        resolve("org/model", "other-branch")


def test_the_cache_lists_moe_models_and_what_is_wrong_with_them(cache: Path) -> None:
    assert list_cached() == []
    save(snapshot(cache, "b/good"))
    save(snapshot(cache, "A/partial"), num_shards=3, present=2)
    save(snapshot(cache, "c/quantized"), num_shards=3, present=2, quantization_config={"quant_method": "fp8"})
    save(snapshot(cache, "d/dense"), num_experts=None)
    save(snapshot(cache, "e/lying"), num_experts=3)
    snapshot(cache, "f/empty").mkdir(parents=True)
    save(snapshot(cache, "g/broken")).joinpath("config.json").write_text("{")
    save(cache / "datasets--org--data" / "snapshots" / COMMIT)
    (cache / "blobs" / "00").mkdir(parents=True)  # newer hub libraries share blobs between repositories here
    found = [(entry.name, entry.revision, entry.spec is not None, entry.incomplete) for entry in list_cached()]
    assert found == [
        ("A/partial", "main", False, True),
        ("b/good", "main", True, False),
        ("c/quantized", "main", False, False),
        ("e/lying", "main", False, False),
        ("g/broken", "main", False, False),
    ]
    problems = [entry.problem for entry in list_cached()]
    assert problems[1] is None
    for problem, part in zip(
        [problems[0], *problems[2:]],
        ["1 of 3 weight files", "already quantized (fp8)", "wanted 3: expert 2 is missing", "is not valid JSON"],
        strict=True,
    ):
        assert problem is not None
        assert part in problem


def test_each_revision_in_the_cache_has_its_line(cache: Path) -> None:
    older = "f" * 40
    save(snapshot(cache, "org/model", older))
    save(snapshot(cache, "org/model"))
    assert [(entry.name, entry.revision, entry.path.name) for entry in list_cached()] == [
        ("org/model", older, older),
        ("org/model", "main", COMMIT),
    ]


def test_headers_are_read_again_only_when_files_have_changed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(snapshot(cache, "org/model"), num_shards=2, present=1)
    read: list[Path] = []
    real = finder.read_spec
    monkeypatch.setattr(finder, "read_spec", lambda folder: read.append(folder) or real(folder))
    first, second = list_cached(), list_cached()
    assert first == second
    assert first[0].incomplete
    assert read == [folder]
    save(folder, num_shards=2)
    assert list_cached()[0].spec is not None
    assert read == [folder, folder]


def test_a_folder_lists_the_checkpoints_in_it(tmp_path: Path) -> None:
    save(tmp_path / "org" / "model")
    save(tmp_path / "flat", num_shards=2, present=1)
    save(tmp_path / "flat" / "original")  # inside a checkpoint: a part of it
    save(tmp_path / "dense", num_experts=0)
    save(tmp_path / "too" / "deep" / "here")
    assert [(entry.name, entry.incomplete) for entry in list_folder(tmp_path)] == [
        (str(tmp_path / "flat"), True),
        (str(tmp_path / "org" / "model"), False),
    ]
    assert [entry.path for entry in list_folder(tmp_path / "org" / "model")] == [tmp_path / "org" / "model"]
    with pytest.raises(BadCheckpoint, match="is not a folder; give one that holds checkpoints"):
        list_folder(tmp_path / "absent")


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's HTTP interface to list and fetch the files in `Hub.folder` as `org/model`."""

    folder: Path
    break_at = 0  # bytes after which the first weight file breaks off, once
    ranges: ClassVar[list[str]] = []  # that were asked for

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        if path == "/api/models/org/model/revision/main":
            siblings = [{"rfilename": file.relative_to(self.folder).as_posix()} for file in files]
            body = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            tree = [
                {
                    "type": "file",
                    "path": file.relative_to(self.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            body = json.dumps(tree).encode()
        elif path.startswith(prefix := f"/org/model/resolve/{COMMIT}/"):
            body = (self.folder / path.removeprefix(prefix)).read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
            if with_body and (wanted := self.headers.get("Range")):
                self._go_on(body, headers, wanted)
                return
            if with_body and Hub.break_at and "/model-00001-of-" in path:  # another one may be asked for beside it
                self._break_off(body, headers)
                return
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        self._begin(200, {**headers, "Content-Length": str(len(body))})
        if with_body:
            self.wfile.write(body)

    def _break_off(self, body: bytes, headers: dict[str, str]) -> None:
        length, Hub.break_at = Hub.break_at, 0
        self._begin(200, {**headers, "Content-Length": str(len(body))})
        self.wfile.write(body[:length])
        self.close_connection = True

    def _go_on(self, body: bytes, headers: dict[str, str], wanted: str) -> None:
        Hub.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        about = {
            "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}",
            "Content-Length": str(len(body) - start),
        }
        self._begin(206, {**headers, **about})
        self.wfile.write(body[start:])

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Tests are silent."""


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that a hub on this machine serves as `org/model`."""
    Hub.folder = tmp_path / "served"
    Hub.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield save(Hub.folder, num_shards=2)
        server.shutdown()


def test_a_download_fetches_what_is_needed_and_reports_its_bytes(hub: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (hub / name).write_text(name)  # equal contents would be fetched once
    wanted = {file.name: file.read_bytes() for file in hub.iterdir()}
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors"):
        (hub / name).write_text("unwanted")
    save(hub / "original")
    reports: list[tuple[int, int]] = []
    folder = resolve("org/model", progress=lambda done, total: reports.append((done, total)))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    num_bytes = sum(map(len, wanted.values()))
    assert max(reports) == (num_bytes, num_bytes)
    assert resolve("org/model") == folder


def test_a_partial_snapshot_is_completed(hub: Path, cache: Path) -> None:
    save(snapshot(cache, "org/model"), num_shards=2, present=1)
    folder = resolve("org/model")
    assert len(list(folder.glob("*.safetensors"))) == 2


def test_a_file_that_breaks_off_goes_on_where_it_was(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "break_at", 200)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # only whole ones count
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's client rests before it tries again
    folder = resolve("org/model")
    assert Hub.ranges == ["bytes=200-"]
    for file in hub.glob("*.safetensors"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_a_download_can_be_stopped(hub: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        resolve("org/model", progress=stop)


def test_an_unknown_hub_id_is_named(hub: Path) -> None:
    with pytest.raises(BadCheckpoint, match="'org/other' is neither a folder nor a public hub id; check the spelling"):
        resolve("org/other")


def test_an_unreachable_hub_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(BadCheckpoint, match=r"'org/model' could not be downloaded \(.*\); check network and disk"):
        resolve("org/model")
