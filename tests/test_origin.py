"""Whose routing predictions stand on, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from test_live import served
from test_metrics import NUM_EXPERTS, NUM_LAYERS

from app.origin import origin
from moepic_core.checkpoint import read_spec
from moepic_core.extras import brought_routing
from moepic_core.routing import RoutingTrace, joined
from moepic_core.trace import decoded
from moepic_core.trace_file import save_trace


def recorded() -> RoutingTrace:
    return decoded(served().trace(), [NUM_EXPERTS] * NUM_LAYERS, "recorded", {})


def test_tokens_are_told_apart_by_where_they_were_made() -> None:
    own = recorded()
    brought = decoded(served().trace(), [NUM_EXPERTS] * NUM_LAYERS, "recorded", {1: "sums", 2: "stories"}).last(30)
    count = own.num_tokens
    assert origin(None).startswith("assumed routing")
    assert origin(own) == f"{count} tokens made on this machine"
    assert origin(brought) == "30 tokens that came with the checkpoint"
    both = joined(brought, own)
    assert origin(both) == f"30 tokens that came with the checkpoint and {count} made on this machine"
    assert origin(both.last(count)) == origin(own)


def test_what_came_with_a_checkpoint_is_told_from_chats_even_if_nobody_has_named_it(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoints("qwen3_moe").iterdir():
        (folder / file.name).symlink_to(file)
    spec = read_spec(folder)
    counts = tuple(layer.num_experts for layer in spec.moe_layers)
    experts = np.tile(np.arange(spec.top_k, dtype=np.int16), (7, len(counts), 1))
    zeros = np.zeros(7, np.int32)
    trace = RoutingTrace(experts, experts, counts, zeros, zeros.astype(np.int16), ("unknown",), "recorded")
    save_trace(trace, folder / "routing.npz")
    (folder / "moepic.json").write_text(json.dumps({"routing": "routing.npz"}))
    found = brought_routing(spec)
    assert origin(found) == "7 tokens that came with the checkpoint"
