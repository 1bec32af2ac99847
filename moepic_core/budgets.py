"""The budget: all device memory that a model may use, as the user words it and as bytes.

The engine, the command line and the page ask `budget_bytes`; `Needs` is what a model takes before any expert is cached,
estimated from headers by `needs` or found by loading. Pure. Makes no plan: what is left for the cache is `planner`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BadSettings, OutOfRoom
from .geometry import record_stride
from .shares import all_tops
from .spec import MoeLayer
from .units import format_bytes, parse_bytes

HEADROOM = 0.9  # part of the free memory that budgets may take: a device filled to the brim slows down or fails
OF_EXPERTS = "of experts"  # after a percentage: of the experts' bytes
SMALLEST_STAGING = 2  # records: one is computed with while the next arrives


@dataclass(frozen=True)
class Needs:
    """Device bytes that a model takes before any expert is cached."""

    layers: tuple[MoeLayer, ...]
    top_k: int
    resident: int
    kv: int
    workspace: int

    @property
    def record(self) -> int:
        """Bytes of one staging buffer."""
        return max(record_stride(layer) for layer in self.layers)

    @property
    def fixed(self) -> int:
        return self.resident + self.kv + self.workspace

    @property
    def smallest(self) -> int:
        """The least budget with which anything runs: no expert cached, two staging buffers."""
        return self.fixed + SMALLEST_STAGING * self.record

    @property
    def everything(self) -> int:
        """The budget with which all experts are resident: 100 %."""
        return self.fixed + self.staging_records * self.record + all_tops(self.layers, 1.0)

    @property
    def staging_records(self) -> int:
        """Room for the experts that two layers use for one token."""
        return max(SMALLEST_STAGING, 2 * self.top_k)


def budget_bytes(vram: str | int, needs: Needs, free_bytes: int) -> int:
    """The budget in bytes. `auto`: what is free, but not more than everything. `50%`: of what everything needs.
    `50% of experts`: what all but the cache needs, and half of the experts.

    Raises OutOfRoom below the smallest possible budget, and names it.
    """
    if isinstance(vram, str) and vram.strip().lower() == "auto":
        budget = min(free_bytes, needs.everything)
    elif isinstance(vram, str) and vram.strip().endswith("%"):
        budget = int(_percent(vram) * needs.everything)
    elif isinstance(vram, str) and vram.strip().endswith(OF_EXPERTS):
        cache = _percent(vram.strip().removesuffix(OF_EXPERTS)) * sum(layer.layer_bytes for layer in needs.layers)
        budget = needs.everything - all_tops(needs.layers, 1.0) + int(cache)
    else:
        budget = parse_bytes(vram)
    if budget < needs.smallest:
        raise OutOfRoom(
            f"a budget of {format_bytes(budget)} is too small for this model: the smallest is "
            f"{format_bytes(needs.smallest)} ({needs.smallest} bytes: weights outside the experts "
            f"{format_bytes(needs.resident)}, KV {format_bytes(needs.kv)}, workspace {format_bytes(needs.workspace)}, "
            f"staging {format_bytes(SMALLEST_STAGING * needs.record)}); raise the budget or shorten the context"
        )
    return budget


def _percent(text: str) -> float:
    number = text.strip()[:-1].strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise BadSettings(f"budget {text!r} is not understood; a percentage is above 0 and at most 100, such as 50%")
    return value / 100
