"""What a checkpoint may bring for MoEpic beside its weights, in a file `moepic.json`: first prompts, recorded routing.

`{"suggested_prompts": ["What is …?"], "routing": "routing.npz"}`, both optional; `routing` is a path relative to the
checkpoint's folder, to a file that `benchmarks/record_trace.py` writes; a copied folder may have left it behind. Most
checkpoints bring nothing. The page reads the prompts; routing is where the first plan starts from, before the user has
said anything. Nothing here is believed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import BadCheckpoint
from .routing import BROUGHT, UNKNOWN, RoutingTrace
from .spec import ModelSpec
from .trace_file import load_trace

FILE = "moepic.json"
NUM_PROMPTS, LONGEST_PROMPT = 6, 300  # suggested ones, and their letters


def suggested_prompts(folder: Path) -> tuple[str, ...]:
    """First prompts; none when there is no such list of texts."""
    prompts = _extras(folder).get("suggested_prompts")
    texts = [text for text in prompts if isinstance(text, str) and text.strip()] if isinstance(prompts, list) else []
    return tuple(text[:LONGEST_PROMPT] for text in texts[:NUM_PROMPTS])


def brought_routing(spec: ModelSpec) -> RoutingTrace | None:
    """Which experts a conversation used, as the checkpoint's makers recorded it; None when no recording is here.

    Raises BadCheckpoint for a file that is no trace, or one of another model.
    """
    name = _extras(Path(spec.path)).get("routing")
    if not isinstance(name, str) or not (Path(spec.path) / name).is_file():
        return None
    trace = load_trace(Path(spec.path) / name)
    found = [*trace.num_experts, trace.experts.shape[2]]
    wanted = [*(layer.num_experts for layer in spec.moe_layers), spec.top_k]
    if found != wanted:
        raise BadCheckpoint(
            f"{name} is of another model: experts of each layer and of a token are {found}, not {wanted}"
        )
    return replace(trace, subject_names=tuple(BROUGHT if name == UNKNOWN else name for name in trace.subject_names))


def _extras(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # most checkpoints have none, and one can do without
        return {}
    return found if isinstance(found, dict) else {}
