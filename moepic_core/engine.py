"""The whole: loads a checkpoint under a budget, generates, changes its budget while it does, and says what happened.

The composition root; nothing below imports it. One generation runs at a time. Compute holds the turn (a lock) for one
forward pass and gives it back at each event, so every event is a token boundary: whoever calls `reconfigure` or
`close` from another thread waits for at most one pass.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .arena import Arena, is_out_of_memory
from .calibrate import probe
from .checkpoint import read_spec
from .errors import BadSettings, Cancelled, MoepicError, OutOfRoom
from .events import Done, Event, FinishReason, Notice, PromptRead, TokenMade
from .finder import resolve
from .hf.experts import ExpertLayer, install, router_of
from .hf.loading import load_model
from .hf.model import HfModel
from .hf.probe import probe_model, without_experts
from .hf.text import Message, Sampler, Sampling, Text
from .host_store import DiskStore, HostStore, RamStore, default_packed_folder
from .lazy_tensors import LazyTensors
from .links import Link, parse_link
from .metrics import Snapshot
from .needs import check_memory, context_length, free_for_budget, workspace_bytes
from .planner import Needs, budget_bytes, uniform_plan
from .residency import Residency
from .shards import read_tensors
from .spec import MachineProfile, ModelSpec, Plan, Settings
from .telemetry import Telemetry
from .transfer.base import Transfer
from .units import format_bytes

LIVE_SETTINGS = ("vram", "strategy", "split", "eviction", "prefetch")  # applied without reloading

Prompt = str | Sequence[int] | Sequence[Message]
Progress = Callable[[int, int], None]  # bytes read, bytes in all


class Engine:
    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        machine: MachineProfile,
        link: Link,
        hf: HfModel,
        text: Text,
        residency: Residency,
        needs: Needs,
        notices: list[str],
    ) -> None:
        """Puts loaded parts together; `Engine.load` makes them."""
        self.settings = settings
        self.spec = spec
        self.machine = machine
        self.link = link
        self.hf = hf
        self.text = text
        self.residency = residency
        self.needs = needs
        self.notices = notices
        self.context_length = context_length(settings, spec)
        self._turn = threading.RLock()
        self._stop = threading.Event()
        self._generating = False
        self._closed = False

    @classmethod
    def load(
        cls,
        settings: Settings,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Engine:
        """Everything from a checkpoint's name to an engine that can generate.

        Raises a MoepicError with one sentence; nothing is left behind then. `cancelled` stops the loading.
        """
        path = resolve(settings.checkpoint, settings.revision)
        spec = read_spec(path, settings.dtype)
        machine = probe(settings.device)
        link = parse_link(settings.link, machine.device)
        check_memory(settings, spec, machine, link)
        device, dtype = torch.device(machine.device), getattr(torch, spec.dtype)
        total, read = sum(info.num_bytes for info in read_tensors(path).values()), 0

        def count(nbytes: int) -> None:
            nonlocal read
            read += nbytes
            if progress is not None:
                progress(read, total)

        store: HostStore
        if link.kind == "disk":
            store = DiskStore(spec, dtype, Path(settings.packed_dir or default_packed_folder()).expanduser())
        else:
            store = RamStore(spec, dtype, pinned=link.kind == "bus")
        try:
            model, modules = load_model(spec, LazyTensors(read_tensors(path), count, cancelled), store, device)
            return cls._assemble(settings, spec, machine, link, store, model, modules)
        except BaseException:
            store.close()
            raise

    @classmethod
    def _assemble(
        cls,
        settings: Settings,
        spec: ModelSpec,
        machine: MachineProfile,
        link: Link,
        store: HostStore,
        model: torch.nn.Module,
        modules: Mapping[str, torch.nn.Module],
    ) -> Engine:
        device = torch.device(machine.device)
        hf = HfModel(model, device)
        text = Text(spec.path, model.generation_config)
        layers = [
            ExpertLayer(module, geometry, router_of(model, path, geometry, spec.top_k))
            for (path, module), geometry in zip(modules.items(), spec.moe_layers, strict=True)
        ]
        context = context_length(settings, spec)
        with without_experts(model, modules.values()):
            found = probe_model(hf, context)
        hf.continues = found.continues
        if not found.continues:
            settings = settings.replace(prefill_chunk=context)
        workspace = workspace_bytes(settings, spec, context, machine.device)
        needs = Needs(spec.moe_layers, spec.top_k, hf.resident_bytes(), found.kv_bytes, workspace)
        budget = budget_bytes(settings.vram, needs, free_for_budget(machine, link, spec))
        plan = uniform_plan(settings, needs, budget)
        arena = Arena(device, budget)
        for kind, nbytes in (("resident", needs.resident), ("kv", needs.kv), ("workspace", needs.workspace)):
            arena.reserve(kind, nbytes)
        telemetry = Telemetry(len(layers), max(layer.num_experts for layer in spec.moe_layers), spec.top_k)
        stop = threading.Event()
        dtype = getattr(torch, spec.dtype)
        residency = Residency(spec.moe_layers, dtype, store, _transfer(link, device), arena, telemetry, stop.is_set)
        install(model, layers, list(modules.values()), residency)
        notices = [store.notice] if store.notice else []
        if plan.predictor != "none" and any(layer.router is None for layer in layers):
            notices.append(f"{spec.architecture}: no router was found beside some experts, so those are not prefetched")
        if not found.continues:
            notices.append(
                f"{spec.architecture} cannot continue a prompt in Transformers: prompts run in one pass, and every "
                f"turn reads the whole conversation again"
            )
        engine = cls(settings, spec, machine, link, hf, text, residency, needs, notices)
        engine._stop = stop
        try:
            engine._apply(plan)
        except BaseException:
            engine.close()
            raise
        telemetry.set_phase("idle")
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
        return self._reply(ids, sampling or Sampling())

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
        with self._turn:
            self._ensure_open()
            budget = budget_bytes(settings.vram, self.needs, free_for_budget(self.machine, self.link, self.spec))
            plan = uniform_plan(settings, self.needs, budget)
            self._apply(plan)
            self.settings = settings
            return self.plan

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
            reason: FinishReason = "stopped"
            for event in self._tokens(list(ids), sampling):
                if isinstance(event, TokenMade):
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

    def _tokens(self, ids: list[int], sampling: Sampling) -> Iterator[Event]:
        """Prefill in chunks, then one token per pass, until an end; a stop ends it quietly."""
        telemetry = self.residency.telemetry
        prompt_tokens = len(ids)
        with self._turn:
            cached = self.hf.reuse_prefix(ids)
            telemetry.begin_reply(time.perf_counter(), prompt_tokens, cached)
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
        self.residency.apply(uniform_plan(self.settings, self.needs, budget))
        self._told()
        if self.machine.device == "cuda":
            torch.cuda.empty_cache()
        return (
            f"memory ran out, so the budget went from {format_bytes(old.budget)} to {format_bytes(budget)} and the "
            f"reply went on; set vram to {format_bytes(budget)} or lower to avoid this"
        )

    def _apply(self, plan: Plan) -> None:
        """Puts `plan` in force; when the machine refuses memory that the budget has, settles for less and says so."""
        try:
            self.residency.apply(plan)
        except OutOfRoom as error:
            held = int(self.residency.arena.used_bytes * 0.95)
            if held < self.needs.smallest:
                raise
            self.residency.apply(uniform_plan(self.settings, self.needs, held))
            self.notices.append(f"the budget is {format_bytes(held)} for now: {error}")
        self._told()

    def _told(self) -> None:
        self.residency.telemetry.set_plan(self.plan, self.residency.arena.bytes_by_kind)

    def _ensure_open(self) -> None:
        if self._closed:
            raise MoepicError("the model was unloaded; load it again")


def _transfer(link: Link, device: torch.device) -> Transfer:
    if device.type == "cuda":
        from .transfer.cuda import CudaTransfer

        return CudaTransfer(device)
    from .transfer.thread import ThreadTransfer

    return ThreadTransfer(num_workers=1 if link.kind == "emulated" else 2, rate_bytes_per_s=link.bytes_per_s)
