"""What every benchmark shares: interleaved rounds, who disturbed them, and one JSON object on the last line.

Variants run side by side (A B B A …) after one warm-up, so that drift of the machine meets all alike. A round in
which other processes used more than half a core is thrown away and counted, unless that would leave none.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch

MAX_FOREIGN_CORES = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class Rounds:
    """Measured values of each variant, quiet rounds only."""

    values: dict[str, list[float]]
    num_disturbed: int  # rounds in which other processes were busy
    all_kept: bool  # they were all disturbed, and so none was thrown away

    def median(self, name: str) -> float:
        return statistics.median(self.values[name])

    def spread(self, name: str) -> tuple[float, float]:
        return min(self.values[name]), max(self.values[name])

    def ratio(self, name: str, reference: str) -> float:
        """Median over rounds of `name` / `reference`, each pair from the same round."""
        pairs = zip(self.values[name], self.values[reference], strict=True)
        return statistics.median(value / against for value, against in pairs)


@dataclass(frozen=True)
class Turns(Generic[T]):
    """What each variant returned, round by round, quiet rounds only."""

    rounds: list[dict[str, T]]
    num_disturbed: int  # rounds in which other processes were busy
    all_kept: bool  # they were all disturbed, and so none was thrown away


def take_turns(variants: Mapping[str, Callable[[], T]], num_rounds: int) -> Turns[T]:
    """Run all variants `num_rounds` times in turn, every second time backwards."""
    rounds: list[tuple[float, dict[str, T]]] = []
    order = list(variants)
    for _ in range(num_rounds):
        load = ForeignLoad()
        results = {name: variants[name]() for name in order}
        order.reverse()
        rounds.append((load.cores(), results))
    quiet = [results for cores, results in rounds if cores <= MAX_FOREIGN_CORES]
    kept = quiet or [results for _, results in rounds]
    return Turns(kept, num_rounds - len(quiet), not quiet)


def interleave(variants: Mapping[str, Callable[[], float]], num_rounds: int) -> Rounds:
    """`take_turns` of plain numbers, after one round to warm up."""
    for measure in variants.values():
        measure()
    turns = take_turns(variants, num_rounds)
    values = {name: [results[name] for results in turns.rounds] for name in variants}
    return Rounds(values, turns.num_disturbed, turns.all_kept)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most over rounds."""
    kept = list(values)
    return {"median": statistics.median(kept), "min": min(kept), "max": max(kept)}


class ForeignLoad:
    """How many cores other processes have used since this was made; children that have ended are our own."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        passed_s, all_s, own_s = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, all_s - own_s) / passed_s

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        guest_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user time as well
        return time.perf_counter(), sum(times) - idle_s - guest_s, sum(os.times()[:4])


def report(benchmark: str, results: Mapping[str, Any]) -> None:
    """Print the machine-readable last line."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *map(short, sys.argv[1:])]),
                **machine(),
                **results,
            }
        )
    )


def checkpoint_name(checkpoint: str | Path) -> str:
    """A folder with its parent's name, so that a/fused and b/fused differ; a hub id as it is."""
    return "/".join(Path(checkpoint).absolute().parts[-2:]) if Path(checkpoint).exists() else str(checkpoint)


def short(argument: str) -> str:
    """A path from the root by its last two parts, which name a checkpoint; where it lies here is nobody's business."""
    return "/".join(Path(argument).parts[-2:]) if argument.startswith("/") else argument


def machine() -> dict[str, Any]:
    """Commit, versions and hardware. None is unknown."""
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg(),
    }


def commit() -> str | None:
    """Hash of the checkout, with a `+` if files differ from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None


def cpu_model() -> str | None:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None
