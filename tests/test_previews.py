"""Steering the one engine: previews before a load and after it, live settings, reserved memory, loading anyway."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import previews
from app.forecasts import Forecasts
from app.nouns import Forecast, Preview
from app.settings_store import SettingsStore
from app.state import State
from moepic_core.budgets import Needs
from moepic_core.calibrate import probe
from moepic_core.costs import Costs, LayerCosts
from moepic_core.errors import BadSettings, OutOfRoom
from moepic_core.planner import TELLING
from moepic_core.spec import MachineProfile, MoeLayer, Settings

GB = 10**9
ROOT = Path(__file__).parents[1]


@pytest.fixture
def state(checkpoints: Callable[..., Path]) -> Iterator[State]:
    settings = Settings(
        str(checkpoints("qwen3_moe")), device="cpu", link="emulated:50MB/s", context_length=256, vram="50% of experts"
    )
    state = State(settings)
    yield state
    state.close()


def loaded(state: State) -> State:
    state.load(state.settings)
    state.wait()
    assert state.look().notice is None
    return state


def forecast_of(state: State, settings: Settings) -> Forecast:
    """The forecast, once it is made; `changes` tells when that is."""
    preview = state.preview(settings)
    waits = threading.Event()
    for _ in range(3000):
        if preview.forecast is not None:
            return preview.forecast
        waits.wait(0.02)
        preview = state.preview(settings)
    raise AssertionError("no forecast after 60 s")


def with_memory(free_bytes: int) -> Callable[[str], MachineProfile]:
    def small(device: str) -> MachineProfile:
        return dataclasses.replace(probe(device), device_free_bytes=free_bytes, host_free_bytes=free_bytes)  # type: ignore[arg-type]

    return small


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "adapmoe"}, {"split": 0.25}, {"eviction": "lru"}, {"prefetch": "off"}, {"vram": "80% of experts"},
        {"split": 1.0, "eviction": "lfu", "prefetch": "on"},
    ],
)  # fmt: skip
def test_live_settings_need_no_load(state: State, changes: dict[str, Any]) -> None:
    engine = loaded(state)._engine
    plan = state.reconfigure(**changes)
    assert state._engine is engine
    preview = state.preview(state.look().loaded.settings)  # type: ignore[union-attr]
    assert preview.loaded and preview.in_force == plan
    assert {name: getattr(preview.settings, name) for name in changes} == changes
    if "eviction" in changes:
        assert plan.eviction == changes["eviction"]
    if "split" in changes:
        assert {share.split_ratio for share in plan.layers} == {changes["split"]}
    if changes.get("prefetch") == "off":
        assert (plan.predictor, plan.prefetch_depth) == ("none", 0)


def test_a_link_needs_a_load_and_the_preview_says_so(state: State) -> None:
    loaded(state)
    with pytest.raises(BadSettings, match="'link' cannot change while loaded"):
        state.reconfigure(link="disk")
    preview = state.preview(state.settings.replace(link="disk"))
    assert (preview.loaded, preview.reloads, preview.link.kind) == (False, True, "disk")
    assert state.preview(state.settings).loaded


def test_a_forecast_is_made_for_what_was_measured_also_before_a_load(state: State) -> None:
    assert state.preview(state.settings).forecast is None  # nothing was measured yet
    changes = loaded(state).look().changes
    found = forecast_of(state, state.settings)
    assert state.look().changes > changes
    needs = state.preview(state.settings).needs
    assert needs is not None
    assert found.budgets[0] == needs.smallest
    assert found.budgets[-1] == needs.everything
    assert found.budgets == sorted(set(found.budgets))
    seconds = [cost.total_s for _, cost in found.points]
    # No routing is recorded yet: whole experts are kept until a split is clearly faster, and all guesses are made.
    assert all(later <= TELLING * sooner for sooner, later in itertools.pairwise(seconds))
    assert found.at(needs.everything, "hit_rate") == 1
    other = State(state.settings)
    try:
        before = forecast_of(other, state.settings)
        assert other.look().loaded is None
        # KV memory is estimated before a load, so everything is a little more or less.
        assert before.points[-1][1].total_s == pytest.approx(seconds[-1], rel=0.01)
    finally:
        other.close()


def test_reserved_memory_is_left_to_others_at_once_and_at_every_load(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = loaded(state).preview(state.settings).needs
    assert needs is not None
    state.reconfigure(vram="100%")
    monkeypatch.setattr(previews, "probe", with_memory(GB))
    free = state.preview(state.settings).free_bytes
    room = needs.smallest + 9 * (needs.everything - needs.smallest) // 10
    state.reserve(round((free - room) / 0.9))
    preview = state.preview(state.look().loaded.settings)  # type: ignore[union-attr]
    assert preview.budget_bytes == pytest.approx(room, abs=10)
    assert preview.settings.vram == "100%"  # what is wanted stays
    state.load(preview.settings)
    state.wait()
    assert state.look().notice is None
    again = state.preview(preview.settings).budget_bytes
    assert again is not None
    assert needs.smallest < again <= room
    with pytest.raises(OutOfRoom, match=r"reserved for other programs .* reserve less"):
        state.reserve(GB)
    assert state.preview(preview.settings).budget_bytes == again
    state.reserve(0)
    assert state.preview(preview.settings).budget_bytes == needs.everything


def test_reserving_may_leave_too_little(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "probe", with_memory(GB))
    state.reserve(GB)
    preview = state.preview(state.settings)
    assert preview.verdict is not None
    assert preview.verdict.step == "will not run"


def test_what_will_not_run_can_be_loaded_anyway(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict stands on what is free now, and that may be wrong."""
    settings = state.settings.replace(link="disk", vram="auto", packed_dir=str(Path(state.settings.checkpoint).parent))
    monkeypatch.setattr(previews, "probe", with_memory(100_000))
    preview = state.preview(settings)
    assert preview.may_be_tried
    assert preview.needs is not None
    state.load(settings)
    state.wait()
    assert "will not run: even without any cached expert" in state.look().notice.text  # type: ignore[union-attr]
    state.load(settings, anyway=True)
    state.wait()
    assert state.look().notice is None
    budget = state.preview(settings).budget_bytes
    assert budget is not None
    assert budget <= 1.05 * preview.needs.smallest


def test_settings_given_to_a_state_hold_for_every_checkpoint() -> None:
    state = State(Settings("org/one", device="cpu", link="pcie3x16", strategy="adapmoe"))
    try:
        assert state.kept.of("org/two") == Settings("org/two", device="cpu", link="pcie3x16", strategy="adapmoe")
    finally:
        state.close()


def test_a_state_keeps_the_folders_that_it_has_loaded(tmp_path: Path, state: State) -> None:
    keeping = State(state.settings, SettingsStore(tmp_path / "settings.json", {"device": "cpu"}))
    try:
        loaded(keeping)
        assert keeping.kept.folders == [state.settings.checkpoint]
    finally:
        keeping.close()


LAYERS = (MoeLayer(0, 4, 64, 64, 3, 2), MoeLayer(1, 4, 64, 64, 3, 2))
NEEDS = Needs(LAYERS, 2, 1000, 1000, 1000)
COSTS = Costs((LayerCosts(1e-4, 1e-5, 1e-5, 1e-5, 1e-7, 1e-10, 1e-6),) * 2, 1e-4, 10**8, 1e-5, 1 << 20, "measured")


def test_forecasts_are_made_once_for_each_age_and_the_old_one_holds_meanwhile() -> None:
    made, may_go_on, calls = threading.Semaphore(0), threading.Semaphore(0), []
    forecasts = Forecasts(made.release)

    def trace() -> None:
        may_go_on.acquire()
        calls.append(1)

    def get(age: int, largest: int = 10**9) -> Forecast | None:
        return forecasts.get("key", age, Settings("x"), NEEDS, COSTS, trace, largest)

    assert get(1) is None and get(1) is None
    may_go_on.release()
    assert made.acquire(timeout=60)
    first = get(1)
    assert first is not None and len(calls) == 1
    assert get(2, largest=NEEDS.smallest + 10_000) is first
    may_go_on.release()
    assert made.acquire(timeout=60)
    second = get(2)
    assert second is not None and second is not first
    assert second.budgets[-1] == NEEDS.smallest + 10_000
    assert first.budgets[-1] == NEEDS.everything
    forecasts.close()


def test_who_plans_elsewhere_needs_no_torch() -> None:
    """With it the child would begin seconds later; in tests it is imported already, so another process says."""
    code = "import sys, app.forecasts, app.explore, app.elsewhere; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_preview_of_nothing_knows_no_speed() -> None:
    settings = Settings("org/absent", device="cpu", link="disk")
    preview: Preview = previews.Previews(lambda: None).of(settings, None, 0)
    assert (preview.spec, preview.forecast, preview.may_be_tried) == (None, None, False)
