"""Calibration on a real tiny checkpoint: what it finds is plausible, is kept, and leaves no trace in the session."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moepic_core import cli
from moepic_core.calibration import calibrate
from moepic_core.costs import Costs, LayerCosts, LinkSpeed
from moepic_core.engine import Engine
from moepic_core.errors import Cancelled
from moepic_core.events import Done
from moepic_core.hf.text import Sampling
from moepic_core.memory import Memory
from moepic_core.spec import Settings

PROMPT = [3 + (31 * place) % 300 for place in range(24)]


@pytest.fixture
def engine(checkpoints: Callable[..., Path], tmp_path: Path) -> Iterator[Engine]:
    settings = Settings.create(
        checkpoint=str(checkpoints("qwen3_moe")),
        device="cpu",
        link="emulated:50MB/s",
        vram="50% of experts",
        context_length=96,
        prefill_chunk=8,
    )
    with Engine.load(settings, memory=tmp_path) as engine:
        yield engine


def greedy(engine: Engine) -> tuple[int, ...]:
    *_, done = engine.generate(PROMPT, Sampling(max_new_tokens=12, ignore_eos=True))
    assert isinstance(done, Done)
    return done.token_ids


def test_calibration_measures_and_leaves_no_trace(engine: Engine, tmp_path: Path) -> None:
    assert engine.machine.link_bytes_per_s is engine.machine.host_memory_bytes_per_s is None
    before = greedy(engine)
    snapshot = engine.snapshot()
    shares: list[float] = []
    costs = calibrate(engine, shares.append)
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    assert len(costs.layers) == len(engine.spec.moe_layers)
    assert all(layer.before_s > 0 and layer.row_s >= 0 and layer.segment_s >= 0 for layer in costs.layers)
    assert costs.after_s > 0 and costs.source == "measured"
    top_k = engine.spec.top_k
    assert [len(ranks) for ranks in costs.guess_accuracy] == [top_k] * len(costs.layers)
    assert all(0 < share < 1 for ranks in costs.guess_accuracy for share in ranks)
    machine = engine.machine
    assert machine.link_contended_bytes_per_s == costs.link_bytes_per_s
    assert machine.link_bytes_per_s is not None and machine.link_bytes_per_s < 1.25 * 50e6
    assert machine.host_memory_bytes_per_s is not None and machine.host_memory_bytes_per_s > 50e6
    expert_bytes = engine.spec.moe_layers[0].expert_bytes
    expert_s = costs.link_latency_s + expert_bytes / costs.link_bytes_per_s
    assert expert_s > 0.9 * expert_bytes / 50e6  # never sooner than over the emulated link; later on a busy machine
    after = engine.snapshot()
    assert after.session.decode.total == snapshot.session.decode.total
    assert after.reply == snapshot.reply
    engine.check()
    assert greedy(engine) == before
    engine.check()
    assert engine.steering.costs == costs


def test_what_was_measured_is_known_at_the_next_start(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = calibrate(engine)
    greedy(engine)
    greedy(engine)
    greedy(engine)
    settings = engine.settings
    engine.close()
    with Engine.load(settings, memory=tmp_path) as again:
        assert again.steering.costs == costs
        assert again.steering.earlier is not None and again.steering.earlier.num_tokens >= 32
        assert sum(map(sum, again.residency.where())) > 0  # the cache is warm before the first token
        assert costs.alone is not None and again.machine.link_bytes_per_s == costs.alone.bytes_per_s
        again.check()
    monkeypatch.setenv("MOEPIC_HOME", str(tmp_path))
    options = ("--device", "cpu", "--link", settings.link, "--vram", settings.vram, "--context-length", "96")
    assert cli.main(["plan", settings.checkpoint, *map(str, options)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^measured: link .*/s alone, .* of guesses right$", said, re.MULTILINE), said
    assert re.search(r"over the link in .* are hidden and .* spent on wrong guesses", said), said


def test_a_session_without_guesses_plans_by_those_of_calibration(engine: Engine) -> None:
    """Where everything is resident, or prefetch is off, nobody guesses; the next plan may want to prefetch."""
    calibrate(engine)
    engine.reconfigure(vram=engine.needs.everything, prefetch="off")
    for _ in range(4):
        greedy(engine)
    trace = engine.steering.trace()
    assert trace is not None and not (trace.guesses >= 0).any()
    plan = engine.reconfigure(vram="50% of experts", prefetch="on")
    assert plan.prefetch_depth > 0 and "of guesses right (measured at calibration)" in plan.reason, plan.reason


def test_a_new_plan_is_due_when_what_is_known_has_doubled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepic_core.steering._FIRST", 20)
    calibrate(engine)
    planned_from = []
    monkeypatch.setattr(engine.governor, "apply", lambda plan: planned_from.append(engine.steering.trace()))
    for _ in range(8):
        greedy(engine)
    known = [trace.num_tokens if trace else 0 for trace in planned_from]
    assert len(known) >= 2, known
    assert all(later >= 2 * earlier for earlier, later in pairwise(known)), known


def test_a_stop_ends_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.turn.stop, "clear", lambda: None)
    engine.request_stop()
    with pytest.raises(Cancelled):
        calibrate(engine)
    monkeypatch.undo()
    engine.turn.stop.clear()
    engine.check()
    assert engine.steering.costs is None
    assert len(greedy(engine)) == 12


def kept(folder: Path) -> tuple[Memory, Path, dict[str, Any]]:
    """A memory that holds costs under the key "it", the file that they are in, and what that says."""
    memory = Memory(folder)
    layer = LayerCosts(1e-3, 1e-4, 1e-5, 1e-5, 1e-6, 1e-10, 1e-5)
    memory.keep_costs(["it"], Costs((layer,), 1e-3, 1e9, 1e-5, 4096, "measured", alone=LinkSpeed(1e9, 1e-5, 0.0, 1e9)))
    assert memory.costs(["it"]) is not None
    (path,) = folder.rglob("*.json")
    return memory, path, json.loads(path.read_text())


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "\x00\x01", '{"version": '])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: str) -> None:
    memory, path, _ = kept(tmp_path)
    path.write_text(damage)
    assert memory.costs(["it"]) is None
    assert Memory(None).costs(["it"]) is None


@pytest.mark.parametrize(
    "changes",
    [{"version": 1}, {"time": "yesterday"}, {"costs": []}, {"costs": {}}, {"costs": {"layers": []}}],
)
def test_a_file_that_says_something_else_counts_as_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    memory, path, told = kept(tmp_path)
    path.write_text(json.dumps({**told, **changes}))
    assert memory.costs(["it"]) is None


@pytest.mark.parametrize("name", ["layers", "alone", "guess_accuracy", "after_s"])
def test_costs_that_lack_a_part_count_as_none(tmp_path: Path, name: str) -> None:
    memory, path, told = kept(tmp_path)
    del told["costs"][name]
    path.write_text(json.dumps(told))
    assert memory.costs(["it"]) is None


@pytest.mark.parametrize("part", [{"layers": 7}, {"layers": [{"one": 1}]}, {"alone": 7}, {"of_another_version": 7}])
def test_costs_of_another_shape_count_as_none(tmp_path: Path, part: dict[str, Any]) -> None:
    memory, path, told = kept(tmp_path)
    path.write_text(json.dumps({**told, "costs": {**told["costs"], **part}}))
    assert memory.costs(["it"]) is None


@pytest.mark.parametrize(("days", "known"), [(0, True), (29.9, True), (30.1, False), (400, False)])
def test_costs_older_than_30_days_count_as_none(tmp_path: Path, days: float, known: bool) -> None:
    memory, path, told = kept(tmp_path)
    path.write_text(json.dumps({**told, "time": told["time"] - days * 24 * 3600}))
    assert (memory.costs(["it"]) is not None) == known
