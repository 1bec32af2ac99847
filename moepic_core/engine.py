"""The whole: loads a checkpoint under a budget, generates, changes its budget while it does, and says what happened.

The composition root; nothing below imports it. One generation runs at a time. Compute holds the turn (a lock) for one
forward pass and gives it back at each event, so every event is a token boundary: whoever calls `reconfigure` or
`close` from another thread waits for at most one pass.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .arena import is_out_of_memory
from .assembly import Parts, Progress, assemble
from .cost_fit import Run
from .costs import Costs, LinkSpeed
from .errors import BadSettings, Cancelled, MoepicError, OutOfRoom, TransferFailed
from .events import Done, Event, FinishReason, Notice, PromptRead, TokenMade
from .hf.text import Message, Sampler, Sampling
from .link_probe import probe_link
from .memory import Memory
from .metrics import Snapshot
from .needs import context_length, free_for_budget
from .planner import budget_bytes, uniform_plan
from .routing import RoutingTrace
from .spec import Plan, Settings
from .units import format_bytes

LIVE_SETTINGS = ("vram", "strategy", "split", "eviction", "prefetch")  # applied without reloading
_REHEARSAL = "The quick brown fox jumps over the lazy dog, and then it counts: 1, 2, 3, 4, 5."
_FEWEST, _MOST = 3, 48  # tokens of a rehearsal

Prompt = str | Sequence[int] | Sequence[Message]


class Engine:
    def __init__(self, parts: Parts) -> None:
        """Puts loaded parts to work; `Engine.load` makes them."""
        self.settings = parts.settings
        self.spec = parts.spec
        self.machine = parts.machine
        self.link = parts.link
        self.hf = parts.hf
        self.text = parts.text
        self.residency = parts.residency
        self.needs = parts.needs
        self.steering = parts.steering
        self.notices = list(parts.notices)
        self.context_length = context_length(parts.settings, parts.spec)
        self._turn = threading.RLock()
        self._stop = parts.stop
        self._generating = False
        self._closed = False

    @classmethod
    def load(
        cls,
        settings: Settings,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        memory: Path | None = None,
    ) -> Engine:
        """Everything from a checkpoint's name to an engine that can generate.

        Raises a MoepicError with one sentence; nothing is left behind then. `cancelled` stops the loading. `memory` is
        the folder where measurements and routing statistics outlive the session; None keeps nothing.
        """
        engine = cls(assemble(settings, progress, cancelled, Memory(memory)))
        try:
            engine._apply(engine._plan(engine.settings))
            engine.residency.warm_up()
        except BaseException:
            engine.close()
            raise
        engine.residency.telemetry.set_phase("idle")
        return engine

    @property
    def plan(self) -> Plan:
        assert self.residency.plan is not None
        return self.residency.plan

    @property
    def peak_device_bytes(self) -> int:
        """The most device memory so far: accounted on the CPU, as the allocator saw it on CUDA."""
        if self.machine.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return self.residency.arena.peak_bytes

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, a conversation, or ids themselves. Raises BadSettings for ids outside the vocabulary."""
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            messages: Any = prompt
            return self.text.encode_chat(messages, continue_last=prompt[-1]["role"] == "assistant")  # type: ignore[index]
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        wrong = next((token for token in ids if not 0 <= token < self.spec.vocab_size), None)
        if wrong is not None:
            raise BadSettings(f"token id {wrong} is outside the vocabulary; allowed is 0 to {self.spec.vocab_size - 1}")
        return ids

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Event]:
        """Events of one reply, ending with `Done`. Closing the iterator stops the reply.

        Raises BadSettings for a prompt that is empty or too long, TransferFailed when expert weights cannot be brought;
        the engine can be used again after either.
        """
        ids = self.encode(prompt)
        if not ids:
            raise BadSettings("the prompt is empty; give at least one token")
        if len(ids) >= self.context_length:
            raise BadSettings(
                f"the prompt has {len(ids)} tokens and leaves no room in a context of {self.context_length}; "
                f"shorten it or raise context_length (the model allows {self.spec.context_length})"
            )
        with self._turn:
            self._ensure_open()
            if self._generating:
                raise BadSettings("a reply is being generated already; stop it or wait until it is done")
            self._generating = True
            self._stop.clear()
        reply = self._reply(ids, sampling or Sampling())
        next(reply)  # it has begun, so closing it tidies up even when no event was taken
        return reply

    def request_stop(self) -> None:
        """Ends the running reply within one layer. From any thread; returns at once."""
        self._stop.set()

    def reconfigure(self, **changes: Any) -> Plan:
        """Changes live settings (`LIVE_SETTINGS`) at the next token boundary, without reloading. Returns the new plan.

        Raises BadSettings or OutOfRoom before anything has changed.
        """
        fixed = [name for name in changes if name not in LIVE_SETTINGS]
        settings = self.settings.replace(**changes)
        if fixed:
            raise BadSettings(
                f"'{fixed[0]}' cannot change while loaded; allowed: {', '.join(LIVE_SETTINGS)}; load again"
            )
        plan = self._plan(settings)
        with self._turn:
            self._ensure_open()
            self._apply(plan)
            self.settings = settings
            return self.plan

    def learn(self, costs: Costs) -> Plan:
        """From now on plans stand on measured `costs`; makes and applies a new one."""
        self.steering.learn(costs)
        return self.reconfigure()

    def measure_link(self) -> LinkSpeed:
        """How fast bytes reach the device with nothing else to do. Takes about half a second, between replies."""
        with self._turn:
            self._ensure_open()
            self.residency.forget_guesses()
            return probe_link(self.residency)

    def rehearse(self, seconds: float, **changes: Any) -> Run:
        """Makes a few tokens under other live settings and returns what was recorded; then all is as before.

        For measuring, between replies: the session's telemetry, eviction history and predictions do not notice, but the
        KV memory and what was cached are gone. Raises Cancelled after `request_stop`.
        """
        settings = self.settings.replace(**changes)
        with self._turn:
            self._ensure_open()
            if self._generating:
                raise BadSettings("a reply is being generated; measure when it is done")
            self._stop.clear()
            plan, rehearsed = self.plan, uniform_plan(settings, self.needs, self.plan.memory.budget)
            with self.residency.rehearsal(rehearsed):
                self.hf.forget()
                telemetry = self.residency.telemetry
                telemetry.begin_reply(time.perf_counter(), 0, 0)
                ids = self.encode(_REHEARSAL)[: self.context_length // 2]
                until_s = time.perf_counter() + seconds
                made = 0
                while made < _FEWEST or (time.perf_counter() < until_s and made < _MOST):
                    logits, token = self._forward(ids)
                    telemetry.new_token(token, time.perf_counter())
                    ids.append(int(logits.argmax()))
                    made += 1
                events, _ = telemetry.events()
                self.hf.forget()
            self._apply(plan)
            self.residency.warm_up()
        return Run(events, tuple(share.top_rows for share in rehearsed.layers), rehearsed.predictor != "none")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, replies are recorded apart and live settings may change; afterwards all is as before, come what may.

        For trying things out, between replies: the session's telemetry does not notice. KV memory goes on.
        """
        with self._turn:
            self._ensure_open()
            if self._generating:
                raise BadSettings("a reply is being generated; try things out when it is done")
            settings, plan, telemetry = self.settings, self.plan, self.residency.telemetry
            self.residency.telemetry = telemetry.fresh()
            self.residency.telemetry.set_phase("idle")
        try:
            yield
        finally:
            with self._turn:
                if not self._closed:
                    self.residency.forget_guesses()
                    self.residency.transfer.drain_events()
                    self.residency.telemetry, self.settings = telemetry, settings
                    self._stop.clear()  # a stop ends what was tried out, not its tidying up
                    self._apply(plan)
                    self.residency.warm_up()

    def start_over(self, earlier: RoutingTrace | None) -> None:
        """Empties caches and eviction history, as after a start that knows what `earlier` tokens used; between replies.

        For comparisons that shall begin alike; counters and KV memory go on.
        """
        with self._turn:
            self._ensure_open()
            plan = self.plan
            self.residency.empty()
            self.residency.apply(plan)
            self._told()
            if earlier is not None:
                self.residency.remember(earlier)
                self.residency.warm_up()

    def snapshot(self) -> Snapshot:
        """All live figures at one instant. From any thread."""
        return self.residency.telemetry.snapshot(self.residency.where())

    def check(self) -> None:
        """Asserts that all books balance; for tests, at a token boundary."""
        with self._turn:
            self.residency.arena.check()
            self.residency.check()
            self.residency.telemetry.check()

    def close(self) -> None:
        """Stops what runs, and gives back every thread, file and byte. A second call does nothing."""
        self._stop.set()
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self.steering.keep()
            self.residency.close()
            self.residency.store.close()
            self.hf.forget()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reply(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        made: list[int] = []
        text = ""
        stream = self.text.stream()
        telemetry = self.residency.telemetry
        try:
            yield PromptRead(0, len(ids), 0)  # for `generate` alone
            reason: FinishReason = "stopped"
            for event in self._tokens(list(ids), sampling):
                if isinstance(event, TokenMade):
                    self.steering.count_token()
                    made.append(event.token_id)
                    piece = "" if event.token_id in self.text.stop_ids else stream.push(event.token_id)
                    text += piece
                    event = replace(event, text=piece)
                elif isinstance(event, Done):
                    reason = event.reason
                    continue
                yield event
            yield Done(reason, tuple(made), text)
        finally:
            with self._turn:
                self._generating = False
                telemetry.end_reply()
                if not self._closed:
                    self.residency.forget_guesses()
                    if self.steering.due:
                        self._apply(self._plan(self.settings))
                        # Another split ratio has emptied the cache; what fails here will be loaded when it is needed.
                        with suppress(Cancelled, TransferFailed):
                            self.residency.warm_up()

    def _tokens(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        """Prefill in chunks, then one token per pass, until an end; a stop ends it quietly."""
        telemetry = self.residency.telemetry
        prompt_tokens = len(ids)
        with self._turn:
            cached = self.hf.reuse_prefix(ids)
            telemetry.begin_reply(time.perf_counter(), prompt_tokens, cached)
            self.residency.begin_reply()
        try:
            sampler = Sampler(sampling, self.hf.device)
            for start in range(cached, prompt_tokens, self.settings.prefill_chunk):
                chunk = ids[start : start + self.settings.prefill_chunk]
                logits, token, notice = self._pass(ids[: start + len(chunk)])
                telemetry.read_prompt(len(chunk))
                if notice:
                    yield Notice(notice)
                yield PromptRead(start + len(chunk) - cached, prompt_tokens - cached, cached)
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

    def _finished(self, ids: list[int], made: int, sampling: Sampling) -> FinishReason | None:
        if ids[-1] in self.text.stop_ids and not sampling.ignore_eos:
            return "stop"
        if made >= sampling.max_new_tokens:
            return "length"
        if len(ids) >= self.context_length:
            return "context"
        return "stopped" if self._stop.is_set() else None

    def _pass(self, ids: list[int]) -> tuple[Tensor, int, str | None]:
        """Runs whatever of `ids` is not in the KV memory yet: last logits `[vocab]`, number of the last token, notice.

        When memory runs out, the cache is made smaller and the pass is tried once more.
        """
        with self._turn:
            self._ensure_open()
            try:
                return *self._forward(ids), None
            except (RuntimeError, OutOfRoom) as error:
                if not (isinstance(error, OutOfRoom) or is_out_of_memory(error)):
                    raise
                notice = self._shrink()
            try:
                return *self._forward(ids), notice
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfRoom(
                    f"memory ran out twice, although the budget is down to {format_bytes(self.plan.memory.budget)}; "
                    f"lower vram or context_length ({self.context_length}), or close other programs"
                ) from error

    def _forward(self, ids: list[int]) -> tuple[Tensor, int]:
        residency, done = self.residency, len(self.hf.cached_ids)
        while True:
            chunk = ids[done : done + self.settings.prefill_chunk]
            residency.begin_pass(len(chunk))
            logits = self.hf.forward(chunk)
            last = residency.end_pass()
            done += len(chunk)
            if done == len(ids):
                return logits, last

    def _shrink(self) -> str:
        """Gives a tenth of the budget back, as far as the cache has it, and says so."""
        old = self.plan.memory
        budget = max(self.needs.smallest, int(old.budget * 0.9))
        self.residency.apply(self.steering.plan(self.settings, budget))
        self._told()
        if self.machine.device == "cuda":
            torch.cuda.empty_cache()
        return (
            f"memory ran out, so the budget went from {format_bytes(old.budget)} to {format_bytes(budget)} and the "
            f"reply went on; set vram to {format_bytes(budget)} or lower to avoid this"
        )

    def _apply(self, plan: Plan) -> None:
        """Puts `plan` in force; when the machine refuses memory that the budget has, settles for less and says so."""
        old = self.residency.plan
        try:
            self.residency.apply(plan)
        except OutOfRoom as error:
            held = int(self.residency.arena.used_bytes * 0.95)
            if held < self.needs.smallest:
                raise
            self.residency.apply(self.steering.plan(self.settings, held))
            self.notices.append(f"the budget is {format_bytes(held)} for now: {error}")
        trace = self.steering.trace() if old is None or old.eviction != plan.eviction else None
        if trace is not None:  # a new eviction policy begins with what is known, not from nothing
            self.residency.remember(trace)
        self._told()

    def _plan(self, settings: Settings) -> Plan:
        budget = budget_bytes(settings.vram, self.needs, free_for_budget(self.machine, self.link, self.spec))
        return self.steering.plan(settings, budget)

    def _told(self) -> None:
        self.residency.telemetry.set_plan(self.plan, self.residency.arena.bytes_by_kind)

    def _ensure_open(self) -> None:
        if self._closed:
            raise MoepicError("the model was unloaded; load it again")
