"""What the commands' options have in common: checkpoint and settings, numbers that are refused kindly, one-line errors.

Each command adds these to its own parser; `settings_of` turns what was given into `Settings`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import NoReturn, get_args

from ..spec import STRATEGIES, EvictionName, Settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, like every other mistake of the user."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Checkpoint and settings, as `settings_of` reads them."""
    command.add_argument("checkpoint", help="a folder, or a Hugging Face id such as Qwen/Qwen3-30B-A3B")
    add_json(command)
    _add_settings(command)


def add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vram", default="auto", help='device budget: 2GB, 2GiB, 50%% of what everything needs, or "50%% of experts"'
    )
    command.add_argument("--split", type=float, help="split ratio, 0 (nothing cached) to 1 (whole experts)")
    command.add_argument("--strategy", default="moepic", help=", ".join(STRATEGIES))
    command.add_argument("--eviction", default="auto", help=f"auto, {', '.join(get_args(EvictionName))}")
    command.add_argument("--prefetch", type=_prefetch, default="auto",
                         help="auto, on, off, or how many experts of the next layer are guessed")  # fmt: skip
    command.add_argument("--device", default="auto", help="auto, cuda or cpu")
    command.add_argument("--link", default="auto", help="disk, emulated:16GB/s, pcie4x16, …")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--context-length", type=int, metavar="N", help="tokens that KV memory is reserved for")
    command.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens per pass")
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--packed-dir", help="folder for packed experts of the disk link")


def settings_of(options: argparse.Namespace) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings.create(**{name: value for name, value in vars(options).items() if name in names})


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; give 1 or more")
    return int(text)


def _prefetch(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdecimal() else text
