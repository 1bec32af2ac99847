"""The command line in-process: what it answers, and one line and exit code 2 for every mistake of the user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_checkpoints import write_sparse

from moepic_core import calibration, cli
from moepic_core.commands import generate
from moepic_core.spec import STRATEGIES

ROOT = Path(__file__).parents[1]
REPLY_KEYS = {
    "token_ids", "text", "finish_reason", "ttft_s", "tpot_s", "tokens_per_s", "hit_rate", "partial_hit_rate",
    "miss_rate", "prefetch_accuracy", "bytes_transferred", "decode_bytes_transferred", "stall_s", "link_busy_s",
    "overlap",
}  # fmt: skip
CONTEXT_KEYS = {"budget_bytes", "peak_device_bytes", "device", "link", "notices", "plan", "replies"}


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


Moepic = Callable[..., Run]


@pytest.fixture
def moepic(capfd: pytest.CaptureFixture[str]) -> Moepic:
    def run(*arguments: object) -> Run:
        try:
            code: Any = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own way out
            code = end.code
        return Run(code, *capfd.readouterr())

    return run


@pytest.fixture
def folder(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("qwen3_moe")


ON_CPU = ("--device", "cpu", "--link", "pcie4x16", "--context-length", 64)


def test_inspect_describes_model_and_machine(moepic: Moepic, folder: Path) -> None:
    run = moepic("inspect", folder, "--device", "cpu")
    assert (run.code, run.err) == (0, "")
    first, *rest = run.out.splitlines()
    assert first.startswith(f"{folder.name}  (Qwen3MoeForCausalLM, float32, 1 files, ")
    labels = [line[:16].strip() for line in rest]
    assert labels == [
        "parameters", "layers", "experts", "expert weights", "other weights", "token embedding",
        "KV per token", "machine", "smallest budget", "verdict",
    ]  # fmt: skip
    assert "4, of which 3 with experts" in run.out
    assert "8 per layer, 2 per token, 24 neurons each, 9.22 kB" in run.out
    assert rest[-1].split(maxsplit=1)[1].startswith("fits whole: ")


def test_inspect_as_json(moepic: Moepic, folder: Path) -> None:
    run = moepic("inspect", folder, "--device", "cpu", "--json")
    assert (run.code, run.err) == (0, "")
    found = run.json
    assert set(found) == {"model", "machine", "smallest_budget_bytes", "everything_bytes", "verdict"}
    assert found["model"]["expert_bytes"] == 3 * 8 * 24 * 3 * 32 * 4
    assert found["model"]["top_k"] == 2
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["link_bytes_per_s"] is None
    assert 0 < found["smallest_budget_bytes"] < found["everything_bytes"]
    assert found["verdict"]["step"] == "fits whole"


def test_a_longer_context_needs_a_larger_budget(moepic: Moepic, folder: Path) -> None:
    sizes = [
        moepic("inspect", folder, "--device", "cpu", "--json", "--context-length", tokens).json["smallest_budget_bytes"]
        for tokens in (64, 512)
    ]
    assert sizes[0] < sizes[1]


def test_generate_streams_the_text_that_json_reports(moepic: Moepic, folder: Path) -> None:
    arguments = ("generate", folder, *ON_CPU, "--prompt", "A token uses", "--max-new-tokens", 12)
    shown, reported = moepic(*arguments), moepic(*arguments, "--json")
    assert (shown.code, reported.code) == (0, 0)
    assert shown.out == reported.json["text"]
    assert re.search(
        r"tokens/s, first token after .* hits .*, overlap .* \(emulated link pcie4x16 \(25 GB/s\)\)", shown.err
    )


def test_generate_reports_figures_that_agree(moepic: Moepic, folder: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([5, 77, 191, 30, 8]))
    options = ("--vram", "90%", "--split", 0.5, "--strategy", "moepic", "--ignore-eos", "--max-new-tokens", 16)
    run = moepic("generate", folder, *ON_CPU, "--prompt-ids-file", ids, *options, "--replies", 2, "--json")
    assert (run.code, run.err, run.out.count("\n")) == (0, "", 1)
    found = run.json
    assert set(found) == REPLY_KEYS | CONTEXT_KEYS
    assert [set(reply) for reply in found["replies"]] == [REPLY_KEYS] * 2
    assert found["replies"][0]["token_ids"] == found["replies"][1]["token_ids"] == found["token_ids"]
    assert (len(found["token_ids"]), found["finish_reason"]) == (16, "length")
    assert found["hit_rate"] + found["partial_hit_rate"] + found["miss_rate"] == pytest.approx(1)
    assert found["tokens_per_s"] == pytest.approx(1 / found["tpot_s"])
    assert found["ttft_s"] > 0
    assert 0 <= found["overlap"] <= 1
    assert 0 <= found["prefetch_accuracy"] <= 1
    assert 0 < found["decode_bytes_transferred"] <= found["bytes_transferred"]
    assert found["plan"]["memory"]["budget"] == found["budget_bytes"] >= found["peak_device_bytes"] > 0
    assert {layer["split_ratio"] for layer in found["plan"]["layers"]} == {0.5}
    assert found["link"] == "emulated link pcie4x16 (25 GB/s)"


def test_generate_in_the_chat_template_over_a_disk(moepic: Moepic, folder: Path, tmp_path: Path) -> None:
    disk = (
        "--device",
        "cpu",
        "--packed-dir",
        tmp_path,
        "--context-length",
        64,
        "--max-new-tokens",
        2,
        "--prompt",
        "hi",
    )
    plain = moepic("generate", folder, *disk, "--json")
    chat = moepic("generate", folder, *disk, "--json", "--chat")
    assert (plain.code, chat.code) == (0, 0)
    assert plain.json["link"] == "disk"
    assert chat.json["token_ids"] != plain.json["token_ids"]
    assert len(list(tmp_path.glob("*.moepic"))) == 1


def test_bench_without_a_prompt(moepic: Moepic, folder: Path) -> None:
    options = ("--max-new-tokens", 4, "--replies", 3)
    run = moepic("bench", folder, *ON_CPU, *options)
    assert (run.code, run.err) == (0, "")
    *replies, median = run.out.splitlines()
    assert [line.split(":")[0] for line in replies] == ["reply 1", "reply 2", "reply 3"]
    assert re.fullmatch(r"median of warm replies: [\d.]+ ms per token, [\d.]+ tokens/s", median)
    found = moepic("bench", folder, *ON_CPU, *options, "--json").json
    assert set(found) == REPLY_KEYS | CONTEXT_KEYS | {"tpot_s_min", "tpot_s_max"}
    warm = sorted(reply["tpot_s"] for reply in found["replies"][1:])
    assert [found["tpot_s_min"], found["tpot_s"], found["tpot_s_max"]] == pytest.approx(
        [warm[0], sum(warm) / 2, warm[1]]
    )


def test_bench_compares_strategies_and_measures_for_those_that_plan(
    moepic: Moepic, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(calibration, "calibrate", lambda engine: measured.append(engine.spec.name))
    options = ("--max-new-tokens", 3, "--replies", 1, "--vram", "50% of experts")
    run = moepic("bench", folder, *ON_CPU, *options, "--compare", "on-demand, pregated")
    assert (run.code, run.err, measured) == (0, "", [])
    title, *rows, last = run.out.splitlines()
    assert title.split() == ["strategy", "ms/token", "hits", "partial", "misses", "overlap"]
    assert [row.split()[0] for row in rows] == ["on-demand", "pregated"]
    assert re.fullmatch(r"\(emulated link pcie4x16 \(25 GB/s\), .*, 1 rounds\)", last)
    run = moepic("bench", folder, *ON_CPU, *options, "--compare", "adapmoe,all", "--json")
    assert (run.code, run.err, measured) == (0, "", [folder.name])
    assert list(run.json["compare"]) == ["adapmoe", *(name for name in STRATEGIES if name != "adapmoe")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compare", "all,moepc"), r"strategy 'moepc' is unknown, did you mean 'moepic'\? Allowed: moepic, "),
        (("--compare", ""), "strategy '' is unknown"),
        (("--compare", "all", "--max-new-tokens", 1), "give --max-new-tokens 2 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_loading(
    options: tuple[object, ...], message: str, moepic: Moepic
) -> None:
    run = moepic("bench", "/no/such/folder", *options)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(rf"moepic: [^\n]*{message}[^\n]*\n", run.err), run.err


SIMULATED = ("simulate", "--model", "qwen1.5-moe-a2.7b", "--machine", "rtx3060", "--tokens", 4)


def test_simulate_as_text_and_as_json(moepic: Moepic) -> None:
    run = moepic(*SIMULATED, "--strategy", "on-demand", "--vram", "8GB")
    assert (run.code, run.err) == (0, "")
    title, head, row = run.out.splitlines()
    assert title.startswith("SIMULATED: Qwen1.5-MoE-A2.7B on RTX 3060 12 GB, 8 GB; ")
    assert head.split()[:2] == ["strategy", "ms/token"]
    assert row.split()[0] == "on-demand"
    found = moepic(*SIMULATED, "--strategy", "on-demand", "--vram", "8GB", "--json").json
    assert (found["simulated"], found["budget_bytes"], found["machine"]) == (True, 8 * 10**9, "RTX 3060 12 GB")
    (only,) = found["rows"]
    assert only["tokens_per_s"] == pytest.approx(1 / only["tpot_s"])
    assert (only["strategy"], only["hit_rate"], only["miss_rate"]) == ("on-demand", 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", 0), "'0' is no count; give 1 or more"),
        (("--tokens", -5), "'-5' is no count; give 1 or more"),
        (("--model", "qwen"), "model 'qwen' is unknown.* Allowed: mixtral-8x7b, "),
        (("--machine", "rtx3061"), r"machine 'rtx3061' is unknown, did you mean 'rtx3060'\?"),
        (("--strategy", "lru"), "strategy 'lru' is unknown"),
        (("--vram", "100GB"), "a budget of 100 GB is more than the 12.9 GB of RTX 3060 12 GB; lower it or choose"),
        (("--vram", "1GB"), "a budget of 1 GB is too small for this model"),
        (("--vram", "much"), "size 'much' is not understood"),
        (("--trace", "/no/such.npz"), "such.npz"),
        (("--context-length", 10**6), "context_length 1000000 is more than the model's 8192"),
    ],
)
def test_a_mistake_in_simulate_gets_one_line(options: tuple[object, ...], message: str, moepic: Moepic) -> None:
    run = moepic(*SIMULATED, *options)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(rf"moepic( simulate)?: [^\n]*{message}[^\n]*\n", run.err), run.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trace", "/no/such.npz"), "such.npz"),
        (("--vram", "100kB"), "a budget of 100 kB is too small for this model"),
        (("--vram", "150%"), "at most 100, such as 50%"),
        (("--prefetch", 3), "prefetch 3 is more than the 2 experts that a token uses in a layer"),
        (("--link", "emulated:fast"), "link 'emulated:fast' names no bandwidth; .* such as emulated:16GB/s"),
    ],
)
def test_a_mistake_in_plan_gets_one_line(
    options: tuple[object, ...], message: str, moepic: Moepic, folder: Path
) -> None:
    run = moepic("plan", folder, *ON_CPU, *options)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(rf"moepic( plan)?: [^\n]*{message}[^\n]*\n", run.err), run.err


def test_inspect_refuses_a_family_that_cannot_be_loaded(moepic: Moepic, folder: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown"
    shutil.copytree(folder, unknown)
    config = (unknown / "config.json").read_text()
    (unknown / "config.json").write_text(config.replace('"model_type": "qwen3_moe"', '"model_type": "zork_moe"'))
    for run in (moepic("inspect", unknown), moepic("generate", unknown, *ON_CPU, "--prompt", "x")):
        assert (run.code, run.out) == (2, "")
        assert "model type 'zork_moe' has no causal language model in this Transformers" in run.err


def test_ctrl_c_ends_the_reply_and_then_the_program(
    moepic: Moepic, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    arguments = ("generate", folder, *ON_CPU, "--prompt", "A token", "--max-new-tokens", 50, "--ignore-eos")
    times, shown = 1, []

    def show(text: str) -> None:
        shown.append(text)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(generate, "_show", show)
    assert (moepic(*arguments).code, len(shown)) == (0, 1)
    assert signal.getsignal(signal.SIGINT) is before
    times = 2
    assert (moepic(*arguments).code, len(shown)) == (130, 2)
    assert signal.getsignal(signal.SIGINT) is before


def dense(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 16,
        "max_position_embeddings": 64, "dtype": "float32",
    }))  # fmt: skip
    write_sparse(folder / "model.safetensors", {"model.embed_tokens.weight": ("F32", [16, 8])})
    return folder


def ids_file(folder: Path, text: str) -> Path:
    path = folder / "ids.json"
    path.write_text(text)
    return path


MISTAKES: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "no such folder": (
        lambda model, tmp: ["/no/such/folder", "--prompt", "x"],
        "'/no/such/folder' is neither a folder",
    ),
    "no config.json": (lambda model, tmp: [tmp, "--prompt", "x"], "config.json"),
    "dense model": (lambda model, tmp: [dense(tmp), "--prompt", "x"], "is a dense model without routed experts"),
    "budget too small": (
        lambda model, tmp: [model, "--prompt", "x", "--vram", "100kB"],
        r"a budget of 100 kB is too small for this model: the smallest is [\d.]+ kB \(\d+ bytes: ",
    ),
    "a seed that is too large": (
        lambda model, tmp: [model, "--prompt", "x", "--temperature", 1, "--seed", 10**22],
        f"seed {10**22} is out of range; allowed is 0 to 18446744073709551615",
    ),
    "nonsense units": (
        lambda model, tmp: [model, "--prompt", "x", "--vram", "12 parsecs"],
        "size '12 parsecs' is not understood; write a number and a unit such as 2GB",
    ),
    "nonsense percentage": (lambda model, tmp: [model, "--prompt", "x", "--vram", "150%"], "at most 100, such as 50%"),
    "split out of range": (
        lambda model, tmp: [model, "--prompt", "x", "--split", 1.5],
        r"split ratio 1.5 is out of range; allowed is 0 \(nothing cached\) to 1 \(whole\)",
    ),
    "split that is no number": (
        lambda model, tmp: [model, "--prompt", "x", "--split", "half"],
        "argument --split: invalid float value: 'half'",
    ),
    "unknown strategy": (
        lambda model, tmp: [model, "--prompt", "x", "--strategy", "mixtral-ofloading"],
        r"strategy 'mixtral-ofloading' is unknown, did you mean 'mixtral-offloading'\?",
    ),
    "unknown option": (
        lambda model, tmp: [model, "--prompt", "x", "--gpu-layers", 3],
        "unrecognized arguments: --gpu-l",
    ),
    "prompt longer than the context": (
        lambda model, tmp: [model, "--prompt-ids-file", ids_file(tmp, str([7] * 64))],
        "the prompt has 64 tokens and leaves no room in a context of 64; shorten it or raise context_length",
    ),
    "context longer than the model's": (
        lambda model, tmp: [model, "--prompt", "x", "--context-length", 513],
        "context_length 513 is more than the model's 512",
    ),
    "missing prompt": (lambda model, tmp: [model], "nothing to answer; give --prompt TEXT or --prompt-ids-file FILE"),
    "empty prompt": (lambda model, tmp: [model, "--prompt", ""], "the prompt is empty; give at least one token"),
    "two prompts": (
        lambda model, tmp: [model, "--prompt", "x", "--prompt-ids-file", "y"],
        "argument --prompt-ids-file: not allowed with argument --prompt",
    ),
    "no such ids": (lambda model, tmp: [model, "--prompt-ids-file", tmp / "none"], "No such file or directory"),
    "ids that are no JSON": (
        lambda model, tmp: [model, "--prompt-ids-file", ids_file(tmp, "1 2")],
        "cannot read token",
    ),
    "ids that are no list": (
        lambda model, tmp: [model, "--prompt-ids-file", ids_file(tmp, '{"ids": [1]}')],
        r"holds no JSON list of token ids, such as \[1, 15, 7\]",
    ),
    "ids that are no numbers": (
        lambda model, tmp: [model, "--prompt-ids-file", ids_file(tmp, '[1, "two", true]')],
        "holds no JSON list of token ids",
    ),
    "ids outside the vocabulary": (
        lambda model, tmp: [model, "--prompt-ids-file", ids_file(tmp, "[1, 320]")],
        "token id 320 is outside the vocabulary; allowed is 0 to 319",
    ),
    "bad link": (
        lambda model, tmp: [model, "--prompt", "x", "--link", "pcie4x61"],
        r"link 'pcie4x61' is unknown, did you mean 'pcie4x16'\?",
    ),
    "device cuda without CUDA": (
        lambda model, tmp: [model, "--prompt", "x", "--device", "cuda", "--link", "auto"],
        "device 'cuda' is not available on this machine; use device 'cpu' or 'auto'",
    ),
    "no replies": (lambda model, tmp: [model, "--prompt", "x", "--replies", 0], "'0' is no count; give 1 or more"),
    "no tokens": (
        lambda model, tmp: [model, "--prompt", "x", "--max-new-tokens", 0],
        "max_new_tokens 0 is out of range",
    ),
    "negative temperature": (
        lambda model, tmp: [model, "--prompt", "x", "--temperature", -1],
        "temperature -1.0 is out of range; allowed is 0 to 100",
    ),
    "a full disk": (
        lambda model, tmp: [model, "--prompt", "x", "--link", "disk", "--packed-dir", ids_file(tmp, "") / "below"],
        "cannot pack .* of experts into .*: Not a directory; free some space or choose another folder with packed_dir",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(
    mistake: str, moepic: Moepic, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments, message = MISTAKES[mistake]
    run = moepic("generate", *ON_CPU, *arguments(folder, tmp_path))
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(rf"moepic( generate)?: [^\n]*{message}[^\n]*\n", run.err), run.err


@pytest.mark.parametrize("arguments", [[], ["explode"], ["inspect"]], ids=["no command", "unknown command", "no model"])
def test_a_wrong_command_gets_one_line_too(arguments: list[str], moepic: Moepic) -> None:
    run = moepic(*arguments)
    assert (run.code, run.out) == (2, "")
    assert re.fullmatch(r"moepic[^\n]*--help\)\n", run.err), run.err


def test_help_names_every_setting(moepic: Moepic) -> None:
    for command in ("inspect", "generate", "bench"):
        run = moepic(command, "--help")
        assert (run.code, run.err) == (0, "")
        for name in STRATEGIES:
            assert name in run.out
        for option in ("--vram", "--split", "--link", "--dtype", "--context-length", "--packed-dir", "--json"):
            assert option in run.out


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from moepic_core.cli import build_parser; build_parser().format_help(); "
        "print(sorted({'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("given", [None, "max_split_size_mb:64"])
def test_a_gpus_memory_is_cut_to_size_unless_the_user_has_other_ideas(
    given: str | None, moepic: Moepic, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", given or "")
    if given is None:
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert moepic("inspect", folder).code == 0
    assert os.environ["PYTORCH_ALLOC_CONF"] == (given or "expandable_segments:True")


def test_the_program_itself(folder: Path) -> None:
    """The one test in a process of its own: exit code, one JSON line, nothing of Transformers' chatter."""
    command = [sys.executable, "-m", "moepic_core", "generate", str(folder), *map(str, ON_CPU), "--json"]
    run = subprocess.run(
        [*command, "--prompt", "hello", "--max-new-tokens", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr, run.stdout.count("\n")) == (0, "", 1)
    assert 1 <= len(json.loads(run.stdout)["token_ids"]) <= 3
