"""Records which experts a checkpoint uses in a scripted conversation, and what the next layer's router guessed.

`python -m benchmarks.record_trace CHECKPOINT --out FILE.npz` plays `assets/traces/conversation.toml` (or another)
greedily and writes a `RoutingTrace`: planner, simulator and benchmarks read it. Any checkpoint will do, also one larger
than memory, for routing depends neither on the budget nor on the link.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from moepic_core.engine import Engine
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.spec import Settings
from moepic_core.trace import decoded
from moepic_core.trace_file import save_trace

TRACES = Path(__file__).resolve().parent.parent / "assets" / "traces"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--conversation", type=Path, default=TRACES / "conversation.toml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--vram", default="50% of experts", help="below 100%%, or nothing is guessed where nothing is missing"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--link", default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per reply")
    options = parser.parse_args()
    settings = Settings.create(
        checkpoint=options.checkpoint, vram=options.vram, device=options.device, link=options.link, strategy="pregated"
    )
    chats = tomllib.loads(options.conversation.read_text(encoding="utf-8"))["chat"]
    with Engine.load(settings) as engine:
        subjects = play(engine, chats, options.max_new_tokens)
        num_experts = [layer.num_experts for layer in engine.spec.moe_layers]
        source = f"recorded from {engine.spec.name}, {options.conversation.name}"
        trace = decoded(engine.residency.telemetry.trace(), num_experts, source, subjects)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_trace(trace, options.out)
    print(json.dumps({
        "tokens": trace.num_tokens, "layers": len(num_experts), "subjects": trace.subject_names,
        "file": options.out.name, "bytes": options.out.stat().st_size,
    }))  # fmt: skip
    return 0


def play(engine: Engine, chats: list[dict[str, Any]], max_new_tokens: int) -> dict[int, str]:
    """Talks; the subject of each reply by its number."""
    subjects: dict[int, str] = {}
    for chat in chats:
        turns: list[dict[str, str]] = []
        for question in chat["user"]:
            turns.append({"role": "user", "content": question})
            *_, done = engine.generate(turns, Sampling(max_new_tokens=max_new_tokens))
            assert isinstance(done, Done)
            turns.append({"role": "assistant", "content": done.text})
            reply = engine.snapshot().reply
            assert reply is not None
            subjects[reply.number] = chat["subject"]
            print(f"[{chat['subject']}] {question} -> {done.text}", file=sys.stderr)
    return subjects


if __name__ == "__main__":
    raise SystemExit(main())
