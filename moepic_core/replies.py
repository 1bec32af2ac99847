"""The making of a reply: reads the prompt in chunks, then makes a token per pass until the reply ends.

`Engine.generate` begins one; one is made at a time. It computes only while its caller asks for the next event, and
holds the turn only for a pass, so between two events anybody may change the budget. However it ends, by itself, by a
stop, by a failure or because the caller drops it, the engine is ready for the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from .assembly import Parts
from .errors import BadSettings, Cancelled, TransferFailed
from .events import Done, Event, FinishReason, Notice, PromptRead, TokenMade
from .governor import Governor
from .hf.text import Sampler, Sampling
from .passes import Passes
from .spec import Plan


class Replies:
    def __init__(self, parts: Parts, governor: Governor, passes: Passes) -> None:
        self._parts = parts
        self._governor = governor
        self._passes = passes
        self._turn = parts.turn
        self._residency = parts.residency

    def begin(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        """Events of the reply to the prompt `ids`. Raises BadSettings for one that cannot be, or while another runs."""
        if not ids:
            raise BadSettings("the prompt is empty; give at least one token")
        if len(ids) >= self._parts.context_length:
            raise BadSettings(
                f"the prompt has {len(ids)} tokens and leaves no room in a context of {self._parts.context_length}; "
                f"shorten it or raise context_length (the model allows {self._parts.spec.context_length})"
            )
        self._turn.begin_reply()
        reply = self._reply(ids, sampling)
        next(reply)  # it has begun, so closing it tidies up even when no event was taken
        return reply

    def _reply(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        """What `_tokens` does, with text."""
        made: list[int] = []
        text = ""
        stream = self._parts.text.stream()
        telemetry, plan = self._residency.telemetry, self._governor.plan
        try:
            yield PromptRead(0, len(ids), 0)  # for `begin` alone
            reason: FinishReason = "stopped"
            for event in self._tokens(list(ids), sampling):
                if isinstance(event, TokenMade):
                    self._parts.steering.count_token()
                    made.append(event.token_id)
                    piece = "" if event.token_id in self._parts.text.stop_ids else stream.push(event.token_id)
                    text += piece
                    event = replace(event, text=piece)
                elif isinstance(event, Done):
                    reason = event.reason
                    continue
                yield event
            yield Done(reason, tuple(made), text)
        finally:
            with self._turn.held():
                self._turn.end_reply()
                if not self._turn.closed:
                    self._residency.end_reply()
                telemetry.end_reply()
                if not self._turn.closed:
                    self._tidy_up(plan)

    def _tidy_up(self, begun: Plan) -> None:
        """After a reply: what was learnt makes a new plan when that is due."""
        if self._residency.telemetry is self._parts.steering.telemetry and self._governor.plan is begun:
            self._parts.steering.follow(begun)
        if self._parts.steering.due:
            self._governor.renew()
            # Another split ratio has emptied the cache; what fails here will be loaded when it is needed.
            with suppress(Cancelled, TransferFailed):
                self._residency.warm_up()

    def _tokens(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        """Prefill in chunks, then one token per pass, until an end; a stop ends it quietly."""
        telemetry = self._residency.telemetry
        prompt_tokens = len(ids)
        with self._turn.held():
            cached = self._parts.hf.reuse_prefix(ids)
            telemetry.begin_reply(time.perf_counter(), prompt_tokens, cached)
            self._residency.begin_reply()
        try:
            sampler = Sampler(sampling, self._parts.hf.device)
            for start in range(cached, prompt_tokens, self._passes.chunk):
                stop = min(start + self._passes.chunk, prompt_tokens)
                logits, token, notice = self._pass(ids[:stop])
                telemetry.read_prompt(stop - start)
                if notice:
                    yield Notice(notice)
                yield PromptRead(stop - cached, prompt_tokens - cached, cached)
            while True:
                ids.append(sampler.next(logits, ids))
                telemetry.new_token(token, time.perf_counter())
                yield TokenMade(ids[-1], "")
                reason = self._finished(ids, len(ids) - prompt_tokens, sampling)
                if reason is not None:
                    yield Done(reason, (), "")
                    return
                logits, token, notice = self._pass(ids)
                if notice:
                    yield Notice(notice)
        except Cancelled:
            return

    def _pass(self, ids: list[int]) -> tuple[Tensor, int, str | None]:
        with self._turn.working():
            return self._passes.run_or_shrink(ids)

    def _finished(self, ids: list[int], made: int, sampling: Sampling) -> FinishReason | None:
        if ids[-1] in self._parts.text.stop_ids and not sampling.ignore_eos:
            return "stop"
        if made >= sampling.max_new_tokens:
            return "length"
        if len(ids) >= self._parts.context_length:
            return "context"
        return "stopped" if self._turn.stop.is_set() else None
