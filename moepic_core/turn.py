"""Whose turn it is to compute: a forward pass, a change between passes, or a measurement between replies.

Made by `assembly`; the engine and its parts hold it. A reply takes the turn for one forward pass and gives it back at
each event, so every event is a token boundary: who changes the budget or closes the engine from another thread waits
for at most one pass. Setting `stop` ends the running pass within one layer. Knows nothing of what is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import BadSettings, MoepicError


class Turn:
    def __init__(self) -> None:
        self.stop = threading.Event()
        self.closed = False
        self._replying = False
        self._lock = threading.RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else computes within; also after closing, for tidying up."""
        with self._lock:
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """The turn of a loaded model. Raises MoepicError once it is closed."""
        with self._lock:
            if self.closed:
                raise MoepicError("the model was unloaded; load it again")
            yield

    @contextmanager
    def between_replies(self) -> Iterator[None]:
        """The turn while no reply is under way. Raises BadSettings during one."""
        with self.working():
            if self._replying:
                raise BadSettings("a reply is being generated already; stop it or wait until it is done")
            yield

    def begin_reply(self) -> None:
        """From now on a reply is under way, and no stop has been asked for. Raises as `between_replies`."""
        with self.between_replies():
            self._replying = True
            self.stop.clear()

    def end_reply(self) -> None:
        self._replying = False
