"""The command line: `inspect`, `generate`, `bench`, and the commands of `cli_planning`. Only these two print.

Results go to stdout, progress and complaints to stderr. With `--json` the last line of stdout is one JSON object. Exit
code 0, or 2 with one line on stderr when the user can mend it. Heavy imports happen inside the commands, so `--help` is
quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .cli_planning import add_plan_options, add_simulate_options, compared, run_plan, run_simulate
from .errors import BadSettings, MoepicError
from .folders import user_folder
from .spec import STRATEGIES, MachineProfile, ModelSpec, Settings
from .units import format_bytes

if TYPE_CHECKING:
    from .engine import Engine, Prompt
    from .hf.text import Sampling


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MoepicError as error:
        print(f"moepic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moepic", description="Run Mixture-of-Experts checkpoints under a device-memory budget.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds, and whether it runs here")
    generate = commands.add_parser("generate", help="answer a prompt")
    bench = commands.add_parser("bench", help="measure decoding speed over several replies")
    for command, run in ((inspect, _inspect), (generate, _generate), (bench, _bench)):
        command.add_argument("checkpoint", help="a folder, or a Hugging Face id such as Qwen/Qwen3-30B-A3B")
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        _add_settings(command)
        command.set_defaults(run=run)
    for command in (generate, bench):
        prompt = command.add_mutually_exclusive_group()
        prompt.add_argument("--prompt", help="text to continue")
        prompt.add_argument("--prompt-ids-file", type=Path, help="JSON list of token ids to continue, instead of text")
        command.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
        command.add_argument("--replies", type=_count, default=1 if command is generate else 3, metavar="N",
                             help="answer the same prompt N times; the first starts with a cold cache")  # fmt: skip
        command.add_argument("--ignore-eos", action="store_true", help="do not stop at the end token")
        command.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
        command.add_argument("--top-p", type=float, default=1.0)
        command.add_argument("--top-k", type=int, default=0)
        command.add_argument("--seed", type=int)
    bench.add_argument("--compare", metavar="NAMES", help="strategies side by side on the loaded model: all, or a list "
                       "such as moepic,pregated")  # fmt: skip
    plan = commands.add_parser("plan", help="what each layer would get under a budget, and how fast that would be")
    plan.add_argument("checkpoint", help="a folder, or a Hugging Face id")
    plan.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    _add_settings(plan)
    add_plan_options(plan)
    plan.set_defaults(run=lambda options: run_plan(options, _settings(options)))
    simulate = commands.add_parser("simulate", help="a model on a graphics card by name, replayed without either")
    add_simulate_options(simulate)
    simulate.set_defaults(run=run_simulate)
    generate.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vram", default="auto", help='device budget: 2GB, 2GiB, 50%% of what everything needs, or "50%% of experts"'
    )
    command.add_argument("--split", type=float, help="split ratio, 0 (nothing cached) to 1 (whole experts)")
    command.add_argument("--strategy", default="moepic", help=", ".join(STRATEGIES))
    command.add_argument("--eviction", default="auto", help="auto, lcp, lru or lfu")
    command.add_argument("--prefetch", default="auto", help="auto, on or off")
    command.add_argument("--device", default="auto", help="auto, cuda or cpu")
    command.add_argument("--link", default="auto", help="disk, emulated:16GB/s, pcie4x16, …")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    command.add_argument("--context-length", type=int, metavar="N", help="tokens that KV memory is reserved for")
    command.add_argument("--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens per pass")
    command.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    command.add_argument("--packed-dir", help="folder for packed experts of the disk link")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; give 1 or more")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 2, like every other mistake of the user."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _settings(options: argparse.Namespace) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings.create(**{name: value for name, value in vars(options).items() if name in names})


def _inspect(options: argparse.Namespace) -> None:
    from .calibrate import probe
    from .checkpoint import read_spec
    from .finder import resolve
    from .needs import needs_of
    from .verdict import judge

    settings = _settings(options)
    spec = read_spec(resolve(settings.checkpoint, settings.revision), settings.dtype)
    machine = probe(settings.device)
    needs = needs_of(settings, spec, machine)
    verdict = judge(spec, needs, machine, settings.link)
    if options.json:
        print(json.dumps({
            "model": {**dataclasses.asdict(spec), "expert_bytes": spec.expert_bytes},
            "machine": dataclasses.asdict(machine),
            "smallest_budget_bytes": needs.smallest,
            "everything_bytes": needs.everything,
            "verdict": dataclasses.asdict(verdict),
        }))  # fmt: skip
        return
    for line in _inspection(spec, machine):
        print(line)
    print(f"smallest budget  {format_bytes(needs.smallest)}, everything resident {format_bytes(needs.everything)}")
    print(f"verdict          {verdict.text}")


def _inspection(spec: ModelSpec, machine: MachineProfile) -> list[str]:
    first = spec.moe_layers[0]
    return [
        f"{spec.name}  ({spec.architecture}, {spec.dtype}, {len(spec.shards)} files, {format_bytes(spec.file_bytes)})",
        f"parameters       {spec.num_parameters / 1e9:.3g} B, {spec.active_parameters / 1e9:.3g} B used per token",
        f"layers           {spec.num_layers}, of which {len(spec.moe_layers)} with experts",
        f"experts          {first.num_experts} per layer, {spec.top_k} per token, {first.neurons} neurons each, "
        f"{format_bytes(first.expert_bytes)}",
        f"expert weights   {format_bytes(spec.expert_bytes)}",
        f"other weights    {format_bytes(spec.resident_bytes)}",
        f"KV per token     {format_bytes(spec.kv_bytes_per_token)} (estimate), context {spec.context_length} tokens",
        f"machine          {machine.device_name}, {format_bytes(machine.device_free_bytes)} of "
        f"{format_bytes(machine.device_total_bytes)} free, host {format_bytes(machine.host_free_bytes)} free",
    ]


def _generate(options: argparse.Namespace) -> None:
    settings, prompt = _settings(options), _prompt(options)
    if prompt is None:
        raise BadSettings("nothing to answer; give --prompt TEXT or --prompt-ids-file FILE")
    sampling = _sampling(options)
    with _loaded(settings) as engine:
        show = None if options.json else _show
        replies = [_reply(engine, prompt, sampling, show) for _ in range(options.replies)]
        if options.json:
            print(json.dumps({**replies[-1], "replies": replies, **_context(engine)}))
            return
        for notice in engine.notices:
            print(f"note: {notice}", file=sys.stderr)
        print(f"\n{_summary(replies[-1], engine)}", file=sys.stderr)


def _bench(options: argparse.Namespace) -> None:
    options.ignore_eos = True
    settings, prompt, sampling = _settings(options), _prompt(options), _sampling(options)
    with _loaded(settings) as engine:
        if prompt is None:
            prompt = [(7919 * place) % engine.spec.vocab_size for place in range(1, 33)]
        if options.compare:
            _compare(options, engine, prompt, sampling)
            return
        replies = []
        for number in range(options.replies):
            replies.append(_reply(engine, prompt, sampling, None))
            if not options.json:
                print(f"reply {number + 1}: {_summary(replies[-1], engine)}")
        warm = [reply["tpot_s"] for reply in replies[1:] or replies if reply["tpot_s"] is not None]
        figures = {"tpot_s": statistics.median(warm), "tpot_s_min": min(warm), "tpot_s_max": max(warm)} if warm else {}
        if options.json:
            print(json.dumps({**replies[-1], **figures, "replies": replies, **_context(engine)}))
        elif warm:
            tpot_s = figures["tpot_s"]
            print(f"median of warm replies: {tpot_s * 1e3:.1f} ms per token, {1 / tpot_s:.1f} tokens/s")


def _compare(options: argparse.Namespace, engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
    """Strategies in turn, each with a warm-up reply after every change, in `--replies` rounds."""
    from .calibration import calibrate

    names = list(STRATEGIES) if options.compare == "all" else options.compare.split(",")
    for name in names:
        engine.settings.replace(strategy=name)  # refuses unknown names before anything is measured
    if engine.steering.costs is None and "moepic" in names:
        calibrate(engine)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.replies):
        for name in names if number % 2 == 0 else names[::-1]:
            engine.reconfigure(strategy=name)
            _reply(engine, prompt, sampling, None)
            rows[name].append(_reply(engine, prompt, sampling, None))
    if options.json:
        print(json.dumps({"compare": rows, **_context(engine)}))
        return
    for line in compared(rows):
        print(line)
    print(f"({engine.link.label}, {format_bytes(engine.plan.memory.budget)}, {options.replies} rounds)")


@contextlib.contextmanager
def _loaded(settings: Settings) -> Iterator[Engine]:
    """The engine; while it is open, the first Ctrl-C ends the reply and the second one the program."""
    from .engine import Engine

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


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _prompt(options: argparse.Namespace) -> Prompt | None:
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


def _sampling(options: argparse.Namespace) -> Sampling:
    from .hf.text import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
    )


def _reply(engine: Engine, prompt: Prompt, sampling: Sampling, show: Callable[[str], None] | None) -> dict[str, Any]:
    """One reply, its text shown as it comes, and its figures as JSON-ready values."""
    from .events import Done, Notice, TokenMade

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


def _context(engine: Engine) -> dict[str, Any]:
    return {
        "budget_bytes": engine.plan.memory.budget,
        "peak_device_bytes": engine.peak_device_bytes,
        "device": engine.machine.device_name,
        "link": engine.link.label,
        "notices": engine.notices,
        "plan": dataclasses.asdict(engine.plan),
    }


def _summary(reply: dict[str, Any], engine: Engine) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    speed = "–" if reply["tokens_per_s"] is None else f"{reply['tokens_per_s']:.1f} tokens/s"
    first = "–" if reply["ttft_s"] is None else f"first token after {reply['ttft_s']:.2f} s"
    return (
        f"{speed}, {first}; hits {percent(reply['hit_rate'])}, partial {percent(reply['partial_hit_rate'])}, "
        f"misses {percent(reply['miss_rate'])}, overlap {percent(reply['overlap'])} ({engine.link.label})"
    )
