"""What leaves the page: the recorded trace with all that is known about it, and the settings, which also come back.

The trace is an .npz that `numpy.load` opens without pickle: `events`, `routing`, `residency`, and `about`, JSON as
bytes, which is also there as a file of its own. Every figure of the page follows from it by the formulas that it holds
(docs/METRICS.md); a test recomputes them. Folders of this machine are left out. What is imported is not believed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import moepic_core
from moepic_core.errors import BadSettings, nearest
from moepic_core.metrics import METRICS, Counters, Scope, Snapshot
from moepic_core.spec import Settings
from moepic_core.trace import EventKind, Outcome, Part, Trace, TracePhase

from .nouns import Loaded
from .sensors import Sample
from .state import State
from .terms import PAGE_METRICS

FORMAT = 1
LIMIT_BYTES = 64 << 10  # of a file of settings
_TYPES: dict[str, tuple[type, ...]] = {  # of settings, as JSON has them
    "checkpoint": (str,), "device": (str,), "link": (str,), "vram": (str, int), "strategy": (str,),
    "split": (float, int, type(None)), "eviction": (str,), "prefetch": (str, int), "dtype": (str,),
    "context_length": (int, type(None)), "prefill_chunk": (int,),
}  # fmt: skip
_TRIES = 20  # to catch figures and trace at one instant while tokens are being made


class Recorded(NamedTuple):
    """All that is known at one instant."""

    loaded: Loaded
    snapshot: Snapshot
    trace: Trace
    sample: Sample | None = None  # None: no sensor was read yet


def recorded(state: State, sample: Sample | None = None) -> Recorded:
    """Raises BadSettings when no model is loaded, and while the trace is not of what the user asks."""
    if state.comparing:
        raise BadSettings("settings are being compared; stop that, or wait until it is done")
    for _ in range(_TRIES):
        look, telemetry = state.look(), state.telemetry
        if look.loaded is None or look.snapshot is None or telemetry is None:
            raise BadSettings("no model is loaded, so there is nothing to share; choose a checkpoint and press Load")
        found = Recorded(look.loaded, look.snapshot, telemetry.trace(), sample)
        if telemetry.version == look.snapshot.version:
            break
    return found


# ---- trace ----


def about(known: Recorded) -> dict[str, Any]:
    """Model, machine, settings, plan and figures of a trace, and what its numbers mean."""
    loaded, snapshot, trace, sample = known
    spec = dataclasses.asdict(loaded.spec)
    del spec["path"]
    return {
        "format": FORMAT,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "moepic": moepic_core.__version__,
        "model": spec,
        "machine": {**dataclasses.asdict(loaded.machine), "link": loaded.link.label},
        "settings": {**settings_of(loaded.settings), "checkpoint": loaded.spec.name},
        "plan": dataclasses.asdict(snapshot.plan) if snapshot.plan else None,
        "memory_bytes": dict(snapshot.memory_bytes),
        "hardware": dataclasses.asdict(sample) if sample is not None else None,
        "phase": snapshot.phase,
        "reply": dataclasses.asdict(snapshot.reply) if snapshot.reply else None,
        "figures": {"last_reply": _scope(snapshot.last_reply), "session": _scope(snapshot.session)},
        "lost_events": trace.lost_events,
        "lost_routing": trace.lost_routing,
        "codes": {
            "kind": _codes(EventKind),
            "phase": _codes(TracePhase),
            "part": _codes(Part),
            "outcomes": _codes(Outcome),
        },
        "metrics": [metric._asdict() for metric in (*METRICS, *PAGE_METRICS)],
    }


def _scope(scope: Scope) -> dict[str, Any]:
    return {"prefill": _figures(scope.prefill), "decode": _figures(scope.decode)}


def _figures(counters: Counters) -> dict[str, Any]:
    """Every figure of METRICS that counters have, in total."""
    total = counters.total
    return {metric.name: getattr(total, metric.name) for metric in METRICS if hasattr(total, metric.name)}


def _codes(kind: type[EventKind] | type[TracePhase] | type[Part] | type[Outcome]) -> dict[str, int]:
    return {member.name: int(member) for member in kind}


def trace_npz(known: Recorded) -> bytes:
    """Events and routing as structured arrays, where experts live now, and `about`."""
    residency = known.snapshot.residency
    arrays: dict[str, NDArray[Any]] = {
        "events": known.trace.events,
        "routing": known.trace.routing,
        "residency": np.empty((0, 0), np.uint8) if residency is None else residency,
        "about": np.frombuffer(about_json(known).encode(), np.uint8),
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def about_json(known: Recorded) -> str:
    return json.dumps(about(known), indent=1, allow_nan=False)


# ---- settings ----


def settings_of(settings: Settings) -> dict[str, Any]:
    """Those that make sense on another machine too."""
    return {name: getattr(settings, name) for name in _TYPES}


def settings_json(settings: Settings) -> str:
    return json.dumps({"moepic_settings": FORMAT, **settings_of(settings)}, indent=1)


def read_settings(data: bytes, present: Settings) -> Settings:
    """The settings in a file that `settings_json` or a person wrote; what it leaves out stays as at `present`.

    Raises BadSettings with one sentence for anything else.
    """
    if len(data) > LIMIT_BYTES:
        raise BadSettings(f"the file has {len(data)} bytes; settings have at most {LIMIT_BYTES}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSettings(f"the file is not JSON ({type(error).__name__}); export settings to see what it should be"
                          ) from error  # fmt: skip
    if not isinstance(found, dict) or found.pop("moepic_settings", None) != FORMAT:
        raise BadSettings(f'the file holds no settings; it must be an object with "moepic_settings": {FORMAT}')
    for name, value in found.items():
        if name not in _TYPES:
            raise BadSettings(f"unknown setting '{name}'{nearest(name, _TYPES)} Allowed: {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _TYPES[name])
            raise BadSettings(f"setting '{name}' must be {wanted}, found {json.dumps(value)[:60]}")
    return present.replace(**found)
