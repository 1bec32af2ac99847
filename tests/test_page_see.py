"""The panels that show the engine at work, in a real browser over the real application, with a recorded GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

from pages import Pages, served  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

from app.sensors import RecordedSource  # noqa: E402
from app.state import State  # noqa: E402
from moepic_core.spec import Settings  # noqa: E402

GB = 10**9
CARD = {
    "gpu_name": "Card 12", "vram_used_bytes": 9 * GB, "vram_total_bytes": 12 * GB, "gpu_use": 0.45,
    "pcie_in_bytes_per_s": 8.7e9, "pcie_out_bytes_per_s": 2e8, "pcie_limit_bytes_per_s": 3.15e10, "power_w": 181.0,
    "power_limit_w": 350.0, "ram_used_bytes": 16 * GB, "ram_total_bytes": 32 * GB, "ram_own_bytes": 2 * GB,
    "cpu_use": 0.5,
}  # fmt: skip
PICTURES = ("speed", "layers", "plan", "heat", "token")
# How many colours a canvas shows: a blank one has one, text alone only shades of a grey.
COLOURS = """canvas => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let i = 0; i < data.length; i += 4) {
    const [red, green, blue, opaque] = data.subarray(i, i + 4);
    if (opaque === 255 && Math.max(red, green, blue) - Math.min(red, green, blue) > 40)
      found.add(`${red >> 4},${green >> 4},${blue >> 4}`);
  }
  return found.size;
}"""

COUNT_FRAMES = """{
  const real = window.requestAnimationFrame;
  window.numFrames = 0;
  window.requestAnimationFrame = (act) => real(act, numFrames++);
}"""
# All texts that the tooltip shows while the pointer goes along the middle of a lane of the timeline.
SWEEP = """(canvas, lane) => {
  const box = canvas.getBoundingClientRect(), found = new Set();
  const y = box.top + ((lane + 0.5) * (box.height - 14)) / 3;
  for (let x = box.left + 63; x < box.right; x += 3) {
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y }));
    const tip = document.querySelector("#tip");
    if (tip && !tip.hidden) found.add(tip.innerText);
  }
  return [...found];
}"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setattr("app.watch.CEILING_PERIOD_S", 0.3)
        given = {"link": "emulated:500MB/s", "vram": "50%", "split": 0.4}  # something travels for every token
        yield State(Settings.create(checkpoint="demo-random-moe", device="cpu", **given))


@pytest.fixture(scope="module")
def address(pages: Pages, state: State, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    recording = tmp_path_factory.mktemp("recording") / "card-12.jsonl"
    recording.write_text(json.dumps(CARD) + "\n")
    with served(state, sensors=lambda: RecordedSource(Path(recording))) as address:
        yield address


@pytest.fixture(scope="module")
def page(pages: Pages, address: str) -> Page:
    """One for all tests: opening one takes seconds."""
    context = pages.context()
    context.add_init_script(COUNT_FRAMES)
    page = pages.open(address, context)
    expect(page.locator("[data-p=hardware] [data-t=device]")).to_have_text("Card 12")
    return page


def look_now(page: Page) -> None:
    """Has the page ask the server at once, as after a click."""
    page.evaluate("document.dispatchEvent(new Event('click'))")


def colours(page: Page, name: str) -> int:
    return int(page.locator(f"[data-c={name}]").evaluate(COLOURS))


def value(page: Page, name: str, panel: str) -> Any:
    return page.locator(f"[data-p={panel}] [data-t={name}]")


def test_before_a_model_is_loaded_panels_say_so(page: Page) -> None:
    expect(page.locator("[data-live=status]")).to_have_text("no model")
    expect(page.locator("[data-c=heat]")).to_have_attribute("aria-label", "Experts: no model")
    for panel, name in (("speed", "speed"), ("layers", "hits"), ("heat", "on-device"), ("token", "stall")):
        expect(value(page, name, panel)).to_have_text("–")
    assert [colours(page, name) for name in PICTURES] == [0] * 5


def test_hardware_of_a_recorded_card(page: Page) -> None:
    texts = {
        "gpu": "45 %", "pcie-in": "8.7 GB/s", "pcie-out": "200 MB/s", "power": "181 W", "temperature": "not available",
        "cpu": "50 %", "disk": "not available", "vram": "9 GB",
    }  # fmt: skip
    for name, text in texts.items():
        meter = page.locator(f".meter[data-m={name}]")
        expect(meter.locator("[data-t]")).to_have_text(text)
        assert ("absent" in (meter.get_attribute("class") or "")) is (text == "not available")
    expect(page.locator("[data-t=source]")).to_have_text("recorded: card-12.jsonl")


def test_an_answer_fills_every_panel(page: Page, state: State) -> None:
    state.load(state.settings)
    state.wait()
    look_now(page)
    expect(page.locator("[data-live=status]")).to_have_text("ready")
    expect(value(page, "slots", "layers")).to_have_text(re.compile(r"\d+ to \d+"))
    expect(value(page, "memory", "hardware")).to_have_text("16 GB of 32 GB")
    expect(page.locator(".device .bar")).to_have_attribute(
        "aria-label", re.compile("^RAM, 16 GB of 32 GB used: .*Budget")
    )
    expect(page.locator("[data-c=layers]")).to_have_attribute("aria-label", "Hits per layer, last reply: nothing yet")
    list(state.reply([{"role": "user", "content": "why?"}], 0.0, 1.0, 40, lambda: False))
    look_now(page)
    expect(value(page, "token", "token")).to_have_text(re.compile(r"[\d.]+ ms"))
    for panel, names in {"layers": ("hits", "partial", "misses"), "token": ("overlap", "accuracy")}.items():
        for name in names:
            expect(value(page, name, panel)).to_have_text(re.compile(r"\d+ %"))
    expect(value(page, "ceiling", "layers")).to_have_text(re.compile(r"\d+ %"))
    expect(value(page, "worst", "layers")).to_have_text(re.compile(r"\d, \d, \d"))
    expect(value(page, "speed", "speed")).to_have_text(re.compile(r"[\d.]+"))
    assert all(colours(page, name) >= wanted for name, wanted in zip(PICTURES, (1, 3, 1, 6, 3), strict=True))


def test_what_is_shown_is_what_the_server_says(page: Page, address: str) -> None:
    expect(page.locator("[data-live=status]")).to_have_text("ready")
    told = page.request.get(f"{address}/ui/live").json()["see"]
    for panel, texts in {
        "speed": told["speed"]["texts"], "layers": told["layers"]["last"]["texts"], "heat": told["heat"]["texts"],
        "token": told["token"]["texts"],
    }.items():  # fmt: skip
        for name, text in texts.items():
            for place in value(page, name, panel).all():
                expect(place).to_have_text(text)
    for panel, label in {"layers": told["layers"]["last"], "heat": told["heat"], "token": told["token"]}.items():
        expect(page.locator(f"[data-c={panel}]")).to_have_attribute("aria-label", label["label"])


def test_session_and_order_can_be_chosen(page: Page) -> None:
    heat, before = page.locator("[data-c=heat]"), page.locator("[data-c=heat]").evaluate("canvas => canvas.toDataURL()")
    page.get_by_role("button", name="by number").click()
    expect(page.get_by_role("button", name="by number")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="by use")).to_have_attribute("aria-pressed", "false")
    assert heat.evaluate("canvas => canvas.toDataURL()") != before
    page.get_by_role("button", name="by use").click()
    page.get_by_role("button", name="session").click()
    expect(page.locator("[data-c=layers]")).to_have_attribute("aria-label", re.compile("^Per layer, session: "))
    page.get_by_role("button", name="last reply").click()


def test_pictures_answer_the_pointer(page: Page) -> None:
    tip = page.get_by_role("tooltip")
    page.locator("[data-c=heat]").hover(position={"x": 60, "y": 20})
    expect(tip).to_contain_text(re.compile(r"Layer \d, expert \d+"))
    page.locator("[data-c=layers]").hover(position={"x": 100, "y": 30})
    expect(tip).to_contain_text(re.compile(r"hits, .* partial hits, .* misses"))
    expect(tip).to_contain_text("slots for 32 experts, split ratio 0.4")
    page.locator("[data-c=speed]").hover(
        position={"x": page.locator("[data-c=speed]").bounding_box()["width"] - 2, "y": 20}
    )  # type: ignore[index]
    expect(tip).to_contain_text("tokens/s")
    demands = page.locator("[data-c=token]").evaluate(SWEEP, 1)
    wanted = re.compile(r"Layer \d, expert \d+\s+(top|bottom) segment, demand load: .* ms\s+[\d.]+ kB")
    assert any(wanted.search(text) for text in demands), demands
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_every_figure_explains_itself(page: Page, address: str) -> None:
    tip, terms = page.get_by_role("tooltip"), page.locator(".see .term, .figures .term")
    known = page.request.get(f"{address}/ui/metrics").text()
    assert terms.count() > 30
    for term in terms.all():
        assert f'<tr id="{(term.get_attribute("href") or "").partition("#")[2]}">' in known
        assert len(term.get_attribute("data-tip") or "") > 10
    page.locator(".figures .term", has_text="Overlap").hover()
    expect(tip).to_contain_text("1 − stall / link busy time")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    with page.context.expect_page() as opened:
        page.locator("[data-p=layers] .term", has_text="ceiling").click()
    expect(opened.value.locator("tr:target")).to_contain_text("Belady")
    opened.value.close()


def test_a_server_that_is_gone_leaves_what_was_shown(page: Page) -> None:
    shown = value(page, "token", "token").inner_text()
    page.route("**/ui/live*", lambda route: route.fulfill(status=204))
    look_now(page)
    expect(page.locator("[data-live=status]")).to_have_text("server not reachable")
    expect(page.locator(".see.lost")).to_be_visible()
    expect(value(page, "token", "token")).to_have_text(shown)
    page.unroute("**/ui/live*")
    look_now(page)
    expect(page.locator(".see.lost")).to_have_count(0)


def test_the_engine_s_column_needs_no_scrolling(page: Page) -> None:
    heights: Any = page.evaluate("""() => {
      const panels = [...document.querySelectorAll(".see .panel")];
      return [Math.max(...panels.map(panel => panel.getBoundingClientRect().bottom)), innerHeight];
    }""")
    assert heights[0] <= heights[1]


@pytest.mark.parametrize(("size", "is_dark"), [((1440, 900), True), ((390, 844), True), ((390, 844), False)])
def test_nothing_scrolls_sideways_and_pictures_fit(page: Page, size: tuple[int, int], is_dark: bool) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    drawn(page, "heat")
    before = page.locator("[data-c=heat]").evaluate("canvas => canvas.toDataURL()")
    if page.evaluate("document.body.classList.contains('dark')") != is_dark:
        page.locator("button.theme").click()
        page.locator("[data-c=heat]").scroll_into_view_if_needed()
        page.wait_for_function("(before) => document.querySelector('[data-c=heat]').toDataURL() !== before", arg=before)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    for name in PICTURES:
        drawn(page, name)
        assert colours(page, name) >= 1
        box = page.locator(f"[data-c={name}]").bounding_box()
        assert box is not None
        assert box["width"] > 150
        assert box["height"] > 30


def drawn(page: Page, name: str) -> None:
    """Brings a picture to where it can be seen, and waits until it is drawn at its size there."""
    page.locator(f"[data-c={name}]").scroll_into_view_if_needed()
    page.wait_for_function("""(name) => {
      const canvas = document.querySelector(`[data-c=${name}]`);
      return Math.abs(canvas.width - canvas.clientWidth * devicePixelRatio) <= 1;
    }""", arg=name)  # fmt: skip


def test_an_idle_page_lets_the_browser_rest(page: Page) -> None:
    """As soon as what the tests before have moved has come to rest; something that never rests never lets it."""
    found = []
    while len(found) < 20 and (not found or found[-1] >= 10):  # of 30 that the screen shows meanwhile
        before = page.evaluate("numFrames")
        page.wait_for_timeout(500)
        found.append(page.evaluate("numFrames") - before)
    assert found[-1] < 10, found


def test_what_nobody_sees_is_not_asked_for(page: Page) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    wide = page.locator("#talk").bounding_box()
    page.keyboard.press("Alt+e")
    expect(page.locator("#controls")).to_be_hidden()
    with page.expect_request(lambda request: "/ui/live" in request.url and "panels=false" in request.url) as asked:
        look_now(page)
    response = asked.value.response()
    assert response is not None
    assert not {"see", "hardware"} & response.json().keys()
    page.reload()
    fold = page.get_by_role("button", name="Model and engine")
    expect(fold).to_have_attribute("aria-expanded", "false")
    expect(page.locator("#controls")).to_be_hidden()
    folded = page.locator("#talk").bounding_box()
    assert wide is not None
    assert folded is not None
    assert folded["width"] > wide["width"]
    with page.expect_request(lambda request: "/ui/live" in request.url and "panels=true" in request.url):
        fold.click()
    expect(page.locator("[data-p=hardware] [data-t=device]")).to_have_text("Card 12")
    assert colours(page, "heat") >= 1
