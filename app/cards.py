"""What the cards of model and budget say: previews in, words and numbers out, ready for JSON. Pure.

The panels send these to the page's script, which only puts them into place, so every word and rounding is decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moepic_core.finder import CheckpointEntry
from moepic_core.spec import DeviceKind, ModelSpec, Plan
from moepic_core.units import format_bytes

from . import checkpoints, demo_checkpoint
from .nouns import Preview
from .views import MEMORY, geometry, milliseconds, num_experts, parameters, percent, size, span

UNITS = {"MB": 1e6, "GB": 1e9}
PREDICTORS = {"next-router": "the next layer's router", "activation-matrices": "similar past requests"}
SEPARATOR = " · "  # between the parts of a line of the picker, which the page's script tells apart


def memory_of(device: DeviceKind) -> str:
    """What people call the memory that is budgeted."""
    return "RAM" if device == "cpu" else "VRAM"


def picker_label(entry: CheckpointEntry, step: str | None) -> str:
    """Name, facts and verdict of one line of the picker; `step` None where nobody knows."""
    parts = [checkpoints.title(entry.name)]
    if entry.spec is not None:
        spec = entry.spec
        whole, active = parameters(spec.num_parameters), parameters(spec.active_parameters)
        layers = f"{len(spec.moe_layers)} layers × {num_experts(spec)} experts"
        parts += [f"{whole}, {active} active", layers, spec.dtype]
    if entry.incomplete:
        parts.append("incomplete")
    elif entry.problem is not None:
        parts.append("cannot be used")
    elif step is not None:
        parts.append(step)
    return SEPARATOR.join(parts)


def model_card(preview: Preview) -> dict[str, Any]:
    """Verdict and facts about the chosen checkpoint."""
    machine, spec = preview.machine, preview.spec
    memory = memory_of(machine.device)
    free = f"{format_bytes(machine.device_free_bytes)} of {format_bytes(machine.device_total_bytes)} {memory} free"
    if preview.reserved_bytes:
        free += f", {format_bytes(preview.reserved_bytes)} of it for other programs"
    facts = [("Device", f"{machine.device_name}, {free}")]
    if spec is None or preview.verdict is None:
        here = f"incomplete here: {preview.missing}" if preview.missing else "not on this machine yet"
        return {
            "step": "download",
            "verdict": f"{here}; Download fetches {'the rest' if preview.missing else 'it'}, then loads it",
            "facts": facts,
            "notes": ["a download that stops keeps its complete files; the others begin anew"],
        }
    notes = list(preview.notes)
    if preview.settings.checkpoint == demo_checkpoint.NAME and not preview.loaded:
        notes.insert(0, demo_checkpoint.WARNING)
    if preview.reloads:
        notes.insert(0, "link and context change with a reload; the conversation stays")
    return {
        "step": preview.verdict.step,
        "verdict": preview.verdict.text,
        "facts": [("Model", geometry(spec)), ("Size", size(spec)), ("Experts", whereabouts(preview)), *facts],
        "notes": notes,
    }


def problem_card(text: str) -> dict[str, Any]:
    """In the place of `model_card` when a checkpoint cannot be used at all."""
    return {"step": "will not run", "verdict": f"will not run: {text}", "facts": [], "notes": []}


def whereabouts(preview: Preview) -> str:
    """Where the complete copy of the experts is kept, and a token embedding of which one row is needed at a time."""
    assert preview.spec is not None, preview.settings.checkpoint
    nbytes, rows = format_bytes(preview.spec.expert_bytes), preview.spec.embedding_bytes
    if preview.link.kind == "disk":
        besides = f"; token embeddings ({format_bytes(rows)}) are read from the checkpoint" if rows else ""
        return f"{nbytes} in a file on disk, none of it in RAM{besides}"
    besides = f" with {format_bytes(rows)} of token embeddings" if rows else ""
    return f"{nbytes} in RAM{besides}, {format_bytes(preview.machine.host_free_bytes)} is free there"


@dataclass(frozen=True)
class BudgetRange:
    """The slider's numbers, in `unit`."""

    minimum: float
    maximum: float
    step: float
    value: float
    unit: Literal["MB", "GB"]

    def to_bytes(self, value: float) -> int:
        return round(value * UNITS[self.unit])


def budget_range(preview: Preview) -> BudgetRange | None:
    """From the least that works to everything, or to what is free; None when no budget works."""
    if preview.needs is None or preview.budget_bytes is None:
        return None
    low, high = preview.needs.smallest, min(preview.needs.everything, preview.free_bytes)
    high = max(high, preview.budget_bytes, low + 1000)
    unit: Literal["MB", "GB"] = "MB" if preview.needs.everything < UNITS["GB"] else "GB"
    decimals = max(1, 2 - math.floor(math.log10((high - low) / UNITS[unit])))  # at least 100 steps

    def up(nbytes: int) -> float:
        return float(math.ceil(nbytes / UNITS[unit] * 10.0**decimals) / 10.0**decimals)

    return BudgetRange(up(low), up(high), 10.0**-decimals, up(preview.budget_bytes), unit)


def budget_card(preview: Preview, budget: int, in_use: int | None) -> dict[str, Any]:
    """The memory bar for `budget`, what it buys, and whether it is the one `in_use` (None: the model is not loaded)."""
    assert preview.needs is not None, preview.settings.checkpoint
    plan, width = preview.plan(budget), max(preview.needs.everything, budget)
    parts = [(kind, label, getattr(plan.memory, kind)) for kind, label in MEMORY.items()]
    parts.append(("left", "Left over", budget - plan.memory.used))
    state = "in use" if in_use == budget else "release to apply"
    if not preview.loaded:
        state = "does not fit" if preview.budget_bytes is None else "used when you load"
    return {
        "parts": [
            {"kind": kind, "label": label, "text": format_bytes(nbytes), "share": nbytes / width}
            for kind, label, nbytes in parts
        ],
        "budget": format_bytes(budget),
        "everything": format_bytes(width),
        "share": budget / width,
        "reason": expectation(preview, budget) if plan is not preview.in_force else plan.reason,
        "state": state,
        "forecast": forecast_card(preview, budget),
    }


def expectation(preview: Preview, budget: int) -> str:
    """What `budget` would bring, as far as it was measured; else what would be cached."""
    forecast = preview.forecast
    if forecast is None:
        return preview.plan(budget).reason
    hits, partial, misses = (percent(forecast.at(budget, f"{kind}_rate")) for kind in ("hit", "partial_hit", "miss"))
    moved = format_bytes(forecast.at(budget, "link_bytes"))
    return f"expected of a token: {hits} hits, {partial} partial hits, {misses} misses, {moved} over the link"


def forecast_card(preview: Preview, budget: int) -> dict[str, Any] | None:
    """Predicted speed under `budget`, between the budgets that were planned; None while nothing is known."""
    forecast, numbers = preview.forecast, budget_range(preview)
    if forecast is None or numbers is None:
        return None
    seconds = forecast.at(budget, "total_s")
    low, high = numbers.to_bytes(numbers.minimum), numbers.to_bytes(numbers.maximum)
    budgets = [low, *(each for each in forecast.budgets if low < each < high), high]
    times = [forecast.at(each, "total_s") for each in budgets]
    least, most = min(times), max(times)
    texts = [f"{format_bytes(each)}: {1 / time:.1f} tokens/s, {milliseconds(time)} per token"
             for each, time in zip(budgets, times, strict=True)]  # fmt: skip
    return {
        "speed": f"{1 / seconds:.1f}",
        "range": f"{(1 - forecast.error) / seconds:.0f} to {(1 + forecast.error) / seconds:.0f}",
        "time": f"{milliseconds(seconds)} per token",
        "definition": f"From costs measured on this machine and the routing of {forecast.origin}; the range is how "
        "far four of five of the last replies were from their prediction, or ±10 % before there are any.",
        "least": milliseconds(least),
        "most": milliseconds(most),
        "label": f"Predicted time per token over the budget, from {milliseconds(times[0])} with {format_bytes(low)} "
        f"to {milliseconds(times[-1])} with {format_bytes(high)}; now {milliseconds(seconds)}",
        "points": [
            [(at - low) / (high - low), (time - least) / max(most - least, 1e-9), text]
            for at, time, text in zip(budgets, times, texts, strict=True)
        ],
        "curve": list(zip(budgets, times, strict=True)),  # bytes, seconds
        "unit": UNITS[numbers.unit],  # bytes of one on the slider
        "at": min(1.0, max(0.0, (budget - low) / (high - low))),
        "seconds": seconds,
    }


def plan_rows(plan: Plan, spec: ModelSpec, routing: str = "") -> list[tuple[str, str]]:
    """What was decided and why, in words; `routing` says from whose."""
    slots, splits = [share.slots for share in plan.layers], [share.split_ratio for share in plan.layers]
    rows = [
        ("Cache", f"{span(slots, '{}')} of {num_experts(spec)} experts a layer, evicted by {plan.eviction}; "
                  f"split ratio {span(splits, '{:.2f}')}"),
        ("Prefetch", f"up to {plan.prefetch_depth} experts of the next layer, by {PREDICTORS[plan.predictor]}"
                     if plan.prefetch_depth else "off"),
        ("Why", plan.reason),
    ]  # fmt: skip
    if plan.predicted is not None:
        cost = plan.predicted
        rows.insert(3, ("A token", f"{milliseconds(cost.total_s)} expected: attention and routers "
                        f"{milliseconds(cost.before_s)}, experts {milliseconds(cost.experts_s)}, stall "
                        f"{milliseconds(cost.stall_s)}, head {milliseconds(cost.after_s)}; "
                        f"{format_bytes(cost.link_bytes)} over the link"))  # fmt: skip
    return [*rows, ("Routing", routing)] if routing else rows
