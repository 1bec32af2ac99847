"""Time and peak memory of loading a checkpoint, against reading the files once and converting them with plain torch.

`python -m benchmarks.load CHECKPOINT [--link pcie4x16|disk] [--rounds 3] [--packed-dir DIR]`. Every load runs in a
process of its own, because peak memory is a property of a process; the two kinds take turns. The page cache is dropped
for the checkpoint before each load where the system lets us. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report


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
    results: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(options.rounds):
        for kind in results:
            if not options.warm:
                _drop_page_cache(options.checkpoint)
            results[kind].append(_child(kind, options))
    summary: dict[str, Any] = {}
    for kind, rows in results.items():
        summary[kind] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"{kind:6} {summary[kind]['seconds']:6.2f} s, peak {summary[kind]['peak_bytes'] / 1e9:.2f} GB")
    ratio = statistics.median(
        ours["seconds"] / plain["seconds"] for ours, plain in zip(results["ours"], results["plain"], strict=True)
    )
    print(f"ratio  {ratio:.2f}; allowance {summary['ours']['allowed_bytes'] / 1e9:.2f} GB")
    report("load", {"checkpoint": options.checkpoint.name, "link": options.link, "ratio": ratio, **summary})


def _child(kind: str, options: argparse.Namespace) -> dict[str, float]:
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
        store = 0 if options.link == "disk" else spec.host_bytes
        held = engine.plan.memory.used if options.link == "disk" else store + engine.needs.resident
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


def _drop_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


if __name__ == "__main__":
    main()
