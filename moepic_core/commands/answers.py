"""What `generate` and `bench` share: options of a reply, the loaded engine, and one reply with its figures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadSettings
from ..folders import user_folder
from ..spec import Settings
from ..units import format_bytes
from .options import count

if TYPE_CHECKING:
    from ..engine import Engine, Prompt
    from ..hf.text import Sampling


def add_reply_options(command: argparse.ArgumentParser, replies: int) -> None:
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-ids-file", type=Path, help="JSON list of token ids to continue, instead of text")
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    command.add_argument("--replies", type=count, default=replies, metavar="N",
                         help="answer the same prompt N times; the first starts with a cold cache")  # fmt: skip
    command.add_argument("--ignore-eos", action="store_true", help="do not stop at the end token")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--seed", type=int)


def prompt_of(options: argparse.Namespace) -> Prompt | None:
    """What to answer, from the options alone; None when they do not say."""
    if options.prompt_ids_file is not None:
        try:
            ids = json.loads(options.prompt_ids_file.read_text())
        except (OSError, ValueError) as error:
            raise BadSettings(f"cannot read token ids from {options.prompt_ids_file}: {error}") from error
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise BadSettings(f"{options.prompt_ids_file} holds no JSON list of token ids, such as [1, 15, 7]")
        return ids
    if options.prompt is not None and getattr(options, "chat", False):
        return [{"role": "user", "content": options.prompt}]
    text: str | None = options.prompt
    return text


def sampling_of(options: argparse.Namespace) -> Sampling:
    from ..hf.text import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
    )


@contextlib.contextmanager
def loaded(settings: Settings) -> Iterator[Engine]:
    """The engine; while it is open, the first Ctrl-C ends the reply and the second one the program."""
    from ..engine import Engine

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        engine.request_stop()

    with Engine.load(settings, _progress if sys.stderr.isatty() else None, memory=user_folder()) as engine:
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield engine
        finally:
            signal.signal(signal.SIGINT, before)


def _progress(read: int, total: int) -> None:
    end = "\n" if read >= total else ""
    print(f"\rloading {format_bytes(read)} of {format_bytes(total)}", end=end, file=sys.stderr, flush=True)


def reply_figures(
    engine: Engine, prompt: Prompt, sampling: Sampling, show: Callable[[str], None] | None
) -> dict[str, Any]:
    """One reply, its text shown as it comes, and its figures as JSON-ready values."""
    from ..events import Done, Notice, TokenMade

    engine.hf.forget()  # so that every reply reads its whole prompt
    done: Done | None = None
    for event in engine.generate(prompt, sampling):
        if isinstance(event, TokenMade) and show is not None:
            show(event.text)
        elif isinstance(event, Notice):
            print(f"note: {event.text}", file=sys.stderr)
        elif isinstance(event, Done):
            done = event
    assert done is not None
    snapshot = engine.snapshot()
    reply, decode, both = snapshot.reply, snapshot.last_reply.decode.total, snapshot.last_reply.both.total
    assert reply is not None
    return {
        "token_ids": list(done.token_ids),
        "text": done.text,
        "finish_reason": done.reason,
        "ttft_s": reply.ttft_s,
        "tpot_s": reply.tpot_s,
        "tokens_per_s": reply.tokens_per_s,
        "hit_rate": decode.hit_rate,
        "partial_hit_rate": decode.partial_hit_rate,
        "miss_rate": decode.miss_rate,
        "prefetch_accuracy": decode.prefetch_accuracy,
        "bytes_transferred": both.demand_bytes + both.prefetch_bytes,
        "decode_bytes_transferred": decode.demand_bytes + decode.prefetch_bytes,
        "stall_s": decode.stall_s,
        "link_busy_s": decode.link_busy_s,
        "overlap": decode.overlap,
    }


def context(engine: Engine) -> dict[str, Any]:
    """Under what the figures came about, as JSON-ready values."""
    return {
        "budget_bytes": engine.plan.memory.budget,
        "peak_device_bytes": engine.peak_device_bytes,
        "device": engine.machine.device_name,
        "link": engine.link.label,
        "notices": engine.notices,
        "plan": dataclasses.asdict(engine.plan),
    }


def summary(reply: dict[str, Any], engine: Engine) -> str:
    """The figures of `reply_figures` on one line."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    speed = "–" if reply["tokens_per_s"] is None else f"{reply['tokens_per_s']:.1f} tokens/s"
    first = "–" if reply["ttft_s"] is None else f"first token after {reply['ttft_s']:.2f} s"
    return (
        f"{speed}, {first}; hits {percent(reply['hit_rate'])}, partial {percent(reply['partial_hit_rate'])}, "
        f"misses {percent(reply['miss_rate'])}, overlap {percent(reply['overlap'])} ({engine.link.label})"
    )
