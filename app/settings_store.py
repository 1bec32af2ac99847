"""What was chosen on the page, for each checkpoint, in one JSON file that outlives the application.

The state asks it which settings a checkpoint has, the panels tell it what was chosen; nobody else knows the file. What
the command line says wins over what was kept, until the page changes it, and is not kept itself. A file or a row that
is missing, damaged or of another version counts as never kept. A file that cannot be written costs no more than that:
the choices hold until the end, and `problem` says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepic_core.calibrate import probe
from moepic_core.errors import BadSettings
from moepic_core.links import parse_link
from moepic_core.spec import Settings

from . import checkpoints
from .store import default_path

KEPT = ("vram", "strategy", "split", "eviction", "prefetch", "link", "context_length")
LIVE = ("vram", "strategy", "split", "eviction", "prefetch")  # of these; the others need a load
VERSION = 1
MOST_FOLDERS = 50  # that the picker remembers


def settings_path() -> Path:
    """Beside the conversations."""
    return default_path().with_name("settings.json")


class SettingsStore:
    """See the module. `path` None keeps everything in memory; `given` is what the command line says."""

    def __init__(self, path: Path | None = None, given: Mapping[str, Any] | None = None) -> None:
        self.problem: str | None = None  # a sentence while the file cannot be written
        self._path = path
        self._given = dict(given or {})
        self._device = probe(self._given.get("device", "auto")).device
        self._lock = threading.Lock()
        self._chosen: dict[str, Settings] = {}  # since the start
        self._memory: dict[str, Any] = {}  # what the file says, or would say if there were one

    def of(self, checkpoint: str) -> Settings:
        """What was chosen for `checkpoint` since the start, else what the command line says, else what was kept."""
        if checkpoint in self._chosen:
            return self._chosen[checkpoint]
        start = {"checkpoint": checkpoint, **checkpoints.first_settings(checkpoint)}
        try:
            settings = Settings.create(**{**start, **self._row(checkpoint)})
            parse_link(settings.link, self._device)  # the machine may have a GPU now
        except (BadSettings, TypeError):
            settings = Settings.create(**start)
        return settings.replace(**self._given)

    def keep(self, checkpoint: str, **changes: Any) -> Settings:
        """Notes `changes` that the page made, and returns all settings. Raises BadSettings for impossible ones."""
        settings = self.of(checkpoint).replace(**changes)
        start = Settings.create(checkpoint=checkpoint, **checkpoints.first_settings(checkpoint))
        with self._lock:
            self._chosen[checkpoint] = settings
            kept = self._read()
            row = {**self._rows(kept).get(checkpoint, {}), **{name: changes[name] for name in KEPT if name in changes}}
            row = {name: value for name, value in row.items() if value != getattr(start, name, None)}
            rows = {**self._rows(kept), checkpoint: row}
            self._write({**kept, "checkpoints": {name: row for name, row in rows.items() if row}})
        return settings

    @property
    def reserved_bytes(self) -> int:
        """Device memory that other programs may have, whatever the checkpoint: it is a property of the machine."""
        value = self._read().get("reserved_bytes")
        return value if isinstance(value, int) and value > 0 else 0

    def reserve(self, nbytes: int) -> None:
        with self._lock:
            self._write({**self._read(), "reserved_bytes": nbytes})

    def sampling(self, checkpoint: str) -> dict[str, Any]:
        """What `keep_sampling` was told for `checkpoint`; from a file that anybody may have written."""
        return self._rows(self._read(), "sampling").get(checkpoint, {})

    def keep_sampling(self, checkpoint: str, values: Mapping[str, Any]) -> None:
        """How answers shall be drawn where a conversation with `checkpoint` begins; nothing forgets it."""
        with self._lock:
            kept = self._read()
            rows = {**self._rows(kept, "sampling"), checkpoint: dict(values)}
            self._write({**kept, "sampling": {name: row for name, row in rows.items() if row}})

    @property
    def folders(self) -> list[str]:
        """Folders that the user typed, the newest first: checkpoints, or folders that hold some."""
        folders = self._read().get("folders")
        return [folder for folder in folders if isinstance(folder, str)] if isinstance(folders, list) else []

    def remember(self, folder: str) -> None:
        with self._lock:
            folders = [folder, *(other for other in self.folders if other != folder)]
            self._write({**self._read(), "folders": folders[:MOST_FOLDERS]})

    def _row(self, checkpoint: str) -> dict[str, Any]:
        row = self._rows(self._read()).get(checkpoint, {})
        return {name: row[name] for name in KEPT if name in row}

    def _rows(self, kept: dict[str, Any], kind: str = "checkpoints") -> dict[str, dict[str, Any]]:
        rows = kept.get(kind)
        return {name: row for name, row in rows.items() if isinstance(row, dict)} if isinstance(rows, dict) else {}

    def _read(self) -> dict[str, Any]:
        """What is kept; another process may have written it."""
        if self._path is None or self.problem is not None:
            return self._memory
        try:
            kept = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return self._memory
        return kept if isinstance(kept, dict) and kept.get("version") == VERSION else self._memory

    def _write(self, kept: dict[str, Any]) -> None:
        self._memory = {**kept, "version": VERSION}
        if self._path is None:
            return
        try:
            _replace(self._path, json.dumps(self._memory, indent=1))
            self.problem = None
        except OSError as error:
            self.problem = f"settings are not being kept: {error.strerror} ({self._path}); they hold until the end"


def _replace(path: Path, text: str) -> None:
    """The old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
