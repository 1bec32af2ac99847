"""Two experts at once: a second thread computes half of the ready pieces on a CPU with few cores.

A matrix–vector product of one expert is too small for OpenMP: two threads of it reach about 1.4 times the speed of
one, two experts side by side, each on one thread, about 1.9 times (docs/LOG.md). Called by the experts function while
decoding on a CPU. The same piece gives the same bits on either thread, since each uses one. Knows nothing of experts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

MOST_CORES = 4  # measured on two; with more, OpenMP has enough cores to win by itself

A = TypeVar("A")
B = TypeVar("B")


class Crew:
    """The caller's thread and one more. `map` is not reentrant; `close` ends the thread."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._go = threading.Lock()
        self._done = threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._work: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="moepic-crew", daemon=True)
        self._thread.start()

    @classmethod
    def for_machine(cls) -> Crew | None:
        """A crew where it pays: between two cores and `MOST_CORES`."""
        return cls() if 2 <= len(os.sched_getaffinity(0)) <= MOST_CORES else None

    def map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """`[function(item) for item in items]`, every other item on the second thread, each on a single core."""
        torch.set_num_threads(1)
        self._error = None
        try:
            if len(items) < 2:
                return [function(item) for item in items]
            theirs: list[B] = []

            def work() -> None:
                theirs.extend(function(item) for item in items[1::2])

            self._work = work
            self._go.release()
            try:
                mine = [function(item) for item in items[0::2]]
            finally:
                self._done.acquire()
        finally:
            torch.set_num_threads(self._threads)
        if self._error is not None:
            raise self._error
        results: list[B] = [*mine, *theirs]
        results[0::2], results[1::2] = mine, theirs
        return results

    def close(self) -> None:
        self._work = None
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while True:
                self._go.acquire()
                if self._work is None:
                    return
                try:
                    self._work()
                except BaseException as error:  # handed to the caller of `map`, whatever it is
                    self._error = error
                self._done.release()
