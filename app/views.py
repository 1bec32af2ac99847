"""From what is true to what is read: looks and previews in, words and numbers out, ready for JSON. Pure.

The page's script only puts these texts into place, so every word on a live panel and every rounding is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moepic_core.metrics import Figures, Reply
from moepic_core.spec import ModelSpec
from moepic_core.units import format_bytes

from . import demo_checkpoint
from .nouns import Look, Preview

UNKNOWN = "–"
FORECAST_ERROR = 0.1  # median of |predicted / measured − 1| that benchmarks/compare_strategies.py finds, rounded up
GB = 1e9


class Figure(NamedTuple):
    """One number of the line of live figures."""

    key: str
    label: str
    metric: str  # its row in METRICS
    text: Callable[[Reply, Figures], str]


FIGURES = (
    Figure("speed", "Speed", "tokens_per_s", lambda reply, _: number(reply.tokens_per_s, "{:.1f} tokens/s")),
    Figure("first", "First token", "ttft_s", lambda reply, _: number(reply.ttft_s, "{:.2f} s")),
    Figure("hits", "Hits", "hit_rate", lambda _, figures: percent(figures.hit_rate)),
    Figure("partial", "Partial hits", "partial_hit_rate", lambda _, figures: percent(figures.partial_hit_rate)),
    Figure("misses", "Misses", "miss_rate", lambda _, figures: percent(figures.miss_rate)),
    Figure("overlap", "Overlap", "overlap", lambda _, figures: percent(figures.overlap)),
    Figure("stall", "Stall", "stall_s", lambda _, figures: f"{figures.stall_s:.2f} s" if figures.uses else UNKNOWN),
)
MEMORY = {  # kinds of MemoryPlan in the order of the bar
    "resident": "Weights outside experts",
    "kv": "KV cache",
    "workspace": "Workspace",
    "staging": "Staging",
    "cache": "Expert cache",
}


def live(look: Look) -> dict[str, Any]:
    """What the script asks for twice a second."""
    reply = look.snapshot.reply if look.snapshot else None
    decode = look.snapshot.last_reply.decode.total if look.snapshot else None
    return {
        "loads": look.loads,
        "status": status(look),
        "busy": look.snapshot is not None and look.snapshot.phase in ("prefill", "decode"),
        "progress": progress(look),
        "figures": {
            figure.key: UNKNOWN if reply is None or decode is None else figure.text(reply, decode) for figure in FIGURES
        },
        "link": look.loaded.link.label if look.loaded and look.loaded.link.kind == "emulated" else None,
        "warning": demo_checkpoint.WARNING if _is_demo(look) else None,
        "notice": {"number": look.notice.number, "kind": look.notice.kind, "text": look.notice.text}
        if look.notice
        else None,
    }


def status(look: Look) -> str:
    """What is going on, in a few words."""
    if look.progress is not None:
        share = progress(look)["share"]
        return f"{look.progress.kind} {'…' if share is None else percent(share)}"
    if look.loaded is None or look.snapshot is None:
        return "no model"
    phase, reply = look.snapshot.phase, look.snapshot.reply
    if phase == "prefill" and reply is not None and reply.prefill_progress is not None:
        return f"reading the prompt {percent(reply.prefill_progress)}"
    return {"idle": "ready", "prefill": "reading the prompt", "decode": "answering"}.get(phase, phase)


def progress(look: Look) -> dict[str, Any]:
    """How far the model on its way has come: `text` is empty when there is none, `share` None while nobody knows."""
    if look.progress is None:
        return {"text": "", "share": None}
    name = look.progress.name.rstrip("/").rpartition("/")[2]
    if not look.progress.total_bytes:
        return {"text": f"{look.progress.kind} {name}", "share": None}
    done, total = look.progress.done_bytes, look.progress.total_bytes
    if look.progress.kind == "measuring":
        return {"text": f"measuring this machine: {percent(done / total)}", "share": done / total}
    text = f"{look.progress.kind} {name}: {format_bytes(done)} of {format_bytes(total)}"
    return {"text": text, "share": min(1.0, done / total)}


def model_card(preview: Preview) -> dict[str, Any]:
    """Verdict and facts about the chosen checkpoint."""
    machine, spec = preview.machine, preview.spec
    memory = "RAM" if machine.device == "cpu" else "VRAM"
    free = f"{format_bytes(machine.device_free_bytes)} of {format_bytes(machine.device_total_bytes)} {memory} free"
    facts = [("Device", f"{machine.device_name}, {free}")]
    if spec is None or preview.verdict is None:
        return {
            "step": "download",
            "verdict": "not on this machine yet; Load downloads it first",
            "facts": facts,
            "notes": [],
        }
    notes = list(preview.notes)
    if preview.settings.checkpoint == demo_checkpoint.NAME and not preview.loaded:
        notes.insert(0, demo_checkpoint.WARNING)
    return {
        "step": preview.verdict.step,
        "verdict": preview.verdict.text,
        "facts": [("Model", geometry(spec)), ("Size", size(spec)), *facts],
        "notes": notes,
    }


def problem_card(text: str) -> dict[str, Any]:
    """In the place of `model_card` when a checkpoint cannot be used at all."""
    return {"step": "will not run", "verdict": f"will not run: {text}", "facts": [], "notes": []}


def geometry(spec: ModelSpec) -> str:
    experts = sorted({layer.num_experts for layer in spec.moe_layers})
    count = str(experts[0]) if len(experts) == 1 else f"{experts[0]} to {experts[-1]}"
    return f"{spec.model_type}, {len(spec.moe_layers)} layers of {count} experts, {spec.top_k} per token"


def size(spec: ModelSpec) -> str:
    whole, active = _parameters(spec.num_parameters), _parameters(spec.active_parameters)
    return f"{whole} parameters, {active} per token, {format_bytes(spec.file_bytes)} in {spec.dtype}"


@dataclass(frozen=True)
class BudgetRange:
    """The slider's numbers, in GB."""

    minimum: float
    maximum: float
    step: float
    value: float


def budget_range(preview: Preview) -> BudgetRange | None:
    """From the least that works to everything, or to what is free; None when no budget works."""
    if preview.needs is None or preview.budget_bytes is None:
        return None
    low, high = preview.needs.smallest, min(preview.needs.everything, preview.free_bytes)
    high = max(high, preview.budget_bytes, low + 1000)
    decimals = max(1, 2 - math.floor(math.log10((high - low) / GB)))  # at least 100 steps, at most 1000

    def up(nbytes: int) -> float:
        return float(math.ceil(nbytes / GB * 10.0**decimals) / 10.0**decimals)

    return BudgetRange(up(low), up(high), 10.0**-decimals, up(preview.budget_bytes))


def to_bytes(gigabytes: float) -> int:
    return round(gigabytes * GB)


def budget_card(preview: Preview, budget: int, in_use: int | None) -> dict[str, Any]:
    """The memory bar for `budget`, what it buys, and whether it is the one `in_use` (None: the model is not loaded)."""
    assert preview.needs is not None, preview.settings.checkpoint
    plan, width = preview.plan(budget), max(preview.needs.everything, budget)
    parts = [(kind, label, getattr(plan.memory, kind)) for kind, label in MEMORY.items()]
    parts.append(("left", "Left over", budget - plan.memory.used))
    return {
        "parts": [
            {"kind": kind, "label": label, "text": format_bytes(nbytes), "share": nbytes / width}
            for kind, label, nbytes in parts
        ],
        "budget": format_bytes(budget),
        "everything": format_bytes(width),
        "share": budget / width,
        "reason": plan.reason,
        "state": "used when you load" if in_use is None else "in use" if in_use == budget else "release to apply",
        "forecast": forecast_card(preview, budget),
    }


def forecast_card(preview: Preview, budget: int) -> dict[str, Any] | None:
    """Predicted speed under `budget`, between the budgets that were planned; None while nothing is known."""
    if len(preview.forecast) < 2:
        return None
    budgets, seconds = zip(*preview.forecast, strict=True)
    speeds = [1 / each for each in seconds]
    speed = float(np.interp(budget, budgets, speeds))
    span = budgets[-1] - budgets[0]
    return {
        "speed": f"{speed:.1f}",
        "range": f"{speed * (1 - FORECAST_ERROR):.0f} to {speed * (1 + FORECAST_ERROR):.0f}",
        "definition": "From costs measured on this machine and the experts that recent tokens used.",
        "label": f"predicted speed over the budget: {speeds[0]:.0f} to {speeds[-1]:.0f} tokens per second",
        "points": [[(at - budgets[0]) / span, each / max(speeds)] for at, each in zip(budgets, speeds, strict=True)],
        "at": min(1.0, max(0.0, (budget - budgets[0]) / span)),
    }


def _is_demo(look: Look) -> bool:
    return look.loaded is not None and look.loaded.settings.checkpoint == demo_checkpoint.NAME


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def number(value: float | None, template: str) -> str:
    return UNKNOWN if value is None else template.format(value)


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.0f} %"
