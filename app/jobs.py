"""Work that takes longer than a request: one piece at a time in a thread of its own, with progress, stop and result.

What the page asks for on demand (a comparison, a picture, a report) runs in a `Job` each; routes start it, stop it and
read `view`. The work tells how far it is, and is told to stop there. What goes wrong becomes one sentence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from moepic_core.errors import BadSettings, Cancelled

from .faults import explained

Tell = Callable[[float, str], None]  # share done, what is going on; raises Cancelled when it shall stop


class Job:
    """See the module. `name` is for the thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()  # held for assignments only
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._progress: tuple[float, str] = (0.0, "")
        self._error: str | None = None
        self.result: Any = None  # of the newest work that was completed

    def start(self, work: Callable[[Tell], Any]) -> None:
        """Raises BadSettings while another one is going on."""
        with self._lock:
            if self._thread is not None:
                raise BadSettings("this is being worked out already; wait for it or stop it")
            self._stop.clear()
            self._error, self._progress = None, (0.0, "")
            self._thread = threading.Thread(target=self._run, args=(work,), name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """The work ends where it next tells of itself."""
        self._stop.set()

    def close(self) -> None:
        self.stop()
        self.wait()

    def wait(self) -> None:
        """Until nothing is going on."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def view(self) -> dict[str, Any]:
        """For JSON: whether it runs, how far it is, what went wrong the last time."""
        with self._lock:
            (share, text), running = self._progress, self._thread is not None
            return {"running": running, "share": share, "text": text, "error": self._error}

    def _tell(self, share: float, text: str) -> None:
        if self._stop.is_set():
            raise Cancelled("stopped")
        self._progress = (share, text)

    def _run(self, work: Callable[[Tell], Any]) -> None:
        error: str | None = None
        try:
            self.result = work(self._tell)
        except Cancelled:
            error = "stopped"
        except Exception as problem:  # whatever it is, the page shows one sentence and the console the rest
            error = str(explained(problem))
        with self._lock:
            self._error, self._thread = error, None
