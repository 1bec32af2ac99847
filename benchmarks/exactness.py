"""Exactness in full: every strategy, split ratio, budget and link against Transformers' `eager`, in float32.

`python -m benchmarks.exactness [--families mixtral …]`. The suite covers these pairwise; this is the whole product, on
tiny random checkpoints of nine families: 4 split ratios x 3 budgets (the smallest, half-way, everything) x every
strategy x 3 links (emulated fast, emulated slow, disk). A case is exact if no logit of a prompt's tokens is further
from `eager`'s than 1e-5 of the largest, and 48 greedy tokens after the prompt, read in chunks, are the same. After
each the engine's own check must hold: books balance, the budget is kept. A family takes 75 to 90 s. The last line is
one JSON object; exit code 1 if any case is not exact.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.common import report
from benchmarks.rival_transformers import greedy
from moepic_core.engine import Engine
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.spec import STRATEGIES, Settings

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "qwen3_next",
)  # fmt: skip
SPLITS = (0.0, 0.3, 0.5, 1.0)
LINKS = ("emulated:20GB/s", "emulated:20MB/s", "disk")
PROMPT = [3 + (29 * place + place * place) % 300 for place in range(20)]
NUM_TOKENS, PREFILL_CHUNK, TOLERANCE = 48, 7, 1e-5


@dataclass(frozen=True)
class Reference:
    logits: torch.Tensor  # [tokens of the prompt, vocabulary]
    tokens: list[int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows = []
    for family in options.families:
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="moepic-benchmark-") as scratch:
            errors, wrong = check_family(family, Path(scratch))
        rows.append({"family": family, "num_cases": len(errors), "wrong": wrong, "worst_relative": max(errors),
                     "seconds": time.perf_counter() - start_s})  # fmt: skip
        print("{family:12} {num_cases} cases, worst {worst_relative:.1e}, {seconds:.0f} s".format(**rows[-1]))
        for case in wrong:
            print(f"  not exact: {case}")
    num_wrong = sum(len(row["wrong"]) for row in rows)
    report("exactness", {
        "splits": SPLITS, "budgets": ["smallest", "half-way", "everything"], "strategies": list(STRATEGIES),
        "links": LINKS, "num_tokens": NUM_TOKENS, "tolerance": TOLERANCE,
        "num_cases": sum(row["num_cases"] for row in rows), "num_wrong": num_wrong,
        "worst_relative": max(row["worst_relative"] for row in rows), "families": rows,
    })  # fmt: skip
    return 1 if num_wrong else 0


def check_family(family: str, scratch: Path) -> tuple[list[float], list[str]]:
    """Relative error of each case, and what is wrong with those that are not exact."""
    checkpoint = make_checkpoint(family, scratch / family)
    wanted = reference(checkpoint)
    errors, wrong = [], []
    for case, error, faults in cases(checkpoint, scratch / "packed", wanted):
        errors.append(error)
        if faults:
            wrong.append(f"{case}: {', '.join(faults)}")
    return errors, wrong


def make_checkpoint(family: str, folder: Path) -> Path:
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path.insert(0, str(tests))
    import tiny_checkpoints

    made: Path = tiny_checkpoints.make(family, folder, torch.float32)
    return made


@torch.inference_mode()
def reference(checkpoint: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()
    return Reference(model(torch.tensor([PROMPT])).logits[0], list(islice(greedy(model, PROMPT), NUM_TOKENS)))


def cases(checkpoint: Path, packed: Path, wanted: Reference) -> Iterator[tuple[str, float, list[str]]]:
    """Name, relative error and faults of each case."""
    for link in LINKS:
        settings = Settings(
            str(checkpoint), device="cpu", link=link, context_length=len(PROMPT) + NUM_TOKENS,
            prefill_chunk=PREFILL_CHUNK, packed_dir=str(packed),
        )  # fmt: skip
        with Engine.load(settings) as engine:
            least, most = engine.needs.smallest, engine.needs.everything
            for strategy, split, budget in product(STRATEGIES, SPLITS, (least, (least + most) // 2, most)):
                engine.reconfigure(vram=budget, split=split, strategy=strategy)
                error, faults = differences(engine, wanted)
                yield f"{link}, {strategy}, split {split}, budget {budget}", error, faults


def differences(engine: Engine, wanted: Reference) -> tuple[float, list[str]]:
    """Relative error of the prompt's logits, and what is not as it should be."""
    error = float((all_logits(engine) - wanted.logits).abs().max() / wanted.logits.abs().max())
    engine.hf.forget()
    done = [*engine.generate(PROMPT, Sampling(max_new_tokens=NUM_TOKENS, ignore_eos=True))][-1]
    engine.check()
    assert isinstance(done, Done), done
    faults = [] if error <= TOLERANCE else [f"logits differ by {error:.1e}"]  # NaN differs, too
    if list(done.token_ids) != wanted.tokens:
        faults.append("other tokens")
    return error, faults


def all_logits(engine: Engine) -> torch.Tensor:
    engine.hf.forget()
    engine.residency.begin_pass(len(PROMPT))
    try:
        return engine.hf.forward(PROMPT, all_logits=True)
    finally:
        engine.residency.end_pass()


if __name__ == "__main__":
    sys.exit(main())
