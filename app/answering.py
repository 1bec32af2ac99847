"""One answer: a thread has the engine make it, and whoever asked gets the text so far, again and again as it grows.

`state` calls it, for one answer at a time. No request of the page waits for a forward pass, so a stop is noticed at
once and takes effect within one layer. Closing the iterator between two texts ends the answer and its thread too.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from moepic_core.events import Done, FinishReason, Notice, PromptRead, TokenMade

from . import conversation
from .board import Board
from .faults import explained
from .nouns import Answer

if TYPE_CHECKING:
    from moepic_core.engine import Engine, Prompt
    from moepic_core.hf.text import Message

UPDATE_S = 0.045  # the browser needs 8 ms to draw an answer anew: about 20 times a second is smooth and cheap
CALM_TURNS = 5  # updates without news between two that are told nevertheless


def prompt_of(engine: Engine, messages: Sequence[Message]) -> Prompt:
    """`messages` as the model reads them: a conversation, or the text to continue where it has no chat template."""
    return messages if engine.text.has_chat_template else conversation.as_text(messages)


def answers(
    engine: Engine, messages: Sequence[Message], sampling: dict[str, Any], stopped: Callable[[], bool], board: Board
) -> Iterator[Answer]:
    """The answer to `messages` so far, until it is complete or `stopped` says so. Raises a MoepicError."""
    from moepic_core.hf.text import Sampling

    making = Making(engine, board)
    wanted = Sampling(**sampling)
    num_shown = 0
    with ThreadPoolExecutor(1, "reply") as thread:
        working = thread.submit(making.run, prompt_of(engine, messages), wanted)
        try:
            for turn in itertools.count():
                done = bool(wait([working], UPDATE_S).done)
                if stopped() and not making.closed.is_set():
                    making.close()
                if num_shown < len(making.pieces) or turn % CALM_TURNS == 0:
                    num_shown = len(making.pieces)
                    yield making.answer(num_shown)
                if done and num_shown == len(making.pieces):
                    break
            error = working.exception()
            if error is not None:
                raise explained(error) from error
            figures = engine.snapshot().reply
            yield dataclasses.replace(making.answer(num_shown), reason=making.reason, figures=figures)
        finally:
            making.close()


class Making:
    """What the thread has made so far."""

    def __init__(self, engine: Engine, board: Board) -> None:
        self.pieces: list[str] = []
        self.reason: FinishReason = "stopped"
        self.closed = threading.Event()  # the engine forgets a stop from before the reply has begun; this does not
        self._read = Answer()
        self._engine = engine
        self._board = board

    def run(self, prompt: Prompt, sampling: Any) -> None:
        for event in self._engine.generate(prompt, sampling):
            if self.closed.is_set():
                return
            if isinstance(event, TokenMade):
                self.pieces.append(event.text)
            elif isinstance(event, PromptRead):
                self._read = Answer(read_tokens=event.read, prompt_tokens=event.total)
            elif isinstance(event, Notice):
                self._board.tell("info", event.text)
            elif isinstance(event, Done):
                self.reason = event.reason

    def answer(self, num_pieces: int) -> Answer:
        return dataclasses.replace(self._read, text="".join(self.pieces[:num_pieces]))

    def close(self) -> None:
        self.closed.set()
        self._engine.request_stop()
