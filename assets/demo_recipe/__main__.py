"""`python -m assets.demo_recipe` makes `assets/demo-moe` anew: tokenizer, training, evaluation, model card.

`--only evaluate` scores the checkpoint that is there, `--only card` does so and writes its model card. Training goes on
from its last state when it was interrupted; about two hours on two cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moepic_core.trace_file import load_trace

from . import routing
from .corpus import HERE, Corpus, Turn
from .evaluate import answers, loops, never_used, scores
from .tokenizer import train_tokenizer
from .train import Recipe, parameters, train

ASSETS = HERE.parent
CHECKPOINT = ASSETS / "demo-moe"
TRACE = ASSETS / "traces" / "demo-moe.npz"
SUGGESTED = ["What is a split ratio?", "Why is my hit rate low?", "What is 47 + 38?",
             "Tell me a short story about a fox", "How do I reverse a list in Python?",
             "How do you say thank you in Spanish?"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m assets.demo_recipe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", choices=("train", "evaluate", "card"))
    parser.add_argument(
        "--work", type=Path, default=Path("build") / "demo-moe", help="folder for the state of training"
    )
    options = parser.parse_args()
    if options.only in (None, "train"):
        make(options.work)
    if options.only != "train":
        figures = evaluate()
        if options.only != "evaluate":
            from .card import write_card

            write_card(figures, CHECKPOINT, TRACE)
        wrong = figures.pop("wrong")
        print("\n".join(wrong), file=sys.stderr)
        print(json.dumps(figures))
    return 0


def make(work: Path) -> None:
    """Trains and writes the checkpoint in the hub's format, in bfloat16."""
    recipe = Recipe()
    tokenizer_folder = work / "tokenizer"
    if not tokenizer_folder.is_dir():
        train_tokenizer(Corpus(), recipe.seed).save_pretrained(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = train(recipe, tokenizer, work).to(torch.bfloat16)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    model.generation_config = GenerationConfig(
        **ids, eos_token_id=tokenizer.eos_token_id, temperature=0.7, do_sample=True
    )
    model.save_pretrained(CHECKPOINT)
    tokenizer.save_pretrained(CHECKPOINT)
    extras = {"suggested_prompts": SUGGESTED, "routing": f"../traces/{TRACE.name}"}
    (CHECKPOINT / "moepic.json").write_text(json.dumps(extras, indent=2) + "\n")


def evaluate() -> dict[str, Any]:
    """All scores of the model card, for the checkpoint as anybody loads it."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    corpus = Corpus()
    held_out = scores(model, tokenizer, corpus)
    keys = {fact["id"]: fact["keys"] for fact in corpus.facts}
    unseen = [
        Turn(
            entry["domain"], entry["ask"], "", tuple(entry.get("keys") or keys[entry["fact"]]), entry.get("any", False)
        )
        for entry in tomllib.loads((HERE / "unseen.toml").read_text(encoding="utf-8"))["question"]
    ]
    made = answers(model, tokenizer, unseen)
    right = [turn.right(answer) for turn, (answer, _) in zip(unseen, made, strict=True)]
    looping = loops(model, tokenizer, corpus)
    return {
        "parameters": parameters(model),
        "facts": len(corpus.facts),
        "held-out phrasings": {name: round(share, 4) for name, share in held_out["right"].items()},
        "unseen questions": {"asked": len(unseen), "right": sum(right)},
        "degenerate of 200 sampled": len(looping),
        "experts never used": never_used(model, tokenizer, corpus),
        "routing": routing.figures(load_trace(TRACE)) if TRACE.is_file() else None,
        "wrong": held_out["wrong"] + looping + [
            f"unseen: {turn.question} -> {answer}"
            for turn, (answer, _), good in zip(unseen, made, right, strict=True) if not good
        ],
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
