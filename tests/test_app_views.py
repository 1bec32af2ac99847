"""From looks and previews to words and numbers. No browser."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import demo_checkpoint, terms, views
from app.nouns import Loaded, Look, Notice, Preview, Progress
from app.panels.budget import wanted_bytes, wanted_vram
from moepic_core.links import parse_link
from moepic_core.metrics import NUM_COUNTS, Counters, Reply, Scope, Snapshot
from moepic_core.planner import Needs, budget_bytes
from moepic_core.spec import MachineProfile, ModelSpec, MoeLayer, Settings
from moepic_core.verdict import judge

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
GPU = MachineProfile("cuda", "Card 12", 12 * GB, 11 * GB, 64 * GB, 50 * GB, 8)


def preview(machine: MachineProfile = CPU, vram: str = "auto", link: str = "auto", **fields: Any) -> Preview:
    settings = Settings.create(checkpoint="org/big", vram=vram, link=link)
    made = Preview(settings, machine, parse_link(link, machine.device), SPEC, NEEDS)
    verdict = judge(SPEC, NEEDS, machine, link)
    if verdict.step != "will not run":
        fields = {"budget_bytes": budget_bytes(vram, NEEDS, made.free_bytes), **fields}
    return replace(made, verdict=verdict, **fields)


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


@pytest.mark.parametrize(
    ("machine", "step", "words"),
    [
        (CPU, "fits whole", "fits whole: "),
        (GPU, "fits with offloading", "any budget from "),
        (replace(GPU, device_free_bytes=GB), "will not run", "even without any cached expert it needs "),
    ],
)
def test_the_model_card_says_whether_it_runs(machine: MachineProfile, step: str, words: str) -> None:
    card = views.model_card(preview(machine))
    assert card["step"] == step
    assert words in card["verdict"]
    assert ("Model", "qwen3_moe, 24 layers of 64 experts, 8 per token") in card["facts"]
    assert ("Size", "8.2 B parameters, 1.9 B per token, 16.4 GB in bfloat16") in card["facts"]


def test_a_checkpoint_that_is_not_here_yet() -> None:
    absent = Preview(Settings.create(checkpoint="org/absent"), CPU, parse_link("auto", "cpu"))
    assert views.model_card(absent)["step"] == "download"
    assert views.budget_range(absent) is None


@given(st.floats(0, 1), st.sampled_from([CPU, GPU]), st.sampled_from(["moepic", "on-demand", "mixtral-offloading"]))
def test_the_memory_bar_adds_up_to_the_budget(part: float, machine: MachineProfile, strategy: str) -> None:
    chosen = preview(machine)
    chosen = replace(chosen, settings=chosen.settings.replace(strategy=strategy))
    budget = NEEDS.smallest + int(part * (NEEDS.everything - NEEDS.smallest))
    card = views.budget_card(chosen, budget, None)
    assert sum(piece["share"] for piece in card["parts"]) == pytest.approx(card["share"])
    assert all(piece["share"] >= 0 for piece in card["parts"])
    assert [piece["kind"] for piece in card["parts"]] == [*views.MEMORY, "left"]
    assert card["share"] == budget / NEEDS.everything
    assert card["reason"].startswith(strategy)


@given(st.integers(0, 12), st.floats(0.001, 1))
def test_every_position_of_the_slider_is_a_budget_that_works(scale: int, free: float) -> None:
    layers = tuple(replace(layer, neurons=2**scale) for layer in LAYERS)
    needs = Needs(layers, 8, 1000, 1000, 1000)
    machine = replace(CPU, device_free_bytes=int((needs.smallest + free * needs.everything) / 0.8))
    settings = Settings.create(checkpoint="org/big")
    fields = Preview(settings, machine, parse_link("disk", "cpu"), SPEC, needs)
    chosen = replace(fields, budget_bytes=budget_bytes("auto", needs, fields.free_bytes))
    numbers = views.budget_range(chosen)
    assert numbers is not None
    assert needs.smallest <= views.to_bytes(numbers.minimum) <= numbers.minimum + numbers.step * GB + needs.smallest
    assert numbers.minimum <= numbers.value <= numbers.maximum
    assert numbers.step <= (numbers.maximum - numbers.minimum) / 9
    for value in (numbers.minimum, numbers.value, numbers.maximum):
        chosen.plan(views.to_bytes(value))


def test_the_end_of_the_slider_means_everything() -> None:
    chosen = preview(CPU)
    numbers = views.budget_range(chosen)
    assert numbers is not None
    assert wanted_vram(chosen, numbers.maximum) == "100%"
    assert wanted_bytes(chosen, numbers.maximum) == NEEDS.everything
    assert wanted_vram(chosen, 6.0) == wanted_bytes(chosen, 6.0) == 6 * GB
    assert wanted_vram(chosen, 0.0) == NEEDS.smallest


@pytest.mark.parametrize(
    ("in_use", "state"), [(None, "used when you load"), (5 * GB, "release to apply"), (6 * GB, "in use")]
)
def test_the_bar_says_whether_it_is_in_force(in_use: int | None, state: str) -> None:
    assert views.budget_card(preview(CPU), 6 * GB, in_use)["state"] == state
