"""Which checkpoints the page can offer, and where a name that the user picked or typed leads to.

A name is a demo, a folder, or a hub id. A folder may also hold checkpoints, then those are offered. Nothing is
downloaded here: a hub id that is not wholly on this machine has no folder, and loading it fetches what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepic_core import finder
from moepic_core.errors import BadCheckpoint
from moepic_core.finder import CheckpointEntry

from . import demo_checkpoint

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "demo-moe"


def default_name() -> str:
    """What is loaded when the user names nothing: the checkpoint that comes with the application, else a random one."""
    return str(BUNDLED) if (BUNDLED / "config.json").is_file() else demo_checkpoint.NAME


def title(name: str) -> str:
    """What people call checkpoint `name`."""
    if name == demo_checkpoint.NAME:
        return "Demo, random weights"
    if name == str(BUNDLED):
        return "Demo, comes with MoEpic"
    return Path(name).name if Path(name).is_absolute() else name


def first_settings(name: str) -> dict[str, Any]:
    """What differs from the defaults until something else is chosen: with all of a demo cached nothing would travel."""
    return {"vram": "50% of experts"} if name in (demo_checkpoint.NAME, str(BUNDLED)) else {}


def entries(current: str, folders: Sequence[str]) -> list[CheckpointEntry]:
    """The lines of the picker: a demo, `folders` and what they hold, the Hugging Face cache, and `current`."""
    names = list(dict.fromkeys([default_name(), *folders, current]))
    found = [entry for name in names for entry in _entries(name)]
    cached = finder.list_cached()
    found += sorted(cached, key=lambda entry: entry.spec is None)  # of several revisions the complete one
    if current not in [entry.name for entry in found]:
        found.append(_problem(current, None))
    return list({entry.name: entry for entry in reversed(found)}.values())[::-1]


def held_by(name: str) -> list[CheckpointEntry]:
    """The checkpoints below folder `name`, when it is none itself."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():
        return []
    return finder.list_folder(folder)


def _entries(name: str) -> list[CheckpointEntry]:
    folder = demo_checkpoint.demo_checkpoint() if name == demo_checkpoint.NAME else Path(name).expanduser()
    if not folder.is_dir():
        return []
    return [dataclasses.replace(entry, name=name) if entry.path == folder else entry
            for entry in finder.list_folder(folder)]  # fmt: skip


def _problem(name: str, problem: str | None) -> CheckpointEntry:
    return CheckpointEntry(name, Path(name), None, None, problem, incomplete=False)


def folder(name: str) -> Path | None:
    """The folder of checkpoint `name` on this machine, or None for a hub id that would have to be downloaded.

    Raises a MoepicError when `name` is neither a folder nor a hub id.
    """
    if name == demo_checkpoint.NAME:
        return demo_checkpoint.demo_checkpoint()
    entry = _cached(name)
    if entry is not None and entry.spec is not None:
        return entry.path
    if entry is not None and not entry.incomplete:
        raise BadCheckpoint(entry.problem or name)
    return None if entry is not None or _may_be_hub_id(name) else finder.resolve(name)


def missing(name: str) -> str | None:
    """What hub id `name` still lacks on this machine, in words; None when none of it is here."""
    entry = _cached(name)
    return entry.problem if entry is not None and entry.incomplete else None


def _cached(name: str) -> CheckpointEntry | None:
    """The line of hub id `name` in the cache, the complete one of several revisions."""
    if not _may_be_hub_id(name):
        return None
    found = [entry for entry in finder.list_cached() if entry.name == name]
    return min(found, key=lambda entry: entry.spec is None, default=None)


def _may_be_hub_id(name: str) -> bool:
    return name[:1].isalnum() and name.count("/") <= 1 and not Path(name).is_dir()
