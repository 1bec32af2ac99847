"""From what is true to what is read: looks in, words and numbers out, ready for JSON. Pure.

The page's script only puts these texts into place, so every word on a live panel and every rounding is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moepic_core.metrics import Figures, Reply
from moepic_core.spec import ModelSpec
from moepic_core.units import format_bytes

from . import demo_checkpoint
from .nouns import Look

UNKNOWN = "–"


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
    "resident": "Non-experts",
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
        "shown": shown(look),
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


def shown(look: Look) -> str:
    """Another text whenever what the panels show of model, settings and plan may be out of date."""
    plan, tokens = None, 0
    if look.snapshot is not None:
        plan, tokens = look.snapshot.plan, int(look.snapshot.session.decode.activations[:1].sum())
    return f"{look.loads} {look.changes} {hash(plan):x} {tokens.bit_length()}"


def _is_demo(look: Look) -> bool:
    return look.loaded is not None and look.loaded.settings.checkpoint == demo_checkpoint.NAME


def geometry(spec: ModelSpec) -> str:
    layers = f"{len(spec.moe_layers)} layers of {num_experts(spec)} experts"
    return f"{spec.model_type}, {layers}, {spec.top_k} per token"


def num_experts(spec: ModelSpec) -> str:
    """Per layer."""
    counts = sorted({layer.num_experts for layer in spec.moe_layers})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def size(spec: ModelSpec) -> str:
    whole, active = parameters(spec.num_parameters), parameters(spec.active_parameters)
    return f"{whole} parameters, {active} active, {format_bytes(spec.file_bytes)} in {spec.dtype}"


def parameters(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def number(value: float | None, template: str) -> str:
    return UNKNOWN if value is None else template.format(value)


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.0f} %"


def span(values: Sequence[float], template: str) -> str:
    low, high = template.format(min(values)), template.format(max(values))
    return low if low == high else f"{low} to {high}"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
