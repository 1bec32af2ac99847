"""Every failure that a user or a machine can cause, one short sentence each.

A message says what is wrong, what was found, what is allowed and what to do. Our own mistakes are assertions, not
these. The CLI prints the message on one line and exits with 2; the page shows it and keeps conversation and settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoepicError(Exception):
    """Base of all expected failures."""


class BadSettings(MoepicError):
    """A setting is unknown, malformed or out of range."""


class BadCheckpoint(MoepicError):
    """A checkpoint is missing, damaged, unsafe or of a kind that is not supported."""


class OutOfRoom(MoepicError):
    """A memory or disk budget cannot hold what was asked for."""


class TransferFailed(MoepicError):
    """Bytes could not be brought to the device, after retries."""


class DeviceFailed(TransferFailed):
    """The device itself has failed: neither bytes nor answers come from it until the program starts again."""

    def __init__(self, reason: BaseException) -> None:
        first_line = str(reason).partition("\n")[0]  # the rest of what CUDA says is for those who write kernels
        super().__init__(f"the GPU has failed ({first_line}); end MoEpic and start it again")


class Cancelled(MoepicError):
    """The user asked to stop; nothing is wrong."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest allowed word, or the full stop of the sentence when none is close."""
    matches = difflib.get_close_matches(word, list(allowed), n=1)
    return f", did you mean '{matches[0]}'?" if matches else "."
