"""`moepic generate`: answers a prompt, as text while it is made or as JSON with all figures."""

from __future__ import annotations

import argparse
import json
import sys

from ..errors import BadSettings
from .answers import add_reply_options, context, loaded, prompt_of, reply_figures, sampling_of, summary
from .options import add_checkpoint, settings_of

HELP = "answer a prompt"


def add_options(command: argparse.ArgumentParser) -> None:
    add_checkpoint(command)
    add_reply_options(command, replies=1)
    command.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")


def run(options: argparse.Namespace) -> None:
    settings, prompt = settings_of(options), prompt_of(options)
    if prompt is None:
        raise BadSettings("nothing to answer; give --prompt TEXT or --prompt-ids-file FILE")
    sampling = sampling_of(options)
    with loaded(settings) as engine:
        show = None if options.json else _show
        replies = [reply_figures(engine, prompt, sampling, show) for _ in range(options.replies)]
        if options.json:
            print(json.dumps({**replies[-1], "replies": replies, **context(engine)}))
            return
        for notice in engine.notices:
            print(f"note: {notice}", file=sys.stderr)
        print(f"\n{summary(replies[-1], engine)}", file=sys.stderr)


def _show(text: str) -> None:
    print(text, end="", flush=True)
