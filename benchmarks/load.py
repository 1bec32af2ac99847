"""Time and peak memory of loading a checkpoint, against reading the files once and converting them with plain torch.

`python -m benchmarks.load CHECKPOINT [--link pcie4x16|disk] [--rounds 3] [--packed-dir DIR]`. Every load runs in a
process of its own, because peak memory is a property of a process; the two kinds take turns. The page cache is dropped
for the checkpoint before each load. Beside the peak stands what loading may take: the store and the weights outside the
experts (with the disk link: the budget), 1.5 times the largest layer and 0.7 GB. Median, least and most of the rounds;
the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import checkpoint_name, report, spread, take_turns
from benchmarks.raw_rates import forget_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--link", default="pcie4x16")
    parser.add_argument("--vram", default="100%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed-dir", default=None, help="where the disk link packs (default: the temporary folder)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(_plain(options.checkpoint) if options.only == "plain" else _ours(options)))
        return
    turns = take_turns({kind: partial(_child, kind, options) for kind in ("ours", "plain")}, options.rounds)
    summary: dict[str, Any] = {}
    for kind, first in turns.rounds[0].items():
        summary[kind] = {key: spread(results[kind][key] for results in turns.rounds) for key in first}
        seconds, peak_gb = summary[kind]["seconds"], summary[kind]["peak_bytes"]["max"] / 1e9
        print("{:6} {median:6.2f} s ({min:.2f}–{max:.2f}), peak {:.2f} GB".format(kind, peak_gb, **seconds))
    ratio = spread(results["ours"]["seconds"] / results["plain"]["seconds"] for results in turns.rounds)
    allowed = summary["ours"]["allowed_bytes"]["min"] / 1e9
    print("ratio  {median:.2f} ({min:.2f}–{max:.2f}); {:.2f} GB are allowed".format(allowed, **ratio))
    report("load", {
        "checkpoint": checkpoint_name(options.checkpoint), "link": options.link, "vram": options.vram,
        "rounds": options.rounds, "rounds_disturbed": turns.num_disturbed, "disturbed_rounds_kept": turns.all_kept,
        "ratio": ratio, **summary,
    })  # fmt: skip


def _child(kind: str, options: argparse.Namespace) -> dict[str, float]:
    if not options.warm:
        forget_pages(options.checkpoint)
    with tempfile.TemporaryDirectory(dir=options.packed_dir) as folder:
        command = [sys.executable, "-m", "benchmarks.load", str(options.checkpoint), "--only", kind]
        command += ["--link", options.link, "--vram", options.vram, "--packed-dir", folder]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def _ours(options: argparse.Namespace) -> dict[str, float]:
    from moepic_core.engine import Engine
    from moepic_core.spec import Settings

    settings = Settings(
        str(options.checkpoint), device="cpu", link=options.link, vram=options.vram, context_length=256,
        packed_dir=options.packed_dir,
    )  # fmt: skip
    before = _peak()
    start = time.perf_counter()
    with Engine.load(settings) as engine:
        seconds, peak = time.perf_counter() - start, _peak()
        spec = engine.spec
        held = engine.plan.memory.budget if options.link == "disk" else spec.host_bytes + engine.needs.resident
        allowed = held + 1.5 * spec.largest_layer_bytes + 0.7e9
        return {"seconds": seconds, "peak_bytes": peak, "before_bytes": before, "allowed_bytes": allowed}


def _plain(checkpoint: Path) -> dict[str, float]:
    """Reads every tensor once and makes it contiguous in the layout that experts are kept in: down transposed."""
    from safetensors import safe_open

    before = _peak()
    start = time.perf_counter()
    kept = []
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                tensor = file.get_tensor(name)
                is_down = (tensor.dim() > 1 and "expert" in name and "down" in name) or ".w2." in name
                kept.append(tensor.transpose(-1, -2).contiguous() if is_down else tensor.clone())
    return {"seconds": time.perf_counter() - start, "peak_bytes": _peak(), "before_bytes": before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
