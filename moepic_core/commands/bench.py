"""`moepic bench`: decoding speed over several replies, of one strategy or of several side by side."""

from __future__ import annotations

import argparse
import json
import statistics
from typing import TYPE_CHECKING, Any

from ..errors import BadSettings
from ..spec import STRATEGIES, Settings
from ..units import format_bytes
from .answers import add_reply_options, context, loaded, prompt_of, reply_figures, sampling_of, summary
from .options import add_checkpoint, settings_of

if TYPE_CHECKING:
    from ..engine import Engine, Prompt
    from ..hf.text import Sampling

PLANNED = ("planned", "dynamic-program")  # allocations that measured costs are needed for
HELP = "measure decoding speed over several replies"


def add_options(command: argparse.ArgumentParser) -> None:
    add_checkpoint(command)
    add_reply_options(command, replies=3)
    command.add_argument(
        "--compare",
        metavar="NAMES",
        help="strategies side by side on the loaded model: all, or a list such as moepic,pregated",
    )


def run(options: argparse.Namespace) -> None:
    options.ignore_eos = True
    settings, prompt, sampling = settings_of(options), prompt_of(options), sampling_of(options)
    names = [] if options.compare is None else _strategies(options.compare, settings)
    if names and options.max_new_tokens < 2:
        raise BadSettings("--compare is about the time from token to token; give --max-new-tokens 2 or more")
    with loaded(settings) as engine:
        if prompt is None:
            prompt = [(7919 * place) % engine.spec.vocab_size for place in range(1, 33)]
        if names:
            _compare(options, names, engine, prompt, sampling)
            return
        replies = []
        for number in range(options.replies):
            replies.append(reply_figures(engine, prompt, sampling, None))
            if not options.json:
                print(f"reply {number + 1}: {summary(replies[-1], engine)}")
        warm = [reply["tpot_s"] for reply in replies[1:] or replies if reply["tpot_s"] is not None]
        figures = {"tpot_s": statistics.median(warm), "tpot_s_min": min(warm), "tpot_s_max": max(warm)} if warm else {}
        if options.json:
            print(json.dumps({**replies[-1], **figures, "replies": replies, **context(engine)}))
        elif warm:
            tpot_s = figures["tpot_s"]
            print(f"median of warm replies: {tpot_s * 1e3:.1f} ms per token, {1 / tpot_s:.1f} tokens/s")


def _strategies(text: str, settings: Settings) -> list[str]:
    """The strategies in a list with commas, where `all` stands for every one. Raises BadSettings for other names."""
    given = [name.strip() for name in text.split(",")]
    names = dict.fromkeys(name for each in given for name in (STRATEGIES if each == "all" else [each]))
    for name in names:
        settings.replace(strategy=name)
    return list(names)


def _compare(options: argparse.Namespace, names: list[str], engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
    """Strategies in turn, each with a warm-up reply after every change, in `--replies` rounds."""
    from ..calibration import calibrate

    if engine.steering.costs is None and any(STRATEGIES[name].allocation in PLANNED for name in names):
        calibrate(engine)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.replies):
        for name in names if number % 2 == 0 else names[::-1]:
            engine.reconfigure(strategy=name)
            reply_figures(engine, prompt, sampling, None)
            rows[name].append(reply_figures(engine, prompt, sampling, None))
    if options.json:
        print(json.dumps({"compare": rows, **context(engine)}))
        return
    for line in _table(rows):
        print(line)
    print(f"({engine.link.label}, {format_bytes(engine.plan.memory.budget)}, {options.replies} rounds)")


def _table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of strategies side by side, each with its replies."""
    lines = [f"{'strategy':20}{'ms/token':>10}{'hits':>8}{'partial':>9}{'misses':>8}{'overlap':>9}"]
    for name, replies in rows.items():
        known = [reply["tpot_s"] for reply in replies if reply["tpot_s"] is not None]  # some may have been stopped
        tpot = f"{1e3 * statistics.median(known):.1f}" if known else "–"
        last = replies[-1]
        shares = [f"{100 * (last[key] or 0):.0f}%" for key in ("hit_rate", "partial_hit_rate", "miss_rate", "overlap")]
        lines.append(f"{name:20}{tpot:>10}{shares[0]:>8}{shares[1]:>9}{shares[2]:>8}{shares[3]:>9}")
    return lines
