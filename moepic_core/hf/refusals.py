"""What Transformers says about files that it cannot use, as our own error. `loading` and `text` call it.

Its config and tokenizer classes run on values that nobody has checked, so they end in whatever Python or their
libraries throw: a word for a number is a TypeError, a zero a ZeroDivisionError, a wrong list an error of a validator.
Every exception is the files' fault here, but two kinds that pass unchanged: what came back through our own code, which
Transformers calls while it loads, and a memory that is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from ..arena import is_out_of_memory
from ..errors import BadCheckpoint

_OURS = __name__.partition(".")[0]
_LONGEST = 300  # letters of what a library says


@contextmanager
def refusals(what: str, advice: str) -> Iterator[None]:
    """Turns what is thrown inside into `BadCheckpoint`: "Transformers cannot load {what}: …; {advice}"."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error) or _came_through_us(error.__traceback__):
            raise
        raise BadCheckpoint(f"Transformers cannot load {what}: {_words(error)}; {advice}") from error


def _came_through_us(traceback: TracebackType | None) -> bool:
    """Whether code of ours ran below the foreign code that was called."""
    foreign = False
    while traceback is not None:
        package = traceback.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        if foreign and package == _OURS:
            return True
        foreign = foreign or package != _OURS
        traceback = traceback.tb_next
    return False


def _words(error: Exception) -> str:
    """What the library says, on one line."""
    words = " ".join(str(error).split())
    if isinstance(error, KeyError):
        return f"it knows no {words}"
    if len(words) > _LONGEST:
        words = f"{words[:_LONGEST]} …"
    return words.rstrip(".") or type(error).__name__
