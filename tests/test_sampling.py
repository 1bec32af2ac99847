"""What new conversations begin with: our defaults, the makers' advice, what was chosen last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app import sampling
from app.sampling import DEFAULTS, advised
from app.settings_store import SettingsStore
from app.state import State
from moepic_core.spec import Settings


@pytest.mark.parametrize(
    ("said", "differs"),
    [
        (None, {}),
        ("no JSON", {}),
        ([1], {}),
        ({}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 2, "max_new_tokens": 9},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0}),
        ({"temperature": 7, "top_k": "many", "top_p": True, "min_p": None}, {"temperature": 2}),
    ],
)  # fmt: skip
def test_what_a_checkpoint_s_makers_advise(said: Any, differs: dict[str, Any], tmp_path: Path) -> None:
    if said is not None:
        (tmp_path / "generation_config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    assert advised(tmp_path) == {**DEFAULTS, **differs}


def test_what_was_chosen_is_kept_for_each_checkpoint_until_it_is_reset(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"

    def state(checkpoint: str) -> State:
        return State(Settings(checkpoint, device="cpu"), SettingsStore(path, {"device": "cpu"}))

    chosen = {**DEFAULTS, "temperature": 1.5, "top_k": 7}
    sampling.keep(state("org/one"), {**chosen, "system": "Be odd.", "seed": 3})
    assert sampling.chosen(state("org/one")) == chosen
    assert sampling.chosen(state("org/two")) == DEFAULTS
    assert json.loads(path.read_text())["sampling"] == {"org/one": {"temperature": 1.5, "top_k": 7}}
    assert sampling.reset(state("org/one")) == DEFAULTS
    assert sampling.chosen(state("org/one")) == DEFAULTS


def test_a_damaged_file_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"version": 1, "sampling": {"org/one": {"temperature": "hot", "top_k": 10**6, "x": 1}}}))
    state = State(Settings("org/one", device="cpu"), SettingsStore(path, {"device": "cpu"}))
    assert sampling.chosen(state) == {**DEFAULTS, "top_k": 200}
