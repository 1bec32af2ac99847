"""Residency and engine over `CudaTransfer` on a simulated device: right answers, times of the device, its failure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from numpy.typing import NDArray
from rig import NUM_LAYERS, Rig, inputs

from moepic_core import assembly
from moepic_core.engine import Engine
from moepic_core.errors import DeviceFailed, TransferFailed
from moepic_core.events import Done
from moepic_core.hf.experts import ExpertLayer
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings
from moepic_core.trace import EventKind
from moepic_core.transfer.cuda import CudaTransfer

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # no thread dies
CHUNK_BYTES = 4096
PROMPT = [3 + 7 * place for place in range(12)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    device = fake_cuda.install(monkeypatch, bytes_per_s=100e6, lockstep=True)
    yield device
    device.stop()


def seconds_of(rig: Rig, kind: EventKind) -> float:
    events = rig.telemetry.trace().events
    events = events[events["kind"] == kind]
    return float((events["end_s"] - events["start_s"]).sum())


def outputs(rig: Rig) -> torch.Tensor:
    """Of a prompt and three tokens, half of the guesses right."""
    found = []
    for number, tokens in enumerate((5, 1, 1, 1)):
        rig.residency.begin_pass(tokens)
        for layer in range(NUM_LAYERS):
            x, routes, weights = inputs(tokens, 100 * number + layer)
            guesses = [int(inputs(tokens, 100 * number + layer + 1)[1][0, 0]), 7]
            found.append(rig.run(layer, x, routes, weights, list(dict.fromkeys(guesses))))
            rig.residency.check()
        rig.residency.end_pass()
    return torch.cat(found)


def wait_until_idle(rig: Rig, device: FakeCuda) -> None:
    staging = rig.residency.staging
    tickets = [ticket for buffer in staging.guesses.values() for ticket in buffer.tickets()]
    tickets += [ticket for buffer in staging.free for ticket in buffer.draining]
    while not all(ticket.settled for ticket in tickets):
        time.sleep(0.001)
    device.compute.synchronize()


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_answers_have_the_same_bits_and_stalls_are_the_devices_own(
    device: FakeCuda, split: float, pinned: bool
) -> None:
    device.pinned = pinned
    rig = Rig(CudaTransfer(torch.device("cpu"), CHUNK_BYTES), room_records=4, split=split)
    assert torch.equal(outputs(rig), outputs(Rig(room_records=4, split=split)))
    wait_until_idle(rig, device)
    rig.residency.end_reply()
    counters = rig.transfer.counters()
    assert counters.stalled_s > 0
    assert seconds_of(rig, EventKind.STALL) == pytest.approx(counters.stalled_s)
    moved = rig.telemetry.snapshot().session.both.total
    assert (moved.demand_bytes, moved.prefetch_bytes) == (counters.demand_bytes, counters.prefetch_bytes)
    assert (counters.unpinned_bytes > 0) is not pinned
    rig.residency.close()
    assert rig.arena.used_bytes == 0


def test_measured_computing_does_not_begin_while_the_device_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = fake_cuda.install(monkeypatch, bytes_per_s=0.3e6)  # 50 ms for an expert; the host does not wait
    rig = Rig(CudaTransfer(torch.device("cpu"), CHUNK_BYTES), room_records=0, split=0.0)
    x, routes, weights = inputs(1, 0)
    rig.residency.precise = True
    rig.residency.begin_pass(1)
    rig.run(0, x, routes, weights)
    wait_until_idle(rig, device)
    rig.residency.end_pass()
    assert seconds_of(rig, EventKind.STALL) == pytest.approx(rig.transfer.counters().stalled_s)
    assert seconds_of(rig, EventKind.COMPUTE) < seconds_of(rig, EventKind.STALL) / 2
    rig.residency.close()
    device.stop()


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_device_that_fails_ends_the_step_with_one_sentence_and_everything_can_be_closed(
    device: FakeCuda, tokens: int
) -> None:
    rig = Rig(CudaTransfer(torch.device("cpu"), CHUNK_BYTES), room_records=4, split=0.4)
    x, routes, weights = inputs(tokens, 0)
    rig.residency.begin_pass(tokens)
    rig.run(0, x, routes, weights, guesses=[1, 2])
    device.lose()
    for layer in (1, 2):
        with pytest.raises(TransferFailed, match=r"(GPU has failed|tried twice).*CUDA error: unspecified") as caught:
            rig.run(layer, *inputs(tokens, layer))
        assert "\n" not in str(caught.value)
    assert "GPU has failed" in str(caught.value)
    rig.residency.end_reply()
    rig.residency.check()
    rig.residency.close()
    assert rig.arena.used_bytes == 0


def test_an_engine_generates_over_a_simulated_device(
    checkpoints: Callable[..., Path], device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(**settings: object) -> tuple[int, ...]:
        given = Settings.create(checkpoint=str(checkpoints("qwen3_moe")), device="cpu", context_length=64, **settings)
        with Engine.load(given) as engine:
            engine.reconfigure(vram=(engine.needs.smallest + engine.needs.everything) // 2)
            done = list(engine.generate(PROMPT, Sampling(max_new_tokens=8, ignore_eos=True)))[-1]
            engine.check()
            assert isinstance(done, Done)
            total = engine.snapshot().last_reply.both.total
            waited.append((total.stall_s, total.link_busy_s))
            return done.token_ids

    device.bytes_per_s = 10e6
    waited: list[tuple[float, float]] = []
    expected = reply(link="emulated:16GB/s", split=0.4)
    monkeypatch.setattr(assembly, "_transfer", lambda link, where: CudaTransfer(where, CHUNK_BYTES))
    assert reply(link="emulated:16GB/s", split=0.4) == expected
    assert min(waited[1]) > 0


@pytest.mark.parametrize("strategy", ["mixtral-offloading", "moe-infinity", "on-demand"])
def test_a_layer_waits_once_for_the_device_and_decides_as_on_a_cpu(
    strategy: str, checkpoints: Callable[..., Path], device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the chosen experts waits; guesses come with them."""
    num_waits: list[int] = []  # of each layer of each token

    def layer(self: ExpertLayer, *inputs: torch.Tensor) -> torch.Tensor:
        num_waits.append(0)
        with monkeypatch.context() as patch:
            for name in ("tolist", "item", "__int__", "__bool__", "__float__", "numpy"):
                patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
            return real_layer(self, *inputs)

    def counted(read: Callable[..., object]) -> Callable[..., object]:
        def wait(tensor: torch.Tensor) -> object:
            num_waits[-1] += 1
            return read(tensor)

        return wait

    def decode(waits: bool) -> tuple[torch.Tensor, NDArray[np.void]]:
        given = Settings.create(
            checkpoint=str(checkpoints("qwen3_moe")), device="cpu", link="emulated:16GB/s", strategy=strategy,
            context_length=64,
        )  # fmt: skip
        with Engine.load(given) as engine:
            engine.reconfigure(vram=(engine.needs.smallest + engine.needs.everything) // 2)
            for module in engine.hf.model.modules():
                if hasattr(module, "moepic_layer"):
                    module.moepic_layer.waits = waits
            num_waits.clear()
            logits = []
            for token in PROMPT:
                engine.residency.begin_pass(1)
                logits.append(engine.hf.forward([token]))
                engine.residency.end_pass()
            return torch.stack(logits), engine.residency.telemetry.trace().routing

    monkeypatch.setattr(assembly, "_transfer", lambda link, where: CudaTransfer(where, CHUNK_BYTES))
    real_layer = ExpertLayer.__call__
    monkeypatch.setattr(ExpertLayer, "__call__", layer)
    asks_router = STRATEGIES[strategy].predictor == "next-router"
    logits, routing = decode(waits=True)
    assert set(num_waits) == {1}
    logits_of_cpu, routing_of_cpu = decode(waits=False)
    assert max(num_waits) == (2 if asks_router else 1)
    assert torch.equal(logits, logits_of_cpu)
    for column in ("experts", "guesses"):
        assert (routing[column] == routing_of_cpu[column]).all()
    assert (routing["guesses"] >= 0).any() == asks_router  # in a first request there is none to compare with


def test_a_device_that_fails_while_it_computes_ends_the_reply_with_one_sentence(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ids: list[int]) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might")

    with Engine.load(Settings(checkpoint=str(checkpoints("mixtral")), device="cpu", link="emulated:16GB/s")) as engine:
        monkeypatch.setattr(engine.hf, "forward", fail)
        with pytest.raises(
            DeviceFailed, match=r"illegal memory access was encountered\); end MoEpic and start it again$"
        ):
            list(engine.generate(PROMPT))
        engine.check()
