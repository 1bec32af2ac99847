"""The command line: one subcommand for each file of `commands`. Only these print.

Results go to stdout, progress and complaints to stderr. With `--json` the last line of stdout is one JSON object. Exit
code 0, or 2 with one line on stderr when the user can mend it. Heavy imports happen inside the commands, so `--help` is
quick.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from .commands import bench, generate, inspect, plan, simulate
from .commands.options import Parser
from .errors import MoepicError

# Each says HELP, adds its options to a parser, and runs on what was given.
COMMANDS: dict[str, ModuleType] = {
    "inspect": inspect,
    "generate": generate,
    "bench": bench,
    "plan": plan,
    "simulate": simulate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    # Torch reads this when it is imported. Without it, cache slots of odd sizes leave up to a third of a GPU unusable.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        COMMANDS[options.command].run(options)
    except MoepicError as error:
        print(f"moepic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moepic", description="Run Mixture-of-Experts checkpoints under a device-memory budget.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.HELP))
    return parser
