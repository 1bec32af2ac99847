"""Find checkpoints: a folder, an id in the local Hugging Face cache, or a download from the hub.

The engine calls `resolve` with what the user typed, the page fills its picker from `list_cached` and `list_folder`. A
complete local copy is used without asking the network. Through huggingface_hub, which only this file imports,
`HF_HOME`, `HF_HUB_OFFLINE` and the user's token have their usual meaning.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import tqdm, validate_repo_id  # type: ignore[attr-defined]

from .checkpoint import read_spec
from .errors import BadCheckpoint
from .model_config import ModelConfig
from .shards import check_complete
from .spec import ModelSpec

# Weights in safetensors, configs, tokenizers and chat templates of the top folder: no code and no pickles, and neither
# the second copy of the weights that some authors keep in a folder of its own or under the name `consolidated`.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*"]
MOST_KNOWN = 256  # folders whose headers are remembered

Progress = Callable[[int, int], None]  # bytes on disk, bytes wanted as far as known; may raise Cancelled


@dataclass(frozen=True)
class CheckpointEntry:
    """One line of the picker: either `spec` or `problem` is set."""

    name: str  # what `resolve` takes: a hub id or a folder
    path: Path
    revision: str | None  # branch, tag or commit in the hub cache; None for a folder
    spec: ModelSpec | None
    problem: str | None  # why it cannot be loaded, one sentence
    incomplete: bool  # the problem is that weight files are missing; for a hub id `resolve` downloads them


def resolve(name: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of checkpoint `name`: itself, the snapshot in the hub cache, or a fresh download with `progress`.

    `revision` (branch, tag or commit; None: main) matters for hub ids only. Raises BadCheckpoint when there is no such
    folder or hub id, or it is not complete here and cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if name.strip() and folder.is_dir():
        return folder
    if name.strip() and folder.is_file():
        raise BadCheckpoint(f"{name!r} is a file; give the folder that holds config.json and *.safetensors")
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise BadCheckpoint(
            f"{name!r} is neither a folder nor a hub id; give a folder with config.json, or an id such as org/model"
        ) from error
    snapshot = _snapshot(name, revision)
    gap = _gap(snapshot) if snapshot else "it is not in the local cache"
    if snapshot and not gap:
        return snapshot
    if constants.is_offline_mode():
        raise BadCheckpoint(f"{name!r} is no folder; as a hub id: {gap}; the network is off, so unset HF_HUB_OFFLINE")
    return _download(name, revision, progress)


def list_cached() -> list[CheckpointEntry]:
    """Mixture-of-Experts checkpoints in the local Hugging Face cache, by name, those with a problem included."""
    cache = Path(constants.HF_HUB_CACHE)
    if not cache.is_dir():
        return []
    found = [
        _entry(repo.repo_id, revision.snapshot_path, min(revision.refs, default=revision.commit_hash))
        for repo in scan_cache_dir(cache).repos
        for revision in repo.revisions
        if repo.repo_type == "model"
    ]
    return sorted(filter(None, found), key=lambda entry: (entry.name.lower(), entry.revision or ""))


def list_folder(path: str | Path) -> list[CheckpointEntry]:
    """Mixture-of-Experts checkpoints in the folder `path` and two levels below it (`org/model`), by name."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise BadCheckpoint(f"{root} is not a folder; give one that holds checkpoints")
    return list(filter(None, (_entry(str(folder), folder, None) for folder in _folders(root, levels=2))))


def _folders(root: Path, levels: int) -> Iterator[Path]:
    if (root / "config.json").is_file():
        yield root
    elif levels:
        for child in sorted(root.glob("*/")):
            yield from _folders(child, levels - 1)


def _entry(name: str, folder: Path, revision: str | None) -> CheckpointEntry | None:
    """The line for `folder`, or None when there is no Mixture-of-Experts model in it."""
    return _read_entry(name, folder, revision, tuple(sorted(map(_state, folder.iterdir()))))


def _state(path: Path) -> tuple[str, int, int]:
    """Name, time and size: a file that was written again differs in one of them. A link to nothing has neither."""
    try:
        found = path.stat()
    except OSError:
        return path.name, 0, 0
    return path.name, found.st_mtime_ns, found.st_size


@functools.lru_cache(MOST_KNOWN)
def _read_entry(name: str, folder: Path, revision: str | None, _: tuple[Any, ...]) -> CheckpointEntry | None:
    """Reads the headers of all files of `folder`, as long as they are in the same state only once."""
    try:
        config = ModelConfig(folder)
    except BadCheckpoint as error:
        if not (folder / "config.json").is_file():
            return None
        return CheckpointEntry(name, folder, revision, None, str(error), incomplete=False)
    if not config.names_experts:
        return None
    try:
        return CheckpointEntry(name, folder, revision, read_spec(folder), None, incomplete=False)
    except BadCheckpoint as error:
        incomplete = config.quantization is None and _gap(folder) is not None
        return CheckpointEntry(name, folder, revision, None, str(error), incomplete)


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub id in the local cache, complete or not."""
    config = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _gap(folder: Path) -> str | None:
    """Which weight files `folder` lacks, in words, or None when it is complete."""
    try:
        check_complete(folder)
    except BadCheckpoint as error:
        return str(error)
    return None


def _download(name: str, revision: str | None, progress: Progress | None) -> Path:
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=constants.HF_HUB_CACHE,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            tqdm_class=_byte_counter(progress) if progress else None,
        )
    except errors.GatedRepoError as error:
        raise BadCheckpoint(
            f"{name!r} is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        where = f"a hub id with revision {revision!r}" if revision else "a public hub id"
        raise BadCheckpoint(f"{name!r} is neither a folder nor {where}; check the spelling or log in") from error
    # HTTPError is the base of the hub's HTTP client, whose name differs between versions of huggingface_hub.
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        reason = str(error).strip().partition("\n")[0]
        raise BadCheckpoint(
            f"{name!r} could not be downloaded ({reason}); check network and disk, try again"
        ) from error
    check_complete(Path(folder))
    return Path(folder)


def _byte_counter(progress: Progress) -> type[tqdm]:
    """A progress bar that draws nothing and tells `progress` about the bytes of the whole download."""
    lock = threading.Lock()  # files are fetched by several threads

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Beside this bar the hub keeps one that counts files and one for bytes before decompression.
            self.reports = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
            if self.reports:
                progress(int(self.n), int(self.total or 0))

    return ByteCounter
