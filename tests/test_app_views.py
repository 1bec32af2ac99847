"""From looks to words and numbers. No browser."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app import demo_checkpoint, terms, views
from app.nouns import Loaded, Look, Notice, Progress
from moepic_core.budgets import Needs
from moepic_core.links import parse_link
from moepic_core.metrics import NUM_COUNTS, Counters, Reply, Scope, Snapshot
from moepic_core.spec import MachineProfile, ModelSpec, MoeLayer, Settings

GB = 10**9
LAYERS = tuple(MoeLayer(number, 64, 768, 2048, 3, 2) for number in range(24))
SPEC = ModelSpec(
    path="/models/big", name="org/big", model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", dtype="bfloat16",
    num_layers=24, moe_layers=LAYERS, top_k=8, hidden=2048, vocab_size=32000, context_length=32768,
    resident_bytes=2 * GB, kv_bytes_per_token=100_000, num_parameters=8_200_000_000, active_parameters=1_900_000_000,
    file_bytes=16_400_000_000, shards=("model.safetensors",), fingerprint="0" * 64,
)  # fmt: skip
NEEDS = Needs(LAYERS, 8, resident=2 * GB, kv=400_000_000, workspace=200_000_000)
CPU = MachineProfile("cpu", "CPU", 32 * GB, 24 * GB, 32 * GB, 24 * GB, 8)


def look(phase: str = "idle", reply: Reply | None = None, counts: tuple[int, ...] = (0,) * NUM_COUNTS,
         seconds: tuple[float, float] = (0.0, 0.0), link: str = "disk", **fields: Any) -> Look:  # fmt: skip
    def counters(values: tuple[int, ...], times: tuple[float, float]) -> Counters:
        return Counters(np.array([values]), np.array([times]), np.zeros((1, 1), np.int64))

    nothing = counters((0,) * NUM_COUNTS, (0.0, 0.0))
    scope = Scope(nothing, counters(counts, seconds))
    snapshot = Snapshot(1, phase, reply, scope, scope, None, {}, None)
    settings = Settings.create(checkpoint="org/big", link=link)
    loaded = Loaded(settings, SPEC, CPU, parse_link(link, "cpu"), NEEDS, True, ())
    return Look(**{"loads": 1, "progress": None, "notice": None, "loaded": loaded, "snapshot": snapshot, **fields})


NOTHING = Look(0, None, None, None, None)


def test_figures_are_unknown_before_the_first_reply() -> None:
    for empty in (NOTHING, look()):
        assert set(views.live(empty)["figures"].values()) == {views.UNKNOWN}


def test_figures_of_a_reply() -> None:
    reply = Reply(1, prompt_tokens=40, cached_prompt_tokens=8, read_prompt_tokens=32, new_tokens=41, ttft_s=0.318,
                  decode_s=2.0)  # fmt: skip
    figures = views.live(look("decode", reply, (5, 20, 75, 0, 0, 0, 0), (0.25, 1.0)))["figures"]
    assert figures == {
        "speed": "20.0 tokens/s", "first": "0.32 s", "hits": "75 %", "partial": "20 %", "misses": "5 %",
        "overlap": "75 %", "stall": "0.25 s",
    }  # fmt: skip


def test_every_figure_is_a_metric_with_a_definition() -> None:
    assert all(terms.define(figure.metric) for figure in views.FIGURES)
    assert len({figure.key for figure in views.FIGURES}) == len(views.FIGURES)


@pytest.mark.parametrize(
    ("now", "words", "busy"),
    [
        (NOTHING, "no model", False),
        (replace(NOTHING, progress=Progress("downloading", "org/big")), "downloading …", False),
        (replace(NOTHING, progress=Progress("loading", "org/big", 1, 3)), "loading 33 %", False),
        (look("idle"), "ready", False),
        (look("prefill", Reply(1, 40, 0, 10)), "reading the prompt 25 %", True),
        (look("prefill", Reply(1, 40, 40)), "reading the prompt", True),
        (look("decode", Reply(1, 40, 0, 40, 2, 0.1, 0.1)), "answering", True),
    ],
)
def test_status(now: Look, words: str, busy: bool) -> None:
    live = views.live(now)
    assert (live["status"], live["busy"]) == (words, busy)


def test_progress_counts_bytes() -> None:
    now = replace(NOTHING, progress=Progress("loading", "/models/big/", 790_000_000, 1_580_000_000))
    assert views.progress(now) == {"text": "loading big: 790 MB of 1.58 GB", "share": 0.5}
    assert views.progress(NOTHING) == {"text": "", "share": None}


def test_emulated_links_and_random_weights_are_named_beside_the_figures() -> None:
    assert views.live(look())["link"] is None
    assert views.live(look(link="pcie4x16"))["link"] == "emulated link pcie4x16 (25 GB/s)"
    assert views.live(look())["warning"] is None
    demo = look()
    assert demo.loaded is not None
    settings = demo.loaded.settings.replace(checkpoint=demo_checkpoint.NAME)
    assert (
        views.live(replace(demo, loaded=replace(demo.loaded, settings=settings)))["warning"] == demo_checkpoint.WARNING
    )


def test_what_goes_live_is_json() -> None:
    live = json.loads(json.dumps(views.live(look(notice=Notice(3, "error", "it <b>failed</b>")))))
    assert live["notice"] == {"number": 3, "kind": "error", "text": "it <b>failed</b>"}


def test_panels_ask_again_when_what_they_show_may_be_out_of_date() -> None:
    before = look()
    assert views.shown(before) == views.shown(look("decode"))
    assert views.live(before)["shown"] == views.shown(before)
    assert before.snapshot is not None
    counters = replace(before.snapshot.session.decode, activations=np.full((1, 1), 1000))
    session = Scope(before.snapshot.session.prefill, counters)
    later = [
        replace(before, loads=2),
        replace(before, changes=1),
        replace(before, snapshot=replace(before.snapshot, session=session)),
        NOTHING,
    ]
    assert len({views.shown(each) for each in [before, *later]}) == 5
