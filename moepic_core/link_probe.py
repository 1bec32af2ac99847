"""How fast bytes reach the device with nothing else to do, measured through the very path that experts take.

`calibration` calls it between replies. It loads experts into staging buffers and forgets them; no cache changes. How
fast the memories at both ends copy is measured beside, which tells what the link's rate is made of.
"""

from __future__ import annotations

import time

import torch

from .costs import LinkSpeed
from .residency import Residency
from .transfer.base import Priority

_SECONDS = 0.3
_SINGLES = 5
_HOST_BYTES = 32 << 20  # that are copied within host memory; caches are smaller, most of them


def probe_link(residency: Residency) -> LinkSpeed:
    """Takes about half a second. No guess and no demand may be under way."""
    rates: list[float] = []
    start_s = time.perf_counter()
    while not rates or time.perf_counter() - start_s < _SECONDS:
        nbytes, seconds = _load(residency, residency.staging.num_buffers)
        rates.append(nbytes / seconds)
    rate = max(rates)
    singles = [_load(residency, 1) for _ in range(_SINGLES)]
    latency_s = max(0.0, min(seconds - nbytes / rate for nbytes, seconds in singles))
    source, target = torch.ones(2, _HOST_BYTES, dtype=torch.uint8)
    return LinkSpeed(rate, latency_s, _copy_s_per_byte(residency), 1 / _best_s_per_byte(source, target))


def _load(residency: Residency, count: int) -> tuple[int, float]:
    """Bytes and seconds of `count` experts that travel together."""
    layer, num_experts = 0, residency.layers[0].num_experts
    start_s = time.perf_counter()
    taken = [residency.staging.take_demand(layer, expert % num_experts) for expert in range(count)]
    buffers = [buffer for buffer in taken if buffer is not None]
    for buffer in buffers:
        residency.loads.into_staging(buffer, Priority.DEMAND, with_top=True)
    tickets = [ticket for buffer in buffers for ticket in buffer.tickets()]
    for ticket in tickets:
        ticket.wait()
        ticket.settle()
    residency.transfer.fence().wait()
    seconds = time.perf_counter() - start_s
    for buffer in buffers:
        residency.staging.give_back(buffer, residency.transfer.fence())
    residency.loads.discard()
    return sum(ticket.nbytes for ticket in tickets), seconds


def _copy_s_per_byte(residency: Residency) -> float:
    """Of a copy from one staging buffer to another."""
    target, source = (buffer.buffer for buffer in residency.staging.free[:2])
    return _best_s_per_byte(source, target, residency)


def _best_s_per_byte(source: torch.Tensor, target: torch.Tensor, residency: Residency | None = None) -> float:
    """The best of a few copies; those of a `residency` are on its device, which answers before it has copied."""
    best = float("inf")
    for _ in range(_SINGLES):
        start_s = time.perf_counter()
        target.copy_(source)
        if residency is not None:
            residency.transfer.fence().wait()
        best = min(best, time.perf_counter() - start_s)
    return best / target.numel()
