"""Every number on the page equals the one recomputed from the exported trace alone, over a real engine.

Two answers are asked for as the chat does it. Then what the server tells the page, and what stands under the answers,
is compared with what a stranger finds in the export (`exported.py`), rounding and words included.
"""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from exported import Export, best_possible

from app import share
from app.live import TIME_STEPS, WIRE
from app.panels import answers
from app.sensors import Sample
from app.state import State
from app.store import Store
from app.talk import Talk
from app.terms import CEILING_TOKENS, HISTORY_TOKENS, NUM_WORST, SPEED_TOKENS
from app.watch import Watch
from moepic_core.spec import Settings

TOKENS = (14, 23)  # of the two answers


class Shown(NamedTuple):
    live: dict[str, Any]  # as it arrives in the browser
    notes: list[str]  # under the answers
    export: Export


class NoSensors:
    def read(self) -> Sample:
        return Sample()

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def shown(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr("app.watch.CEILING_PERIOD_S", 0.05)
        folder = checkpoints("qwen3_moe")
        values = {"device": "cpu", "link": "emulated:10MB/s", "vram": "25% of experts", "context_length": 512,
                  "split": 0.5, "prefetch": "on"}  # fmt: skip
        state = State(Settings.create(checkpoint=str(folder), **values))
        watch, talk = Watch(state, NoSensors), Talk(Store(), state)
        watch.start()
        try:
            state.load(state.settings)
            state.wait()
            yield ask(state, watch, talk)
        finally:
            watch.close()
            state.close()


def ask(state: State, watch: Watch, talk: Talk) -> Shown:
    beside = "{}"
    for question, tokens in zip(("what?", "and why is that so?"), TOKENS, strict=True):
        settings = {**answers.DEFAULTS, "max_new_tokens": tokens, "seed": 1, "temperature": 1.0}
        _, _, beside = talk.send(question, beside, settings)
        for _, told in talk.answer(beside, settings, threading.Event()):
            beside = told or beside
    watch.live()  # nothing is computed for panels that nobody looks at
    end_s = time.monotonic() + 20
    while watch._ceiling is None or watch._ceiling.num_tokens != sum(TOKENS) - 2:
        assert time.monotonic() < end_s, watch._ceiling
        time.sleep(0.02)
    notes = [row["note"] for row in json.loads(beside)["rows"] if row["role"] == "assistant"]
    live = json.loads(json.dumps(watch.live()))
    return Shown(live, notes, Export(share.trace_npz(share.recorded(state))))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value >= 0.1 else f"{1000 * value:.1f} ms"


def size(nbytes: int) -> str:
    unit, divisor = next(
        (unit, 10**power) for unit, power in (("GB", 9), ("MB", 6), ("kB", 3), ("B", 0)) if nbytes >= 10**power
    )
    return f"{nbytes / divisor:.3g} {unit}"


def test_something_of_everything_happened(shown: Shown) -> None:
    """Else the comparisons below could not fail."""
    figures = shown.export.figures()
    assert figures["hits"] + figures["partial_hits"] > 0  # how many of each depends on when prefetches arrive
    for name in ("misses", "stall_s", "demand_bytes", "prefetch_bytes"):
        assert figures[name] > 0, name
    assert (shown.export.about["lost_events"], shown.export.about["lost_routing"]) == (0, 0)


def test_notes_under_answers(shown: Shown) -> None:
    for number, (note, tokens) in enumerate(zip(shown.notes, TOKENS, strict=True), start=1):
        figures = shown.export.figures(None, number)
        assert figures["new_tokens"] == tokens
        assert note == (
            f"{figures['tokens_per_s']:.1f} tokens/s · first token {figures['ttft_s']:.2f} s · {tokens} tokens · "
            "longest answer reached"
        )


def test_the_header(shown: Shown) -> None:
    reply, decode = shown.export.figures(None, 2), shown.export.figures(reply=2)
    assert shown.live["figures"] == {
        "speed": f"{reply['tokens_per_s']:.1f} tokens/s",
        "first": f"{reply['ttft_s']:.2f} s",
        "hits": percent(decode["hit_rate"]),
        "partial": percent(decode["partial_hit_rate"]),
        "misses": percent(decode["miss_rate"]),
        "overlap": percent(decode["overlap"]),
        "stall": f"{decode['stall_s']:.2f} s",
    }


def test_speed(shown: Shown) -> None:
    tokens, speed = shown.export.decoded[-HISTORY_TOKENS:], shown.live["see"]["speed"]
    seconds = tokens["end_s"] - tokens["start_s"]
    assert speed["rates"] == (1 / seconds).round(2).tolist()
    assert speed["starts"] == [TOKENS[0] - 1]
    assert speed["texts"] == {"speed": f"{SPEED_TOKENS / seconds[-SPEED_TOKENS:].sum():.1f}"}


@pytest.mark.parametrize(("scope", "reply"), [("last", 2), ("session", None)])
def test_layers(shown: Shown, scope: str, reply: int | None) -> None:
    export, layers = shown.export, shown.live["see"]["layers"]
    told, total = layers[scope], export.figures(reply=reply)
    rows = [export.figures(reply=reply, layer=layer) for layer in range(export.num_layers)]
    for name, figure in (("hits", "hits"), ("partial", "partial_hits"), ("misses", "misses")):
        assert told[name] == [row[figure] for row in rows]
    uses, chosen = export.uses()[-CEILING_TOKENS:], slice(-(TOKENS[1] - 1), None) if reply else slice(None)
    ceiling = [
        best_possible(uses[:, layer].tolist(), plan["slots"])[chosen].mean()
        for layer, plan in enumerate(export.about["plan"]["layers"])
    ]
    assert told["ceiling"] == [round(share, 4) for share in ceiling]
    worst = sorted((-row["miss_rate"], layer) for layer, row in enumerate(rows) if row["misses"])
    assert told["texts"] == {
        "hits": percent(total["hit_rate"]),
        "partial": percent(total["partial_hit_rate"]),
        "misses": percent(total["miss_rate"]),
        "ceiling": percent(float(np.mean(ceiling))),
        "worst": ", ".join(str(layer) for _, layer in worst[:NUM_WORST]) or "none",
        "accuracy": percent(total["prefetch_accuracy"]),
    }


def test_the_plan(shown: Shown) -> None:
    plan, layers = shown.export.about["plan"]["layers"], shown.live["see"]["layers"]
    assert layers["slots"] == [share["slots"] for share in plan]
    assert layers["split"] == [round(share["split_ratio"], 4) for share in plan]
    assert layers["experts"] == [layer["num_experts"] for layer in shown.export.about["model"]["moe_layers"]]
    for name, key, form in (("split", "split_ratio", "{:.2f}"), ("slots", "slots", "{}")):
        ends = [form.format(end([share[key] for share in plan])) for end in (min, max)]
        assert layers["texts"][name] == " to ".join(dict.fromkeys(ends))


def test_experts(shown: Shown) -> None:
    export, heat = shown.export, shown.live["see"]["heat"]
    cells = np.frombuffer(b64decode(heat["cells"]), np.uint8).reshape(heat["rows"], heat["columns"])
    used = export.figures()["activations"]
    np.testing.assert_array_equal(cells >> 6, export.residency)
    np.testing.assert_array_equal(cells & 63, np.ceil(63 * used / used.max(axis=1, keepdims=True)))
    on_device, whole = int((export.residency > 0).sum()), int((export.residency == 2).sum())
    assert heat["texts"] == {
        "on-device": f"{on_device} of {export.residency.size}", "whole": str(whole), "tops": str(on_device - whole)
    }  # fmt: skip


def test_the_last_token(shown: Shown) -> None:
    export, told = shown.export, shown.live["see"]["token"]
    token = export.decoded[-1:]
    start_s, seconds = token["start_s"][0], (token["end_s"] - token["start_s"])[0]
    rows = export.events[export.events["token"] == token["token"]]
    rows = rows[np.isin(rows["kind"], [export.kind[name] for name in ("COMPUTE", "STALL", "DEMAND", "PREFETCH")])]
    moved = rows[np.isin(rows["kind"], [export.kind["DEMAND"], export.kind["PREFETCH"]])]["nbytes"].sum()
    assert told["seconds"] == seconds
    assert told["texts"] == {
        "token": milliseconds(seconds),
        "stall": milliseconds(export.of_tokens("token_stall_s", token)),
        "overlap": percent(export.of_tokens("token_overlap", token)),
        "moved": size(int(moved)),
        "accuracy": percent(export.figures(reply=2)["prefetch_accuracy"]),
    }
    drawn = np.frombuffer(b64decode(told["events"]), WIRE)
    np.testing.assert_array_equal(drawn["what"], 4 * rows["kind"] + rows["part"])
    np.testing.assert_array_equal(drawn["layer"], rows["layer"])
    np.testing.assert_array_equal(drawn["expert"], rows["expert"])
    assert [told["sizes"][place] for place in drawn["size"]] == [
        size(int(nbytes)) if nbytes else "0 B" for nbytes in rows["nbytes"]
    ]
    for name in ("start", "end"):
        share_of_token = ((rows[f"{name}_s"] - start_s) / seconds).clip(0, 1)
        np.testing.assert_array_equal(drawn[name], np.round(TIME_STEPS * share_of_token))


def test_labels_for_screen_readers_say_the_same(shown: Shown) -> None:
    see = shown.live["see"]
    for told in (see["layers"]["last"], see["layers"]["session"], see["heat"], see["speed"]):
        for name, text in told["texts"].items():
            assert text in told["label"] or name == "accuracy", (name, told["label"])
