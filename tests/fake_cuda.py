"""Just enough of torch.cuda for `CudaTransfer` to run on a CPU: streams are threads, events are marks in their queues.

`install` patches torch for one test. One lock stands for the device's copy engine, which moves one copy at a time at
`bytes_per_s`. It checks the logic (order, waiting, books, threads); only a GPU checks the speed.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import pytest
import torch

_PATIENCE_S = 5.0  # a test that never fires an event shall fail, not hang


class FakeStream:
    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="fake-cuda-stream", daemon=True)
        self.thread.start()

    def wait_event(self, event: FakeEvent) -> None:
        self.work.put(lambda: event.fired.wait(_PATIENCE_S))

    def synchronize(self) -> None:
        event = FakeEvent()
        event.record(self)
        event.synchronize()

    def _run(self) -> None:
        while (action := self.work.get()) is not None:
            action()


class LockstepStream(FakeStream):
    """The compute stream of code that really computes on the host: what the stream waits for, the host waits for."""

    def wait_event(self, event: FakeEvent) -> None:
        assert event.fired.wait(_PATIENCE_S), "compute waits for a copy that nobody has put on a stream"


class FakeEvent:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.fired = threading.Event()
        self.fired_s = 0.0

    def record(self, stream: FakeStream) -> None:
        stream.work.put(self._fire)

    def query(self) -> bool:
        return self.fired.is_set()

    def synchronize(self) -> None:
        self.fired.wait()

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.fired.is_set()
        assert end.fired.is_set()
        return (end.fired_s - self.fired_s) * 1e3

    def _fire(self) -> None:
        self.fired_s = time.perf_counter()
        self.fired.set()


class FakeCuda:
    def __init__(self, patch: pytest.MonkeyPatch, bytes_per_s: float, lockstep: bool) -> None:
        self._patch = patch
        self.bytes_per_s = bytes_per_s
        self.pinned = True
        self.copies_to_fail = 0.0
        self.streams: list[FakeStream] = []
        self.compute = LockstepStream() if lockstep else FakeStream()
        self.streams.append(self.compute)
        self._current = threading.local()
        self._engine = threading.Lock()
        self._real_copy = torch.Tensor.copy_

    def stream(self, device: object = None, priority: int = 0) -> FakeStream:
        self.streams.append(FakeStream(device, priority))
        return self.streams[-1]

    def current_stream(self, device: object = None) -> FakeStream:
        return getattr(self._current, "stream", self.compute)

    @contextlib.contextmanager
    def use_stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.stream = stream
        yield
        del self._current.stream

    def copy(self, destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return self._real_copy(destination, source)
        if self.copies_to_fail > 0:
            self.copies_to_fail -= 1
            raise RuntimeError("CUDA error: as the test wished")
        self.current_stream().work.put(lambda: self._move(destination, source))
        return destination

    def _move(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with self._engine:
            time.sleep(source.numel() / self.bytes_per_s)
            self._real_copy(destination, source)

    def lose(self) -> None:
        """From now on the device answers every question with an error, as CUDA does after a fault."""

        def fail(*_: object) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")

        for name in ("record", "query", "synchronize", "elapsed_time"):
            self._patch.setattr(FakeEvent, name, fail)
        self._patch.setattr(FakeStream, "wait_event", fail)

    def stop(self) -> None:
        for stream in self.streams:
            stream.work.put(None)
            stream.thread.join()


def install(patch: pytest.MonkeyPatch, bytes_per_s: float = math.inf, lockstep: bool = False) -> FakeCuda:
    """Patch torch; the caller stops what this returns. `lockstep` is for tests that compute with what has arrived."""
    fake = FakeCuda(patch, bytes_per_s, lockstep)
    patch.setattr(torch.cuda, "Stream", fake.stream)
    patch.setattr(torch.cuda, "Event", FakeEvent)
    patch.setattr(torch.cuda, "current_stream", fake.current_stream)
    patch.setattr(torch.cuda, "stream", fake.use_stream)
    patch.setattr(torch.Tensor, "copy_", lambda self, source, non_blocking=False: fake.copy(self, source, non_blocking))
    patch.setattr(torch.Tensor, "is_pinned", lambda self: fake.pinned)
    return fake
