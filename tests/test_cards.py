"""What the cards of model and budget say. No browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_app_views import CPU, GB, LAYERS, NEEDS, SPEC

from app import cards, views
from app.nouns import Forecast, Preview
from app.panels.budget import wanted_bytes, wanted_vram
from moepic_core.budgets import Needs, budget_bytes
from moepic_core.costs import Breakdown
from moepic_core.finder import CheckpointEntry
from moepic_core.links import parse_link
from moepic_core.spec import MachineProfile, Settings
from moepic_core.uniform import uniform_plan
from moepic_core.verdict import judge

GPU = MachineProfile("cuda", "Card 12", 12 * GB, 11 * GB, 64 * GB, 50 * GB, 8)


def preview(machine: MachineProfile = CPU, vram: str = "auto", link: str = "auto", **fields: Any) -> Preview:
    settings = Settings.create(checkpoint="org/big", vram=vram, link=link)
    made = Preview(settings, machine, parse_link(link, machine.device), SPEC, NEEDS)
    verdict = judge(SPEC, NEEDS, machine, link)
    if verdict.step != "will not run":
        fields = {"budget_bytes": budget_bytes(vram, NEEDS, made.free_bytes), **fields}
    return replace(made, verdict=verdict, **fields)


@pytest.mark.parametrize(
    ("machine", "step", "words"),
    [
        (CPU, "fits whole", "fits whole: "),
        (GPU, "fits with offloading", "any budget from "),
        (replace(GPU, device_free_bytes=GB), "will not run", "even without any cached expert it needs "),
    ],
)
def test_the_model_card_says_whether_it_runs(machine: MachineProfile, step: str, words: str) -> None:
    card = cards.model_card(preview(machine))
    assert card["step"] == step
    assert words in card["verdict"]
    assert ("Model", "qwen3_moe, 24 layers of 64 experts, 8 per token") in card["facts"]
    assert ("Size", "8.2 B parameters, 1.9 B active, 16.4 GB in bfloat16") in card["facts"]


@pytest.mark.parametrize(
    ("link", "tables", "text"),
    [
        ("pcie4x16", (), "14.5 GB in RAM, "),
        ("pcie4x16", ("a", "b"), "14.5 GB in RAM with 131 MB of token embeddings, "),
        ("disk", (), "14.5 GB in a file on disk, none of it in RAM"),
        ("disk", ("a", "b"), "none of it in RAM; token embeddings (131 MB) are read from the checkpoint"),
    ],
)
def test_the_model_card_says_what_is_not_on_the_device(link: str, tables: tuple[str, ...], text: str) -> None:
    made = preview(link=link)
    assert made.spec is not None
    made = replace(made, spec=replace(made.spec, token_tables=tables))
    assert text in dict(cards.model_card(made)["facts"])["Experts"]


def test_a_checkpoint_that_is_not_here_yet() -> None:
    absent = Preview(Settings.create(checkpoint="org/absent"), CPU, parse_link("auto", "cpu"))
    assert cards.model_card(absent)["step"] == "download"
    assert cards.budget_range(absent) is None


@given(st.floats(0, 1), st.sampled_from([CPU, GPU]), st.sampled_from(["moepic", "on-demand", "mixtral-offloading"]))
def test_the_memory_bar_adds_up_to_the_budget(part: float, machine: MachineProfile, strategy: str) -> None:
    chosen = preview(machine)
    chosen = replace(chosen, settings=chosen.settings.replace(strategy=strategy))
    budget = NEEDS.smallest + int(part * (NEEDS.everything - NEEDS.smallest))
    card = cards.budget_card(chosen, budget, None)
    assert sum(piece["share"] for piece in card["parts"]) == pytest.approx(card["share"])
    assert all(piece["share"] >= 0 for piece in card["parts"])
    assert [piece["kind"] for piece in card["parts"]] == [*views.MEMORY, "left"]
    assert card["share"] == budget / NEEDS.everything
    assert card["reason"].startswith(strategy)
    assert card["forecast"] is None


@given(st.integers(0, 12), st.floats(0.001, 1))
def test_every_position_of_the_slider_is_a_budget_that_works(scale: int, free: float) -> None:
    layers = tuple(replace(layer, neurons=2**scale) for layer in LAYERS)
    needs = Needs(layers, 8, 1000, 1000, 1000)
    machine = replace(CPU, device_free_bytes=int((needs.smallest + free * needs.everything) / 0.8))
    settings = Settings.create(checkpoint="org/big")
    fields = Preview(settings, machine, parse_link("disk", "cpu"), SPEC, needs)
    chosen = replace(fields, budget_bytes=budget_bytes("auto", needs, fields.free_bytes))
    numbers = cards.budget_range(chosen)
    assert numbers is not None
    assert needs.smallest <= numbers.to_bytes(numbers.minimum) <= numbers.to_bytes(numbers.step) + needs.smallest
    assert numbers.minimum <= numbers.value <= numbers.maximum
    assert numbers.step <= (numbers.maximum - numbers.minimum) / 9
    for value in (numbers.minimum, numbers.value, numbers.maximum):
        chosen.plan(numbers.to_bytes(value))


def test_the_end_of_the_slider_means_everything() -> None:
    chosen = preview(CPU, vram="50%")
    numbers = cards.budget_range(chosen)
    assert numbers is not None
    assert wanted_vram(chosen, numbers.maximum) == "100%"
    assert wanted_bytes(chosen, numbers.maximum) == NEEDS.everything
    assert numbers.unit == "GB"
    assert wanted_vram(chosen, 6.0) == wanted_bytes(chosen, 6.0) == 6 * GB
    assert wanted_vram(chosen, 0.0) == NEEDS.smallest


def test_a_slider_that_was_not_moved_changes_nothing() -> None:
    chosen = preview(CPU, vram="50%")
    numbers = cards.budget_range(chosen)
    assert numbers is not None
    assert wanted_vram(chosen, numbers.value) == "50%"
    assert wanted_vram(chosen, numbers.value + numbers.step) != "50%"


@pytest.mark.parametrize(
    ("in_use", "state"), [(None, "used when you load"), (5 * GB, "release to apply"), (6 * GB, "in use")]
)
def test_the_bar_says_whether_it_is_in_force(in_use: int | None, state: str) -> None:
    chosen = preview(CPU, loaded=in_use is not None)
    assert cards.budget_card(chosen, 6 * GB, in_use)["state"] == state


def test_what_will_not_run_is_shown_with_the_smallest_budget() -> None:
    chosen = preview(replace(GPU, device_free_bytes=GB))
    assert cards.budget_range(chosen) is None
    card = cards.budget_card(chosen, NEEDS.smallest, None)
    assert card["state"] == "does not fit"
    assert {part["kind"]: part["share"] for part in card["parts"]}["cache"] == 0
    assert sum(part["share"] for part in card["parts"]) == pytest.approx(card["share"])


@pytest.mark.parametrize(
    ("machine", "link", "tries"),
    [
        (CPU, "disk", False),  # it runs
        (replace(CPU, device_free_bytes=GB), "disk", True),  # memory may be given back until then
        (replace(GPU, device_free_bytes=GB), "auto", True),
        (replace(GPU, device_free_bytes=GB, host_free_bytes=GB), "auto", False),  # nothing could hold the experts
    ],
)
def test_what_may_be_loaded_anyway(machine: MachineProfile, link: str, tries: bool) -> None:
    assert preview(machine, link=link).may_be_tried is tries


def test_reserved_memory_ends_the_slider() -> None:
    chosen = preview(GPU)
    less = replace(chosen, reserved_bytes=2 * GB, budget_bytes=chosen.free_bytes - 2 * GB)
    assert less.free_bytes == int(0.9 * 9 * GB)
    numbers = cards.budget_range(less)
    assert numbers is not None
    assert numbers.maximum == pytest.approx(8.1, abs=0.1)
    assert dict(cards.model_card(less)["facts"])["Device"].endswith("free, 2 GB of it for other programs")


def cost(stall_s: float) -> Breakdown:
    return Breakdown(0.01, 0.02, stall_s, 0.005, 0.1, 0.5, 0.3, 0.2, 5e6, 0.01)


def test_the_forecast_lies_between_the_budgets_that_were_planned() -> None:
    middle = (NEEDS.smallest + NEEDS.everything) // 2
    points = ((NEEDS.smallest, cost(0.1)), (middle, cost(0.05)), (NEEDS.everything, cost(0.0)))
    chosen = preview(CPU, forecast=Forecast(points), loaded=True)
    card = cards.forecast_card(chosen, middle)
    assert card is not None
    assert (card["speed"], card["range"], card["time"]) == ("11.8", "11 to 13", "85.0 ms per token")
    wider = cards.forecast_card(replace(chosen, forecast=Forecast(points, error=0.3)), middle)
    assert wider is not None and wider["range"] == "8 to 15"
    quarter = cards.forecast_card(chosen, (NEEDS.smallest + middle) // 2)
    assert quarter is not None
    assert quarter["seconds"] == pytest.approx(0.11)
    assert quarter["curve"] == card["curve"]
    assert [at for at, _ in card["curve"]] == sorted({at for at, _ in card["curve"]})
    assert [(x, y) for x, y, _ in (card["points"][0], card["points"][-1])] == [(0, 1), (1, 0)]
    assert cards.expectation(chosen, middle) == (
        "expected of a token: 50 % hits, 30 % partial hits, 20 % misses, 5 MB over the link"
    )


def test_what_was_decided_and_why() -> None:
    plan = uniform_plan(Settings("org/big", split=0.25), NEEDS, 6 * GB)
    rows = dict(cards.plan_rows(replace(plan, predicted=cost(0.04)), SPEC))
    assert rows["Cache"].endswith("of 64 experts a layer, evicted by lcp-aged; split ratio 0.25")
    assert rows["Prefetch"] == "up to 8 experts of the next layer, by the next layer's router"
    assert rows["A token"].startswith("75.0 ms expected: attention and routers 10.0 ms, experts 20.0 ms, stall 40.0 ms")
    assert rows["Why"] == plan.reason
    assert (
        dict(cards.plan_rows(uniform_plan(Settings("org/big", prefetch="off"), NEEDS, 6 * GB), SPEC))["Prefetch"]
        == "off"
    )


@pytest.mark.parametrize(
    ("entry", "step", "label"),
    [
        (CheckpointEntry("org/big", Path("/big"), "main", SPEC, None, False), "fits with offloading",
         "org/big · 8.2 B, 1.9 B active · 24 layers × 64 experts · bfloat16 · fits with offloading"),
        (CheckpointEntry("/models/big", Path("/models/big"), None, SPEC, None, False), None,
         "big · 8.2 B, 1.9 B active · 24 layers × 64 experts · bfloat16"),
        (CheckpointEntry("org/part", Path("/p"), "main", None, "3 of 4 files are missing", True), None,
         "org/part · incomplete"),
        (CheckpointEntry("org/gptq", Path("/q"), "main", None, "already quantized", False), None,
         "org/gptq · cannot be used"),
    ],
)  # fmt: skip
def test_a_line_of_the_picker(entry: CheckpointEntry, step: str | None, label: str) -> None:
    assert cards.picker_label(entry, step) == label


def test_a_download_that_was_begun_is_shown_as_such() -> None:
    absent = Preview(Settings("org/absent"), CPU, parse_link("auto", "cpu"), missing="1 of 3 weight files are missing")
    card = cards.model_card(absent)
    assert card["step"] == "download"
    assert (
        card["verdict"] == "incomplete here: 1 of 3 weight files are missing; Download fetches the rest, then loads it"
    )
