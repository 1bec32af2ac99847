"""What was chosen on the page outlives the application; a damaged or forbidden file costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import checkpoints
from app.settings_store import KEPT, VERSION, SettingsStore
from moepic_core.errors import BadSettings
from moepic_core.spec import Settings

CPU = {"device": "cpu"}


def test_settings_are_kept_for_each_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "settings.json"
    store = SettingsStore(path, CPU)
    store.keep("org/one", strategy="on-demand", split=0.25)
    store.keep("org/two", vram=5_000_000_000, link="pcie3x16", context_length=512)
    again = SettingsStore(path, CPU)
    assert again.of("org/one") == Settings("org/one", device="cpu", strategy="on-demand", split=0.25)
    assert again.of("org/two").vram == 5_000_000_000
    assert again.of("org/two").link == "pcie3x16"
    assert again.of("org/three") == Settings("org/three", device="cpu")
    again.keep("org/one", strategy="moepic", split=None)
    assert list(json.loads(path.read_text())["checkpoints"]) == ["org/two"]
    assert [file.name for file in path.parent.iterdir()] == ["settings.json"]


def test_the_command_line_wins_until_the_page_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    SettingsStore(path, CPU).keep("org/one", vram="30%", strategy="adapmoe")
    store = SettingsStore(path, {**CPU, "vram": "6GB"})
    assert (store.of("org/one").vram, store.of("org/one").strategy) == ("6GB", "adapmoe")
    store.keep("org/one", eviction="lru")
    assert SettingsStore(path, CPU).of("org/one").vram == "30%"  # what is given once is not kept
    assert store.keep("org/one", vram="40%").vram == store.of("org/one").vram == "40%"


def test_a_demo_starts_with_half_of_its_experts_and_may_have_all(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path / "settings.json", CPU)
    name = str(checkpoints.BUNDLED)
    assert store.of(name).vram == "50% of experts"
    store.keep(name, vram="auto")
    assert SettingsStore(tmp_path / "settings.json", CPU).of(name).vram == "auto"


def test_impossible_choices_are_refused_and_not_kept() -> None:
    store = SettingsStore(None, CPU)
    with pytest.raises(BadSettings, match=r"split ratio 2 is out of range"):
        store.keep("org/one", split=2)
    with pytest.raises(BadSettings, match="unknown setting 'vran'"):
        store.keep("org/one", vran=2)
    assert store.of("org/one") == Settings("org/one", device="cpu")


@pytest.mark.parametrize(
    "row",
    [{"strategy": "pigeon"}, {"split": 7}, {"split": "much"}, {"link": "pigeon"}, {"context_length": "x"}, 3, None],
)
def test_a_row_that_means_nothing_counts_as_never_kept(tmp_path: Path, row: Any) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"version": VERSION, "checkpoints": {"org/one": row}}))
    assert SettingsStore(path, CPU).of("org/one") == Settings("org/one", device="cpu")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": 99, "reserved_bytes": 5}', "[" * 100_000])
def test_a_damaged_file_counts_as_never_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    store = SettingsStore(path, CPU)
    assert (store.of("org/one"), store.reserved_bytes, store.folders) == (Settings("org/one", device="cpu"), 0, [])
    store.keep("org/one", strategy="adapmoe")
    assert SettingsStore(path, CPU).of("org/one").strategy == "adapmoe"


def test_a_file_that_cannot_be_written_costs_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SettingsStore(tmp_path / "file" / "settings.json", CPU)
    assert store.problem is None
    store.keep("org/one", strategy="adapmoe")
    store.reserve(7)
    store.remember("/models")
    assert "settings are not being kept" in str(store.problem)
    assert (store.of("org/one").strategy, store.reserved_bytes, store.folders) == ("adapmoe", 7, ["/models"])


def test_two_applications_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    one, other = SettingsStore(path, CPU), SettingsStore(path, CPU)
    one.keep("org/one", strategy="adapmoe")
    other.keep("org/two", strategy="pregated")
    one.reserve(2_000_000_000)
    for folder in ("/a", "/b", "/a"):
        other.remember(folder)
    last = SettingsStore(path, CPU)
    assert (last.of("org/one").strategy, last.of("org/two").strategy) == ("adapmoe", "pregated")
    assert (last.reserved_bytes, last.folders) == (2_000_000_000, ["/a", "/b"])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.fixed_dictionaries({}, optional={
    "strategy": st.sampled_from(["moepic", "adapmoe"]), "split": st.none() | st.floats(0, 1),
    "vram": st.sampled_from(["auto", "50%"]) | st.integers(1, 2**40),
    "prefetch": st.sampled_from(["auto", "off"]) | st.integers(0, 8),
}))))  # fmt: skip
def test_what_is_kept_is_what_was_chosen_last(steps: list[tuple[str, dict[str, Any]]]) -> None:
    store = SettingsStore(None, CPU)
    expected: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
    for name, changes in steps:
        store.keep(name, **changes)
        expected[name] |= changes
    for name, values in expected.items():
        assert store.of(name) == Settings(name, device="cpu", **values)
        store._chosen.clear()  # as after a new start
        assert store.of(name) == Settings(name, device="cpu", **values)
    assert set(KEPT) >= {field for values in expected.values() for field in values}
