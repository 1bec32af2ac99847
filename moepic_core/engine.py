"""The whole: loads a checkpoint under a budget, generates, changes its budget while it does, and says what happened.

The composition root, and the one object that command line, page and benchmarks hold. The work is done by its parts:
`replies` makes answers out of `passes`, `governor` keeps the device under the plan, `turn` says who computes now. All
methods may be called from any thread; one reply is generated at a time. Only `measuring` and what stands on it import
this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .assembly import Parts, Progress, assemble
from .costs import Costs
from .errors import BadSettings
from .events import Event
from .governor import Governor
from .hf.text import Message, Sampling
from .memory import Memory
from .metrics import Snapshot
from .passes import Passes
from .replies import Replies
from .spec import MachineProfile, Plan, Settings

LIVE_SETTINGS = ("vram", "strategy", "split", "eviction", "prefetch")  # applied without reloading

Prompt = str | Sequence[int] | Sequence[Message]


class Engine:
    def __init__(self, parts: Parts) -> None:
        """Puts loaded parts to work; `Engine.load` makes them."""
        self.spec = parts.spec
        self.link = parts.link
        self.hf = parts.hf
        self.text = parts.text
        self.residency = parts.residency
        self.needs = parts.needs
        self.steering = parts.steering
        self.context_length = parts.context_length
        self.turn = parts.turn
        self.governor = Governor(parts)
        self.passes = Passes(parts, self.governor)
        self._replies = Replies(parts, self.governor, self.passes)

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
            engine.governor.renew()
            engine.residency.warm_up()
        except BaseException:
            engine.close()
            raise
        engine.residency.telemetry.set_phase("idle")
        return engine

    @property
    def settings(self) -> Settings:
        """What the user wants now."""
        return self.governor.settings

    @property
    def plan(self) -> Plan:
        """What is in force now."""
        return self.governor.plan

    @property
    def peak_device_bytes(self) -> int:
        """The most device memory so far: accounted on the CPU, as the allocator saw it on CUDA."""
        return self.residency.arena.peak_device_bytes

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know for as long as this model is loaded."""
        return self.governor.notices

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
        return self._replies.begin(self.encode(prompt), sampling or Sampling())

    def request_stop(self) -> None:
        """Ends the running reply within one layer. From any thread; returns at once."""
        self.turn.stop.set()

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
        plan = self.governor.plan_for(settings)  # before the turn: for a large model it takes part of a second
        with self.turn.working():
            self.governor.apply(plan)
            self.governor.settings = settings
            return self.plan

    @property
    def machine(self) -> MachineProfile:
        return self.steering.machine

    def learn(self, costs: Costs) -> Plan:
        """From now on plans stand on measured `costs`; makes and applies a new one, between replies."""
        self.steering.learn(costs)
        with self.turn.working():
            plan = self.reconfigure()
            self.residency.warm_up()  # another split ratio has emptied the cache
        return plan

    def snapshot(self) -> Snapshot:
        """All live figures at one instant. From any thread."""
        return self.residency.telemetry.snapshot(self.residency.where())

    def check(self) -> None:
        """Asserts that all books balance; for tests, at a token boundary."""
        with self.turn.held():
            self.residency.arena.check()
            self.residency.check()
            self.residency.telemetry.check()

    def close(self) -> None:
        """Stops what runs, and gives back every thread, file and byte. A second call does nothing."""
        self.turn.stop.set()
        with self.turn.held():
            if self.turn.closed:
                return
            self.turn.closed = True
            self.steering.keep()
            self.residency.close()
            self.residency.store.close()
            self.hf.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
