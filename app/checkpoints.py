"""Which checkpoints the page can offer, and where a name that the user picked or typed leads to.

A name is the built-in demo, a folder, or a hub id. Nothing is downloaded here: a hub id that is not on this machine yet
has no folder, and loading it fetches it.
"""

from __future__ import annotations

import json
from pathlib import Path

from moepic_core import finder

from . import demo_checkpoint

NUM_PROMPTS, LONGEST_PROMPT = 6, 300  # suggested ones, and their letters
BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "demo-moe"


def default_name() -> str:
    """What is loaded when the user names nothing: the checkpoint that comes with the application, else a random one."""
    return str(BUNDLED) if (BUNDLED / "config.json").is_file() else demo_checkpoint.NAME


def choices(current: str) -> list[tuple[str, str]]:
    """(label, name) for the picker: ours, what the Hugging Face cache holds, and `current` if it is neither."""
    ours = ("Demo, comes with MoEpic", str(BUNDLED))
    if default_name() == demo_checkpoint.NAME:
        ours = ("Demo, random weights", demo_checkpoint.NAME)
    cached = [
        (entry.name + (" (incomplete)" if entry.incomplete else ""), entry.name)
        for entry in finder.list_cached()
        if entry.spec is not None or entry.incomplete
    ]
    found = [ours, *dict.fromkeys(cached)]
    if current == demo_checkpoint.NAME and ours[1] != current:
        found.append(("Demo, random weights", current))
    return found if current in [name for _, name in found] else [*found, (current, current)]


def folder(name: str) -> Path | None:
    """The folder of checkpoint `name` on this machine, or None for a hub id that would have to be downloaded.

    Raises a MoepicError when `name` is neither a folder nor a hub id.
    """
    if name == demo_checkpoint.NAME:
        return demo_checkpoint.demo_checkpoint()
    if not Path(name).expanduser().is_dir() and _may_be_hub_id(name):
        cached = {entry.name: entry for entry in finder.list_cached()}
        if name not in cached or cached[name].incomplete:
            return None
    return finder.resolve(name)


def _may_be_hub_id(name: str) -> bool:
    return name[:1].isalnum() and name.count("/") <= 1


def suggested_prompts(folder: str) -> tuple[str, ...]:
    """First prompts that a checkpoint names in its `moepic.json`; none when it has no such list of texts."""
    try:
        found = json.loads((Path(folder) / "moepic.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # most checkpoints have none, and one can do without
        return ()
    prompts = found.get("suggested_prompts") if isinstance(found, dict) else None
    texts = [text for text in prompts if isinstance(text, str) and text.strip()] if isinstance(prompts, list) else []
    return tuple(text[:LONGEST_PROMPT] for text in texts[:NUM_PROMPTS])
