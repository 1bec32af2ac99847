"""Is it helping, pictures, sharing: the dialog in a real browser over the real engine, with all of its buttons."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

from exported import Export  # noqa: E402
from pages import EVIL, Pages, served  # noqa: E402
from playwright.sync_api import Locator, Page, expect  # noqa: E402

from app.state import State  # noqa: E402
from app.store import Store  # noqa: E402
from moepic_core import comparison  # noqa: E402
from moepic_core.spec import Settings  # noqa: E402

PICTURES = {"timeline": 4, "budgets": 12, "sizes": 6}  # view → traces that it has at least
MARKS = ".trace, .bars .point"


@pytest.fixture(scope="module")
def state(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEPIC_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setattr(comparison, "MOST", 4)
        patch.setattr("app.explore.BUDGETS", 5)
        patch.setattr("app.explore.BELADY_SIZES", 3)
        yield State(Settings.create(checkpoint=str(checkpoints("qwen3_moe")), device="cpu", link="emulated:20MB/s",
                                    vram="50% of experts", context_length=512))  # fmt: skip


@pytest.fixture(scope="module")
def store() -> Store:
    """Holds one conversation, whose last question is hostile."""
    store = Store()
    store.add(store.create({}), "user", f"why? {EVIL}", None)
    return store


@pytest.fixture(scope="module")
def page(pages: Pages, state: State, store: Store) -> Iterator[Page]:
    with served(state, store=store) as address:
        yield pages.open(address, pages.context(accept_downloads=True))


def view(page: Page, name: str) -> Locator:
    page.locator(f"#tab-{name}").click()
    return page.locator(f"#view-{name}")


def test_without_a_model_everything_says_what_to_do(page: Page) -> None:
    page.get_by_role("button", name="Is it helping?").click()
    helping = page.locator("#view-helping")
    helping.get_by_role("button", name="Measure").click()
    expect(helping.locator(".work [role=status]")).to_have_text(
        "no model is loaded; choose a checkpoint and press Load"
    )
    expect(view(page, "timeline").locator(".work [role=status]")).to_have_text(re.compile("^no model is loaded"))
    share = view(page, "share")
    share.get_by_role("button", name="Trace (.npz)").click()
    expect(share.locator(".status.wrong")).to_have_text(re.compile("^no model is loaded, so there is nothing to share"))
    assert page.evaluate("window.Plotly === undefined")
    page.keyboard.press("Escape")
    expect(page.locator("dialog.explore")).to_be_hidden()


def test_helping_measures_without_touching_anything(page: Page, state: State, store: Store) -> None:
    state.load(state.settings)
    state.wait()
    list(state.reply([{"role": "user", "content": "why?"}], 0.0, 1.0, 40, lambda: False, ignore_eos=True))
    before = state.look()
    assert before.snapshot is not None
    conversation = store.get(store.entries()[0].id)
    page.get_by_role("button", name="Is it helping?").click()
    helping = page.locator("#view-helping")
    helping.get_by_role("button", name="Measure").click()
    expect(helping.locator("progress")).to_be_visible()
    expect(helping.get_by_role("button", name="Measure again")).to_be_visible()
    rows = helping.locator("tbody tr")
    expect(rows.first).to_contain_text("All switched off (on demand)")
    assert rows.count() in (4, 5)
    expect(helping.locator(".verdict")).to_contain_text(re.compile(r"times (the speed|as fast)"))
    cells = rows.first.locator("td").all_inner_texts()
    assert re.fullmatch(r"[\d.]+", cells[0].strip())
    assert cells[1:4] == ["1.00 ×", "0 %", "0 %"]
    after = state.look()
    assert after.snapshot is not None and after.loaded is not None and before.loaded is not None
    assert after.snapshot.reply == before.snapshot.reply
    assert after.loaded.settings == before.loaded.settings
    assert store.get(store.entries()[0].id) == conversation


def test_helping_asks_what_is_written_and_can_be_stopped(
    page: Page, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MOST", 100_000)
    helping = page.locator("#view-helping")
    helping.get_by_role("button", name="Measure again").click()
    helping.get_by_role("button", name="Stop").click()
    expect(helping.locator(".work [role=status]")).to_have_text("stopped")
    assert not state.comparing
    monkeypatch.setattr(comparison, "MOST", 2)
    page.keyboard.press("Escape")
    page.get_by_label("Message", exact=True).fill(EVIL)
    page.get_by_role("button", name="Is it helping?").click()
    helping.get_by_role("button", name="Measure again").click()
    expect(helping.get_by_role("button", name="Stop")).to_be_visible()
    expect(helping.get_by_role("button", name="Measure again")).to_be_visible()
    expect(helping.locator(".work [role=status]")).to_have_text("")
    expect(helping.locator(".foot")).to_contain_text("<script>")
    assert page.evaluate("window.pwned === undefined")


def test_helping_is_refused_while_an_answer_is_written(page: Page, state: State) -> None:
    answer = state.reply([{"role": "user", "content": "why?"}], 0.0, 1.0, 400, lambda: False, ignore_eos=True)
    next(answer)
    helping = page.locator("#view-helping")
    helping.get_by_role("button", name="Measure again").click()
    expect(helping.locator(".work .wrong")).to_have_text(re.compile("^an answer is being written; stop it or wait"))
    answer.close()  # type: ignore[attr-defined]


def test_a_loss_is_told_and_the_faster_settings_are_one_click_away(
    page: Page, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_helping import LADDER, row

    faster = [row("on demand", 9.0, 10.0, depth=0, **LADDER[0][1]), row("yours", 5.0, 6.0)]
    monkeypatch.setattr(State, "compare", lambda *_: faster)
    helping = page.locator("#view-helping")
    helping.get_by_role("button", name="Measure again").click()
    verdict = helping.locator(".verdict[data-kind=slower]")
    expect(verdict).to_contain_text("slower than with all switched off: 0.58 times the speed")
    verdict.get_by_role("button", name="Use these settings").click()
    expect(helping.locator(".work [role=status]")).to_have_text("Now in use: on demand.")
    expect(verdict).to_be_hidden()
    loaded = state.look().loaded
    assert loaded is not None
    assert loaded.settings.strategy == "on-demand"


def test_pictures_are_drawn_from_this_server_alone(page: Page) -> None:
    assert page.evaluate("window.Plotly === undefined")
    for name, count in PICTURES.items():
        picture = view(page, name).locator(".picture")
        expect(picture.locator(".main-svg").first).to_be_visible()
        drawn = picture.evaluate("place => place.data.length")
        assert drawn >= count
        assert picture.locator(".xtick text").count() > 1
        label = page.locator(f"#view-{name} .foot").inner_text()
        expect(picture).to_have_attribute("aria-label", label)
    expect(page.locator("#view-budgets .foot")).to_contain_text("predicted by the cost model, diamonds simulated")
    expect(page.locator("#view-sizes .foot")).to_contain_text("Exact replay of")


def test_pictures_follow_the_theme_and_fit_a_phone(page: Page) -> None:
    ink = "place => getComputedStyle(place.querySelector('.xtick text')).fill"
    light = page.locator("#view-sizes .picture").evaluate(ink)
    page.evaluate("document.body.classList.toggle('dark')")
    page.wait_for_function(f"light => ({ink})(document.querySelector('#view-sizes .picture')) !== light", arg=light)
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("helping", *PICTURES, "share"):
        view(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.locator("dialog.explore").bounding_box()
        assert box is not None
        assert (box["x"], box["width"]) == (0, 390)
    page.set_viewport_size({"width": 1440, "height": 900})
    page.evaluate("document.body.classList.toggle('dark')")


def test_figures_in_the_dialog_explain_themselves(page: Page) -> None:
    view(page, "helping")
    known = page.request.get(page.url.partition("?")[0] + "ui/metrics").text()
    terms = page.locator("dialog.explore .term")
    assert terms.count() == 8
    for term in terms.all():
        assert f'<tr id="{(term.get_attribute("href") or "").partition("#")[2]}">' in known
    view(page, "budgets").locator(".term").hover()
    tip = page.get_by_role("tooltip")
    expect(tip).to_contain_text("that the cost model expects")
    assert tip.evaluate("tip => tip.closest('dialog') !== null")  # else the dialog would cover it


def test_tabs_work_with_the_keyboard(page: Page) -> None:
    page.locator("#tab-helping").click()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-timeline")).to_be_focused()
    expect(page.locator("#tab-timeline")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#view-timeline")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#view-share")).to_be_visible()


def download(page: Page, label: str) -> Path:
    with page.expect_download() as caught:
        page.locator("#view-share").get_by_role("button", name=label).click()
    return Path(caught.value.path())


def test_files_can_be_taken_away(page: Page, pages: Pages) -> None:
    view(page, "share")
    export = Export(download(page, "Trace (.npz)").read_bytes())
    name = export.about["model"]["name"]
    assert name.startswith("qwen3_moe")
    assert export.figures()["uses"] == export.about["figures"]["session"]["decode"]["uses"] > 0
    assert json.loads(download(page, "Facts (.json)").read_text())["figures"] == export.about["figures"]
    report = download(page, "Report (.html)")
    alone = pages.context(offline=True).new_page()
    asked: list[str] = []
    alone.on("request", lambda request: asked.append(request.url))
    file = report.rename(report.with_suffix(".html"))
    alone.goto(file.as_uri())
    expect(alone.get_by_role("heading", name=f"MoEpic: {name}")).to_be_visible()
    expect(alone.locator(".main-svg").first).to_be_visible()
    assert alone.locator(".plot").count() == 3
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]
    alone.context.close()
    pages.forgive(re.escape(file.as_uri()))


def test_settings_go_out_and_come_back(page: Page, state: State, tmp_path: Path) -> None:
    share = page.locator("#view-share")
    exported = json.loads(download(page, "Settings (.json)").read_text())
    assert (exported["strategy"], exported["checkpoint"]) == ("on-demand", state.settings.checkpoint)

    def give(values: dict[str, object]) -> None:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(values))
        share.locator("input[type=file]").set_input_files(path)

    give({**exported, "strategy": "moepic", "prefetch": "auto"})
    expect(share.locator(".status")).to_have_text("In force now: strategy moepic, prefetch auto.")
    loaded = state.look().loaded
    assert loaded is not None
    assert loaded.settings.strategy == "moepic"
    give({"moepic_settings": 1, "strategie": "moepic"})
    expect(share.locator(".status.wrong")).to_have_text(
        re.compile("unknown setting 'strategie', did you mean 'strategy'")
    )
