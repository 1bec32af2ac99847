"""What a rival's process prints: first and later tokens of two replies, timed, as one JSON object.

The standard library alone, because rivals run in Pythons of their own. Used by `rival_transformers`, `rival_llama_cpp`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def rival_options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("weights", help="the checkpoint's folder or file")
    parser.add_argument("--prompt-ids-file", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="a reply ends after so long, however short it is")
    return parser


def print_replies(reply: Callable[[list[int]], Iterator[object]], options: argparse.Namespace) -> None:
    """Answers the prompt twice. `reply` yields when a token is there, without end."""
    prompt = json.loads(options.prompt_ids_file.read_text())
    print(json.dumps({"replies": [_timed(reply(prompt), options) for _ in range(2)]}), flush=True)


def _timed(tokens: Iterator[object], options: argparse.Namespace) -> dict[str, float]:
    start_s = time.perf_counter()
    times: list[float] = []
    for _ in tokens:
        times.append(time.perf_counter())
        if len(times) > 1 and (len(times) == options.max_new_tokens or times[-1] - times[0] > options.seconds):
            break
    return {
        "ttft_s": times[0] - start_s,
        "tpot_s": (times[-1] - times[0]) / (len(times) - 1),
        "num_tokens": len(times),
    }
