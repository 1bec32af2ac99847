"""How tokens of a new conversation's answers are drawn: as last chosen for the checkpoint, else as its makers advise.

The panel of answers shows it, the chat keeps it whenever a conversation begins; each conversation keeps its own from
then on. The makers' advice is `generation_config.json` beside the weights. What it does not say is as in DEFAULTS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .state import State

DEFAULTS: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 512,
}
LIMITS = {  # least, greatest
    "temperature": (0, 2),
    "top_p": (0.05, 1),
    "top_k": (0, 200),
    "min_p": (0, 0.5),
    "repetition_penalty": (1, 1.5),
    "max_new_tokens": (16, 4096),
}
FILE = "generation_config.json"


def chosen(state: State) -> dict[str, Any]:
    """What a new conversation with the present checkpoint begins with."""
    name, own = _present(state)
    return {**own, **_known(state.kept.sampling(name))}


def keep(state: State, settings: Mapping[str, Any]) -> None:
    """New conversations with the present checkpoint begin with `settings` from now on."""
    name, own = _present(state)
    state.kept.keep_sampling(name, {key: value for key, value in settings.items() if own.get(key, value) != value})


def reset(state: State) -> dict[str, Any]:
    """Back to what the makers of the present checkpoint advise."""
    name, own = _present(state)
    state.kept.keep_sampling(name, {})
    return own


def _present(state: State) -> tuple[str, dict[str, Any]]:
    loaded = state.look().loaded
    if loaded is None:
        return state.settings.checkpoint, dict(DEFAULTS)
    return loaded.settings.checkpoint, advised(Path(loaded.spec.path))


def advised(folder: Path) -> dict[str, Any]:
    """What the checkpoint in `folder` asks for, and DEFAULTS; without sampling the likeliest token is taken."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # most have such a file, and one can do without
        found = None
    found = found if isinstance(found, dict) else {}
    asked = {name: value for name, value in _known(found).items() if name != "max_new_tokens"}
    return {**DEFAULTS, **asked, **({"temperature": 0} if found.get("do_sample") is False else {})}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among `values` that are known here, within what the panel can show."""
    numbers = {name: values[name] for name in DEFAULTS if type(values.get(name)) in (int, float)}
    return {name: min(max(value, LIMITS[name][0]), LIMITS[name][1]) for name, value in numbers.items()}
