"""A child process of low priority, for work that would take the interpreter from the model: planning, replaying.

`explorer` and `forecasts` call it. Functions and arguments travel as pickles, so both are plain; neither this module
nor what it is given to call may import torch, or the child needs seconds to begin. It lives as long as the work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from .jobs import Tell

TELL_S = 0.2  # between two looks at whether it shall stop

Away = Callable[..., Any]  # calls a function with its arguments elsewhere and returns what it returns


def child() -> ProcessPoolExecutor:
    """The process itself, to be closed by `with`."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    return ProcessPoolExecutor(1, context, _step_back)


@contextmanager
def elsewhere(tell: Tell) -> Iterator[Away]:
    """Gives a function that calls others there; stops when `tell` raises."""
    with child() as process:

        def away(say: tuple[float, str], function: Callable[..., Any], *arguments: Any) -> Any:
            answer = process.submit(function, *arguments)
            tell(*say)
            while not wait([answer], TELL_S).done:
                tell(*say)
            return answer.result()

        yield away


def _step_back() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the server, which then ends its children
    os.nice(10)
