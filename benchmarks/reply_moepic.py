"""MoEpic's part in `capped_decode`: one prompt answered twice from disk, in a process of its own.

Prints one JSON object: figures of both replies, where the packed file lies, and the plan in words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.figures import reply_figures
from moepic_core.disk_store import DiskStore
from moepic_core.engine import Engine
from moepic_core.spec import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--vram", required=True)
    parser.add_argument("--packed-dir", required=True)
    parser.add_argument("--prompt-ids-file", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    options = parser.parse_args()
    prompt = json.loads(options.prompt_ids_file.read_text())
    settings = Settings(
        options.checkpoint, device="cpu", link="disk", vram=options.vram, packed_dir=options.packed_dir,
        context_length=len(prompt) + options.max_new_tokens, prefill_chunk=len(prompt),
    )  # fmt: skip
    with Engine.load(settings) as engine:
        store = engine.residency.store
        assert isinstance(store, DiskStore), store
        replies = [reply_figures(engine, prompt, options.max_new_tokens) for _ in range(2)]
        print(json.dumps({"replies": replies, "packed": str(store.path), "plan": engine.plan.reason}))


if __name__ == "__main__":
    main()
