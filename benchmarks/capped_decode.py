"""Decoding a checkpoint that does not fit: MoEpic's disk link against systems that map files, under one memory cap.

`python -m benchmarks.capped_decode CHECKPOINT --vram 480MB [--share 0.5] [--rounds 5] [--work-dir DIR]
[--rivals mapped accelerate llama.cpp] [--llama-cpp PYTHON GGUF]`. Batch 1, greedy, 32 prompt tokens, 64 new ones; a
rival's reply ends early after `--seconds`. Every reply runs in a process of its own inside a cgroup (needs root) that
may hold `--share` of the checkpoint's bytes, page cache included. Systems take turns; the files' pages are dropped
before each, and the second of two replies counts. Before the rounds each system answers briefly without a cap: that
packs the experts and brings libraries into memory, where they are charged to nobody.

The floor is what the bytes alone take, max(missing bytes / disk, used bytes / memory bandwidth): in each round a raw
direct reader with two threads measures the disk right before and after our reply. How far mapped files are read ahead
is a property of the block device under CHECKPOINT and GGUF and decides how rivals fare; it is in the result. The packed
file is in `--work-dir` (default: beside CHECKPOINT), which should be on the same device. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import checkpoint_name, report, spread, take_turns
from benchmarks.figures import NEW_TOKENS, PROMPT_TOKENS, against_floor, prompt_ids
from benchmarks.memory_cap import NoCap, capped
from benchmarks.raw_rates import disk_bytes_per_s, forget_pages, memory_bytes_per_s, read_ahead_kb
from moepic_core.checkpoint import read_spec
from moepic_core.errors import MoepicError

OURS, LLAMA_CPP = "moepic", "llama.cpp"
RIVALS = ("mapped", "accelerate", LLAMA_CPP)
KILLED = -9
WARM_UP_TOKENS = 8
TIMEOUT_S = 300.0  # of a process: loading and two replies
Result = dict[str, Any]  # of one process; without replies where it was killed


@dataclass(frozen=True)
class System:
    name: str
    command: list[str]
    files: list[Path]  # whose pages are dropped before


def main() -> int:
    options = parse()
    try:
        spec = read_spec(options.checkpoint)
        cap_bytes = int(options.share * spec.file_bytes)
        with capped(cap_bytes):
            pass  # refuses before anything is measured
        with tempfile.TemporaryDirectory(dir=options.work_dir, prefix="moepic-benchmark-") as scratch:
            prompt = Path(scratch) / "prompt.json"
            prompt.write_text(json.dumps(prompt_ids(spec.vocab_size)))
            measure(options, cap_bytes, systems(options, prompt, scratch))
    except (NoCap, MoepicError) as error:
        print(f"capped_decode: {error}", file=sys.stderr)
        return 2
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--vram", required=True, help="our budget; what Python and torch take must fit beside it")
    parser.add_argument("--share", type=float, default=0.5, help="the cap, as a share of the checkpoint's bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=["mapped", "accelerate"])
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "GGUF"), help="a Python with llama-cpp-python")
    parser.add_argument("--work-dir", type=Path, help="for packed experts (default: beside CHECKPOINT)")
    parser.add_argument("--seconds", type=float, default=8.0, help="a rival's reply ends after so long")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share {options.share} is no share; allowed is above 0 and at most 1")
    if (LLAMA_CPP in options.rivals) != bool(options.llama_cpp):
        parser.error(f"--rivals {LLAMA_CPP} and --llama-cpp PYTHON GGUF go together")
    if "accelerate" in options.rivals and importlib.util.find_spec("accelerate") is None:
        parser.error("accelerate is not installed; pip install accelerate, or name other --rivals")
    options.checkpoint = options.checkpoint.absolute()
    options.work_dir = (options.work_dir or options.checkpoint.parent).absolute()
    return options


def systems(options: argparse.Namespace, prompt: Path, scratch: str) -> list[System]:
    checkpoint, work = options.checkpoint, options.work_dir
    ask = ["--prompt-ids-file", str(prompt), "--max-new-tokens", str(NEW_TOKENS)]
    ask_rival = [*ask, "--seconds", str(options.seconds)]
    ours = [sys.executable, "-m", "benchmarks.reply_moepic", str(checkpoint), "--vram", options.vram]
    mapped = [sys.executable, "-m", "benchmarks.rival_transformers", str(checkpoint), *ask_rival]
    made = [
        System(OURS, [*ours, "--packed-dir", str(work), *ask], [checkpoint, work]),
        System("mapped", mapped, [checkpoint]),
        System("accelerate", [*mapped, "--offload-dir", scratch], [checkpoint, Path(scratch)]),
    ]
    if options.llama_cpp:
        python, gguf = options.llama_cpp
        command = [python, "-m", "benchmarks.rival_llama_cpp", gguf, *ask_rival]
        made.append(System(LLAMA_CPP, command, [Path(gguf)]))
    return [system for system in made if system.name in (OURS, *options.rivals)]


def measure(options: argparse.Namespace, cap_bytes: int, contestants: list[System]) -> None:
    first = {system.name: run(system, None) for system in contestants}
    packed = Path(first[OURS]["packed"])
    memory_rate = memory_bytes_per_s(torch.device("cpu"))
    variants: dict[str, Callable[[], Result]] = {
        system.name: partial(ours_beside_raw, system, cap_bytes, packed, memory_rate)
        if system.name == OURS
        else partial(run, system, cap_bytes)
        for system in contestants
    }
    turns = take_turns(variants, options.rounds)
    summary = {name: summarised([results[name] for results in turns.rounds]) for name in variants}
    for name, each in summary.items():
        print(line(name, each))
    ratios = [ratio for results in turns.rounds if (ratio := times_best_rival(results)) is not None]
    report("capped_decode", {
        "checkpoint": checkpoint_name(options.checkpoint), "weights": "random (routing is almost uniform)",
        "share": options.share, "cap_bytes": cap_bytes, "vram": options.vram, "plan": first[OURS]["plan"],
        "read_ahead_kb": {system.name: read_ahead_kb(system.files[0]) for system in contestants},
        "read_ahead_kb_packed": read_ahead_kb(packed), "memory_bytes_per_s": memory_rate,
        "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rival_seconds": options.seconds,
        "rounds": options.rounds, "rounds_disturbed": turns.num_disturbed, "disturbed_rounds_kept": turns.all_kept,
        "times_best_rival": spread(ratios) if ratios else None, "systems": summary, "per_round": turns.rounds,
    })  # fmt: skip


def ours_beside_raw(system: System, cap_bytes: int, packed: Path, memory_rate: float) -> Result:
    """Our reply between two readings of the raw disk, judged by their mean."""
    before = disk_bytes_per_s(packed)
    result = run(system, cap_bytes)
    rate = mean((before, disk_bytes_per_s(packed)))
    for reply in result["replies"]:
        reply |= against_floor(reply, rate, memory_rate)
    return {key: value for key, value in result.items() if key not in ("packed", "plan")}


def run(system: System, cap_bytes: int | None) -> Result:
    """What `system` prints, and its peak memory under a cap; without one its replies are short."""
    forget_pages(*system.files)
    if cap_bytes is None:
        short = [*system.command, "--max-new-tokens", str(WARM_UP_TOKENS)]
        return read(system, subprocess.run(short, capture_output=True, text=True, env=environment()))
    with capped(cap_bytes) as cap:
        ended = cap.run(system.command, TIMEOUT_S, environment())
        if ended.returncode == KILLED:
            return {"replies": [], "killed": ended.stderr or "for its memory", "peak_bytes": cap.peak_bytes}
        return {**read(system, ended), "peak_bytes": cap.peak_bytes}


def environment() -> dict[str, str]:
    """Ours, with this repository on Python's path and the hub left alone."""
    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def read(system: System, ended: subprocess.CompletedProcess[str]) -> Result:
    if ended.returncode:
        raise MoepicError(f"{system.name} ended with {ended.returncode}: {(ended.stderr.splitlines() or ['?'])[-1]}")
    result: Result = json.loads(ended.stdout.splitlines()[-1])
    return result


def times_best_rival(results: dict[str, Result]) -> float | None:
    """Our speed by that of the fastest rival of the same round; None where either was killed."""
    seconds = {name: result["replies"][-1]["tpot_s"] for name, result in results.items() if result["replies"]}
    ours = seconds.pop(OURS, None)
    return min(seconds.values()) / ours if seconds and ours else None


def summarised(results: list[Result]) -> Result:
    """Figures of the second reply over rounds, and what the first one and the process had to say."""
    done = [result["replies"] for result in results if result["replies"]]
    summary: Result = {"killed": len(results) - len(done), "peak_bytes": spread(each["peak_bytes"] for each in results)}
    if done:
        summary["tokens_per_s"] = spread(1 / second["tpot_s"] for _, second in done)
        summary["first_reply_tokens_per_s"] = spread(1 / first["tpot_s"] for first, _ in done)
        summary |= {key: spread(second[key] for _, second in done) for key in done[0][1] if key != "tokens_per_s"}
    return summary


def line(name: str, summary: Result) -> str:
    if "tokens_per_s" not in summary:
        return f"{name:12} killed"
    text = "{:12} {median:6.2f} tokens/s ({min:.2f}–{max:.2f})".format(name, **summary["tokens_per_s"])
    if "times_floor" in summary:
        text += "  {median:.2f} × floor ({min:.2f}–{max:.2f})".format(**summary["times_floor"])
        text += "  {median:.0%} of the raw disk".format(**summary["link_share"])
    return text + (f"  killed in {summary['killed']} rounds" if summary["killed"] else "")


if __name__ == "__main__":
    sys.exit(main())
