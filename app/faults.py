"""A failure as one sentence: what happened, and which setting helps. Pure.

The core explains what it expects to go wrong (`MoepicError`). Here are the failures that it cannot know: a GPU that is
lost, memory and disks that are full in the middle of something, and our own mistakes, of which the console shows all.
"""

from __future__ import annotations

import errno
import logging
import re

from moepic_core.errors import DeviceFailed, MoepicError

LOST_GPU = re.compile(r"(?:CUDA|HIP) (?:error|driver)|(?:CUBLAS|CUDNN)_STATUS|device-side assert")
NO_MEMORY = re.compile(r"out of memory|can't allocate memory")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("moepic")


class EngineFailed(MoepicError):
    """The engine ended in the middle of its work, in a way that it does not know."""


def explained(error: BaseException) -> MoepicError:
    """`error` as one that the page can show; the console gets the whole of what nobody expects."""
    what_failed = error.__cause__ if isinstance(error, DeviceFailed) else None  # its own words are not for a page
    words = str(what_failed or error).partition("\n")[0]
    if LOST_GPU.search(words):
        sentence = (
            f"the GPU stopped working ({words}); start MoEpic again, and lower the budget or choose --device cpu if it "
            "happens again"
        )
    elif isinstance(error, MoepicError):
        return error
    elif isinstance(error, MemoryError) or NO_MEMORY.search(words):
        sentence = f"memory ran out ({words}); lower the budget or the context, or close other programs"
    elif isinstance(error, OSError) and error.errno in NO_ROOM:
        sentence = "the disk is full; free some room, or choose another folder with MOEPIC_HOME"
    else:
        what = ": ".join(filter(None, [type(error).__name__, words]))
        sentence = f"the engine failed by a mistake of ours ({what}), the console shows it; press Reload if it goes on"
    if not isinstance(error, MoepicError):
        log.error("%s", sentence, exc_info=error)
    return EngineFailed(sentence)
