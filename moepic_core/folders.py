"""Where things that outlive a session are kept: packed experts, calibrations, routing of earlier sessions."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder() -> Path:
    """MOEPIC_HOME, or `moepic` in the user's cache folder. Not made here."""
    base = os.environ.get("MOEPIC_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "moepic"
    return Path(base).expanduser()
