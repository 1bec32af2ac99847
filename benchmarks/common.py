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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

MAX_FOREIGN_CORES = 0.5


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


def interleave(variants: Mapping[str, Callable[[], float]], num_rounds: int) -> Rounds:
    """Run all variants once to warm up, then `num_rounds` times in turn, every second time backwards."""
    for measure in variants.values():
        measure()
    rounds: list[tuple[float, dict[str, float]]] = []
    order = list(variants)
    for _ in range(num_rounds):
        load = ForeignLoad()
        values = {name: variants[name]() for name in order}
        order.reverse()
        rounds.append((load.cores(), values))
    quiet = [values for cores, values in rounds if cores <= MAX_FOREIGN_CORES]
    kept = quiet or [values for _, values in rounds]
    return Rounds({name: [values[name] for values in kept] for name in variants}, num_rounds - len(quiet), not quiet)


class ForeignLoad:
    """How many cores other processes have used since this was made."""

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
        return time.perf_counter(), sum(times) - idle_s - guest_s, time.process_time()


def report(benchmark: str, results: Mapping[str, Any]) -> None:
    """Print the machine-readable last line."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "command": f"python -m benchmarks.{benchmark} {shlex.join(sys.argv[1:])}",
                **machine(),
                **results,
            }
        )
    )


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
