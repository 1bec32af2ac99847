"""What every tab is told, whoever caused it: one notice, and that previews may say something else now.

`state` reads it for each look; it, the loader and whoever makes answers write to it, from any thread.
"""

from __future__ import annotations

import threading
from typing import Literal

from .nouns import Notice


class Board:
    def __init__(self) -> None:
        self.notice: Notice | None = None
        self.changes = 0  # grows when what a preview says may have changed
        self._num_notices = 0
        self._lock = threading.Lock()

    def tell(self, kind: Literal["error", "info"], text: str) -> None:
        """Shows `text` until something newer or better happens."""
        with self._lock:
            self._num_notices += 1
            self.notice = Notice(self._num_notices, kind, text)

    def clear(self) -> None:
        """What was wrong is not any more, or the user tries something else."""
        with self._lock:
            self.notice = None

    def changed(self) -> None:
        with self._lock:
            self.changes += 1
