"""Child processes under a limit of memory in which the page cache counts: a cgroup of their own. Needs root.

`capped_decode` runs every system so. Both versions of cgroups; swap is shut off where it is accounted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
Ended = subprocess.CompletedProcess[str]
_GONE_S = 5.0  # how long a dead process may still be in its cgroup


class NoCap(Exception):
    """This machine cannot limit a process's memory; the sentence says why."""


@dataclass(frozen=True)
class _Kind:
    parent: Path  # where new cgroups are made
    limit_file: str
    swap_file: str
    swap_includes_memory: bool
    peak_file: str


@dataclass(frozen=True)
class Cap:
    folder: Path
    peak_file: str

    def run(self, command: Sequence[str], timeout_s: float, environment: Mapping[str, str]) -> Ended:
        """`command` inside; what it printed and how it ended (-9: killed, mostly for its memory)."""
        enter = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"))
        try:
            return subprocess.run(
                (*enter, *command), capture_output=True, text=True, timeout=timeout_s, env=environment
            )
        except subprocess.TimeoutExpired:
            return Ended(command, -9, "", f"took longer than {timeout_s:.0f} s")

    @property
    def peak_bytes(self) -> int:
        """Most memory so far, page cache included."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def capped(nbytes: int, mount: Path = MOUNT) -> Iterator[Cap]:
    """A cgroup of at most `nbytes`, removed afterwards. Raises NoCap."""
    kind = _kind(mount)
    folder = kind.parent / f"moepic-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / kind.limit_file).write_text(str(nbytes))
        if (folder / kind.swap_file).exists():
            (folder / kind.swap_file).write_text(str(nbytes if kind.swap_includes_memory else 0))
    except OSError as error:
        raise NoCap(f"cannot limit memory in {kind.parent}: {error.strerror}; run this as root") from error
    try:
        yield Cap(folder, kind.peak_file)
    finally:
        _remove(folder)


def _kind(mount: Path) -> _Kind:
    """The version of cgroups that limits memory here."""
    if (mount / "memory" / "memory.limit_in_bytes").exists():
        swap = "memory.memsw.limit_in_bytes"
        return _Kind(mount / "memory", "memory.limit_in_bytes", swap, True, "memory.max_usage_in_bytes")
    subtree = mount / "cgroup.subtree_control"
    if subtree.exists() and "memory" in subtree.read_text().split():
        return _Kind(mount, "memory.max", "memory.swap.max", False, "memory.peak")
    raise NoCap(f"no process can be limited in memory here: {mount} has no cgroups for memory; use another machine")


def _remove(folder: Path) -> None:
    """Waits until what died inside is gone."""
    deadline_s = time.monotonic() + _GONE_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
