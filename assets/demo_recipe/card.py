"""The model card of the demonstration model: what it is, its scores as measured, and the picture of its routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepic_core.trace_file import load_trace

from .corpus import HERE
from .routing import picture
from .train import Recipe


def write_card(figures: dict[str, Any], checkpoint: Path, trace_path: Path) -> None:
    """Writes README.md and routing.png into `checkpoint`. Needs a Chromium for the picture."""
    recipe, count, routing = Recipe(), figures["parameters"], figures["routing"]
    rates = routing["hit rate at one third cached"]
    template = (HERE / "card.md").read_text(encoding="utf-8")
    text = template.format(
        all_m=count["all"] / 1e6,
        experts_share=100 * count["experts"] / count["all"],
        active_m=count["active"] / 1e6,
        facts=figures["facts"],
        steps=recipe.all_steps,
        tokens_m=recipe.all_steps * recipe.batch_tokens / 1e6,
        rows="\n".join(f"| {name} | {100 * share:.1f} % |" for name, share in figures["held-out phrasings"].items()),
        unseen=figures["unseen questions"]["asked"],
        unseen_right=figures["unseen questions"]["right"],
        loops=figures["degenerate of 200 sampled"],
        trace_tokens=routing["tokens"],
        never=routing["never used"],
        dead=figures["experts never used"],
        num_experts=8 * 32,
        chance=100 * routing["chance"],
        rates=", ".join(
            f"{name.upper() if name != 'random' else 'random'} {100 * r:.1f} %" for name, r in rates.items()
        ),
        overlap=100 * routing["overlap of hot sets"],
        accuracy=", ".join(f"{100 * share:.0f} %" for share in routing["guesses right per layer"]),
    )
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    picture(load_trace(trace_path), checkpoint / "routing.png")
