"""What leaves the page: the trace with all that it needs to be understood, the report, settings and back again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from exported import Export
from test_live import LOADED, PLAN, SPEC, look_at, served

from app import share
from app.explore import timeline
from app.explore_routes import import_settings, plotly_js
from app.loader import Present
from app.nouns import Loaded
from app.report import report
from app.sensors import Sample
from app.share import Recorded, read_settings, settings_json
from app.state import State
from moepic_core.errors import BadSettings, MoepicError
from moepic_core.spec import Settings

EVIL = '</script><img src=x onerror=alert(1)>&"'
PRESENT = Settings.create(checkpoint="small", vram="4GB")


def recorded(loaded: Loaded = LOADED) -> Recorded:
    telemetry = served()
    snapshot = look_at(telemetry).snapshot
    assert snapshot is not None
    return Recorded(loaded, snapshot, telemetry.trace())


# ---- trace ----


def test_the_trace_says_what_it_is_and_no_folder_of_ours() -> None:
    known = recorded()
    data = share.trace_npz(known)
    export = Export(data)
    assert export.about == json.loads(share.about_json(known)) | {"made": export.about["made"]}
    assert export.about["model"]["name"] == "small"
    assert export.about["settings"]["checkpoint"] == "small"
    assert b"/models/small" not in data and "/models" not in share.about_json(known)
    assert export.about["plan"]["layers"][1] == {"slots": 3, "top_rows": 32, "split_ratio": 0.6}
    for scope, reply in (("last_reply", 2), ("session", None)):
        for phase in ("prefill", "decode"):
            told = export.about["figures"][scope][phase]
            again = export.figures(phase.upper(), reply)
            assert {"hits", "overlap", "stall_s"} <= set(told)
            assert told == {name: again[name] for name in told}


def test_nothing_is_shared_of_no_model_or_of_a_comparison() -> None:
    state = State(PRESENT)
    with pytest.raises(BadSettings, match="nothing to share"):
        share.recorded(state)
    state.comparing = True
    with pytest.raises(BadSettings, match="being compared"):
        share.recorded(state)


def test_sensors_are_shared_too() -> None:
    sample = Sample(gpu_name="Card <12>", gpu_use=0.45, power_w=181.0, cpu_use=0.5)
    known = recorded()._replace(sample=sample)
    shared = json.loads(share.about_json(known))["hardware"]
    assert Sample(**shared) == sample
    page = report(known, {}, None, "", "now")
    told = {"GPU": "Card &lt;12&gt;", "GPU use": "45 %", "Power": "181 W", "PCIe in": "not available"}
    for name, text in told.items():
        assert f"<td>{name}</td><td>{text}</td>" in page
    assert json.loads(share.about_json(recorded()))["hardware"] is None


# ---- report ----


class Reader(HTMLParser):
    """Scripts apart from the rest, and whatever would ask a server for something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.requests: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.requests += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "onerror")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def table_of(name: str) -> dict[str, Any]:
    row = {
        "name": name,
        "speed": "5.0",
        "ratio": "1.00 ×",
        "hits": "0 %",
        "partial": "0 %",
        "bytes": "1 kB",
        "stall": "1 ms",
    }
    return {"question": name, "rows": [row], "verdict": "It helps.", "tokens": "2 passes"}


def test_the_report_stands_alone_and_escapes_what_is_not_ours() -> None:
    evil = replace(
        LOADED, spec=replace(SPEC, name=EVIL, model_type=EVIL), settings=replace(LOADED.settings, checkpoint=EVIL)
    )
    known = recorded(evil)
    drawn = timeline(known.trace.events)
    assert drawn is not None
    drawn = {**drawn, "note": EVIL, "layout": {**drawn["layout"], "title": EVIL}}
    page = report(known, {"timeline": drawn}, table_of(EVIL), "/* the script of Plotly */", "2026-01-02 03:04")
    reader = read(page)
    assert reader.requests == []
    assert "img" not in reader.tags
    assert reader.tags.count("script") == 2
    assert reader.text.count(EVIL) >= 5
    assert "default-src 'none'" in page
    match = re.search(r"const FIGURES = (\{.*?\});\n", page)
    assert match is not None
    assert json.loads(match[1])["timeline"]["layout"]["title"] == EVIL


def test_figures_of_the_report_follow_from_the_trace() -> None:
    known = recorded()
    export, text = Export(share.trace_npz(known)), read(report(known, {}, None, "", "now")).text
    last, session = export.figures(reply=2), export.figures()
    for label, name in (("Hits", "hit_rate"), ("Overlap", "overlap"), ("Prefetch accuracy", "prefetch_accuracy")):
        assert f"{label}{100 * last[name]:.0f} %{100 * session[name]:.0f} %" in text
    assert f"Stall{last['stall_s']:.2f} s{session['stall_s']:.2f} s" in text
    assert f"Speed{export.figures(None, 2)['tokens_per_s']:.1f} tokens/s–" in text
    assert "emulated link 2 GB/s" in text
    assert "<script>" not in report(known, {}, None, "", "now")


def test_plotly_comes_from_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "plotly.js" in plotly_js().read_text(encoding="utf-8")[:200]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadSettings, match="pip install plotly"):
        plotly_js()


# ---- settings ----


def test_settings_come_back_as_they_went() -> None:
    settings = Settings.create(checkpoint="m", vram=5_000_000, strategy="adapmoe", split=0.25, context_length=128)
    assert read_settings(settings_json(settings).encode(), PRESENT) == settings
    assert read_settings(b'{"moepic_settings": 1}', PRESENT) == PRESENT
    assert read_settings(b'{"moepic_settings": 1, "split": 1}', PRESENT).split == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "at most 65536"),
        (b"[" * 60_000, "not JSON"),
        (b"[]", "holds no settings"),
        (b'{"vram": "2GB"}', "holds no settings"),
        (b'{"moepic_settings": 2}', "holds no settings"),
        (b'{"moepic_settings": 1, "vrma": "2GB"}', "did you mean 'vram'?"),
        (b'{"moepic_settings": 1, "packed_dir": "/etc"}', "unknown setting 'packed_dir'"),
        (b'{"moepic_settings": 1, "split": "half"}', "setting 'split' must be float or int or null, found \"half\""),
        (b'{"moepic_settings": 1, "vram": true}', "setting 'vram' must be str or int, found true"),
        (b'{"moepic_settings": 1, "vram": {"a": 1}}', "setting 'vram' must be"),
        (b'{"moepic_settings": 1, "split": NaN}', "split ratio nan is out of range"),
        (b'{"moepic_settings": 1, "strategy": "moepik"}', "did you mean 'moepic'?"),
        (b'{"moepic_settings": 1, "context_length": -1}', "too small"),
    ],
)
def test_what_is_no_settings_file_is_refused_in_one_sentence(data: bytes, words: str) -> None:
    with pytest.raises(BadSettings, match=re.escape(words)) as caught:
        read_settings(data, PRESENT)
    assert "\n" not in str(caught.value)


class FakeState(State):
    """Records what it is asked to do."""

    def __init__(self, loaded: Loaded | None) -> None:
        super().__init__(PRESENT)
        self._loader.present = Present(loaded=loaded)
        self.asked: list[Any] = []

    def check(self, settings: Settings) -> None:
        if settings.checkpoint == "gone":
            raise MoepicError("there is no checkpoint 'gone'")

    def load(self, settings: Settings) -> None:
        self.asked.append(settings)

    def reconfigure(self, **changes: Any) -> Any:
        self.asked.append(changes)
        return PLAN


def file_of(**values: Any) -> bytes:
    return json.dumps({"moepic_settings": 1, **values}).encode()


def test_imported_settings_are_put_in_force_or_loaded() -> None:
    state = FakeState(replace(LOADED, settings=PRESENT))
    assert import_settings(state, file_of(split=0.5, vram="4GB")) == "In force now: split 0.5."
    assert import_settings(state, file_of(vram="4GB")) == "These settings are in force already."
    said = import_settings(state, file_of(split=0.5, dtype="float16"))
    assert said == "Loading small with these settings."
    assert state.asked == [{"split": 0.5}, PRESENT.replace(split=0.5, dtype="float16")]
    with pytest.raises(MoepicError, match="no checkpoint 'gone'"):
        import_settings(state, file_of(checkpoint="gone"))
    nothing = FakeState(None)
    assert import_settings(nothing, file_of()) == "Loading small with these settings."
    assert nothing.asked == [PRESENT]
