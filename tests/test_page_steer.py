"""Choosing and steering in a real browser: picker, download, live settings, budget, verdicts. A hub on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytestmark = pytest.mark.browser

from huggingface_hub import constants  # noqa: E402
from pages import Pages, served  # noqa: E402
from playwright.sync_api import Locator, Page, expect  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_finder import COMMIT, Hub, save, snapshot  # noqa: E402

from app import checkpoints as app_checkpoints  # noqa: E402
from app import previews  # noqa: E402
from app.settings_store import SettingsStore  # noqa: E402
from app.state import State  # noqa: E402
from moepic_core.calibrate import probe  # noqa: E402
from moepic_core.spec import DeviceKind, MachineProfile  # noqa: E402

GB = 10**9
DEMO = "demo-random-moe"
CHUNK_BYTES = 4096


class SlowHub(Hub):
    """Counts what it is asked for, and gives the second shard in pieces, the later ones only while it may."""

    asked: ClassVar[list[str]] = []
    may_finish = threading.Event()

    def do_GET(self) -> None:  # noqa: N802
        name = self.path.rpartition("/")[2]
        type(self).asked.append(name)
        if not name.startswith("model-00002"):
            return super().do_GET()
        body = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for start in range(0, len(body), CHUNK_BYTES):
                self.wfile.write(body[start : start + CHUNK_BYTES])
                self.may_finish.wait(0.5)
        except OSError:
            pass  # the other side has cancelled
        return None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]) -> Iterator[Path]:
    """A home with a hub cache; around it a hub that has `org/model`, a small checkpoint in two files."""
    home = tmp_path_factory.mktemp("home")
    served = tmp_path_factory.mktemp("served")
    source = checkpoints("qwen3_moe")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (served / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    halves = [dict(list(tensors.items())[part::2]) for part in range(2)]
    names = [f"model-{part + 1:05}-of-00002.safetensors" for part in range(2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, served / name)
    where = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (served / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    SlowHub.folder = served
    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), SlowHub) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        patch.setenv("MOEPIC_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
        save(snapshot(home / "hub", "org/part"), num_shards=3, present=1)
        yield home
        server.shutdown()


@pytest.fixture(scope="module")
def state(home: Path) -> State:
    given = {"device": "cpu", "link": "emulated:2GB/s"}
    kept = SettingsStore(home / "settings.json", given)
    return State(kept.of(DEMO), kept)


@pytest.fixture(scope="module")
def page(pages: Pages, state: State) -> Iterator[Page]:
    with served(state) as address:
        state.load(state.settings)
        page = pages.open(address)
        ready(page)
        yield page


@pytest.fixture(autouse=True)
def at_home(page: Page, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("MOEPIC_HOME", str(home))  # conftest gives each test another one


def ready(page: Page) -> None:
    expect(page.locator("[data-live=status]")).to_have_text("ready")
    expect(page.locator(".memory .budget em")).to_have_text("in use")


def choose(page: Page, picker: str, option: str) -> None:
    page.locator(f"{picker} input").blur()  # a list opens when its field gets the focus
    page.locator(f"{picker} input").click()
    page.locator(f'[role=option][aria-label^="{option}"]').click()


def pick(page: Page, name: str) -> None:
    page.locator("#checkpoint input").fill(name)
    page.locator("#checkpoint input").press("Enter")


def decided(page: Page, name: str) -> Locator:
    """What was decided about `name`, in words."""
    return page.locator(".why dt", has_text=re.compile(f"^{name}$")).locator("xpath=following-sibling::dd[1]")


def more(page: Page, is_open: bool = True) -> None:
    if (page.locator("#more").get_attribute("aria-expanded") == "true") is not is_open:
        page.locator("#more").click()
    expect(page.locator("#more")).to_have_attribute("aria-expanded", str(is_open).lower())


def test_the_picker_says_what_each_checkpoint_is(page: Page) -> None:
    page.locator("#checkpoint input").click()
    lines = page.locator("#checkpoint [role=option]")
    expect(lines.nth(0)).to_have_attribute("data-name", "Demo, comes with MoEpic")
    texts = [line.get_attribute("aria-label") for line in lines.all()]
    assert texts == [
        "Demo, comes with MoEpic · 15 M, 4 M active · 8 layers × 32 experts · bfloat16 · fits whole",
        "Demo, random weights · 39.7 M, 6.64 M active · 8 layers × 32 experts · bfloat16 · fits whole",
        "org/part · incomplete",
    ]
    assert [line.get_attribute("data-step") for line in lines.all()] == ["fits whole", "fits whole", "incomplete"]
    page.keyboard.press("Escape")


def test_what_is_incomplete_says_so(page: Page) -> None:
    choose(page, "#checkpoint", "org/part")
    expect(page.locator("#card .verdict")).to_contain_text("incomplete here: ")
    expect(page.locator("#card .verdict")).to_contain_text("2 of 3 weight files are missing")
    expect(page.get_by_role("button", name="Download")).to_be_visible()
    choose(page, "#checkpoint", "Demo, random weights")
    ready(page)


def test_settings_change_while_the_model_answers(page: Page, state: State) -> None:
    page.get_by_label("Message", exact=True).fill("Why?")
    page.keyboard.press("Enter")
    answer = page.locator("#conversation .bot.message").last
    expect(answer).to_have_text(re.compile(r"\w+ \w+"))
    engine = state._engine
    more(page)
    choose(page, "#eviction", "Least recently used")
    expect(decided(page, "Cache")).to_contain_text("evicted by lru")
    choose(page, "#prefetch", "1 guess")
    expect(decided(page, "Prefetch")).to_contain_text("up to 1 expert")
    choose(page, "#prefetch", "Off")
    expect(decided(page, "Prefetch")).to_have_text("off")
    split = page.locator("#split input[type=range]")
    expect(split).to_be_disabled()
    page.get_by_label("By hand").check()
    expect(split).to_be_enabled()
    split.focus()
    page.keyboard.press("End")
    expect(decided(page, "Cache")).to_contain_text("split ratio 1.00")
    expect(split).to_have_value("1")  # after the server's answer, which sets it anew
    split.press("ArrowLeft")
    expect(decided(page, "Cache")).to_contain_text("split ratio 0.95")
    choose(page, "#strategy", "adapmoe")
    expect(decided(page, "Why")).to_contain_text("adapmoe")
    length = len(answer.inner_text())
    page.wait_for_function("([element, length]) => element.innerText.length > length",
                           arg=[answer.element_handle(), length])  # fmt: skip
    assert state._engine is engine
    assert state.look().loads == 1
    page.get_by_role("button", name="Reset to automatic").click()
    expect(decided(page, "Cache")).to_contain_text("evicted by lcp-aged")
    expect(page.get_by_label("By hand")).not_to_be_checked()
    expect(page.locator("#strategy input")).to_have_value("moepic")
    expect(page.locator("#prefetch input")).to_have_value("Automatic")
    loaded = state.look().loaded
    assert loaded is not None
    assert (loaded.settings.vram, loaded.settings.split, loaded.settings.eviction) == ("auto", None, "auto")
    page.get_by_role("button", name="Stop").click()
    ready(page)


def test_the_predicted_speed_follows_the_slider_at_once(page: Page, state: State) -> None:
    number = page.locator("[data-t=predicted]")
    expect(number).to_have_text(re.compile(r"^[\d.]+$"))
    slowest: Any = page.evaluate("""async () => {
      const range = document.querySelector("#slider input[type=range]");
      const texts = [];
      const late = [];
      for (const part of [0, 0.25, 0.5, 0.75, 1, 0.1, 0.9, 0]) {
        const began = performance.now();
        range.value = Number(range.min) + part * (range.max - range.min);
        range.dispatchEvent(new Event("input", { bubbles: true }));
        await new Promise(requestAnimationFrame);
        late.push(performance.now() - began);
        texts.push(document.querySelector("[data-t=predicted]").textContent);
      }
      return [late.sort((one, other) => one - other)[4], new Set(texts).size];
    }""")
    assert slowest[0] < 60
    assert slowest[1] > 1
    expect(page.locator(".memory .budget em")).to_have_text("release to apply")
    slider = page.locator("#slider input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator(".memory .reason")).to_contain_text("no expert is cached")
    ready(page)
    preview = state.preview(state.look().loaded.settings)  # type: ignore[union-attr]
    assert preview.forecast is not None and preview.budget_bytes is not None
    expect(number).to_have_text(f"{1 / preview.forecast.at(preview.budget_bytes, 'total_s'):.1f}")
    expect(page.locator(".curve")).to_have_attribute(
        "aria-label", re.compile("^Predicted time per token over the budget")
    )


def test_a_budget_can_be_typed(page: Page, state: State) -> None:
    box = page.locator("#slider input[type=number]")
    expect(page.locator("#slider")).to_contain_text("RAM budget (MB)")
    box.fill("80")
    box.press("Enter")
    expect(page.locator(".memory .budget b")).to_have_text("80 MB")
    ready(page)
    assert state.look().loaded.settings.vram == 80_000_000  # type: ignore[union-attr]
    assert SettingsStore(Path(state.kept._path or "")).of(DEMO).vram == 80_000_000  # after a restart


def test_room_for_other_programs(page: Page, state: State) -> None:
    more(page)
    reserved = page.locator("#reserved input[type=range]")
    reserved.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#card .facts")).to_contain_text("100 MB of it for other programs")
    assert state.kept.reserved_bytes == 100_000_000
    page.keyboard.press("Home")
    expect(page.locator("#card .facts")).not_to_contain_text("for other programs")


def test_settings_are_kept_for_each_checkpoint(page: Page) -> None:
    choose(page, "#strategy", "pregated")
    expect(decided(page, "Why")).to_contain_text("pregated")
    choose(page, "#checkpoint", "Demo, comes with MoEpic")
    expect(page.locator("#strategy input")).to_have_value("moepic")
    expect(page.locator(".memory .budget em")).to_have_text("used when you load")
    choose(page, "#eviction", "Least often used")
    choose(page, "#checkpoint", "Demo, random weights")
    expect(page.locator("#strategy input")).to_have_value("pregated")
    expect(page.locator("#eviction input")).to_have_value("Automatic")
    choose(page, "#checkpoint", "Demo, comes with MoEpic")
    expect(page.locator("#eviction input")).to_have_value("Least often used")
    choose(page, "#checkpoint", "Demo, random weights")
    choose(page, "#strategy", "moepic")
    ready(page)


def test_another_link_asks_for_a_reload_and_keeps_the_conversation(page: Page) -> None:
    messages = page.locator("#conversation .message").count()
    assert messages >= 2
    choose(page, "#link", "Emulated pcie5x16, 50 GB/s")
    expect(page.locator(".notes")).to_contain_text("link and context change with a reload; the conversation stays")
    expect(page.locator("[data-live=link]")).to_have_text("emulated link 2 GB/s")
    page.get_by_role("button", name="Reload").click()
    expect(page.locator("[data-live=link]")).to_have_text("emulated link pcie5x16 (50 GB/s)")
    ready(page)
    expect(page.locator("#conversation .message")).to_have_count(messages)


def test_what_will_not_run_says_why_and_can_be_loaded_anyway(
    page: Page, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(device: DeviceKind) -> MachineProfile:
        return dataclasses.replace(probe(device), device_free_bytes=5_000_000)

    monkeypatch.setattr(previews, "probe", full)
    monkeypatch.setattr(previews, "without", lambda machine, held: machine)  # what is loaded gives nothing back
    loads = state.look().loads
    choose(page, "#checkpoint", "Demo, comes with MoEpic")
    expect(page.locator("#card .verdict")).to_contain_text("will not run: even without any cached expert it needs")
    expect(page.locator(".memory .budget em")).to_have_text("does not fit")
    expect(page.locator(".memory .legend")).to_contain_text("KV cache")
    page.get_by_role("button", name="Load anyway").click()
    expect(page.locator(".memory .budget em")).to_have_text("in use")
    assert state.look().loads == loads + 1
    assert state.look().loaded.settings.checkpoint == str(app_checkpoints.BUNDLED)  # type: ignore[union-attr]


def test_a_download_can_be_cancelled_and_goes_on_with_what_is_missing(page: Page, state: State) -> None:
    pick(page, "org/model")
    expect(page.locator("#card .verdict")).to_have_text(re.compile("not on this machine yet; Download fetches it"))
    page.get_by_role("button", name="Download").click()
    expect(page.locator(".progress")).to_contain_text(re.compile(r"downloading model: [\d.]+ kB of [\d.]+ kB"))
    blobs = state.kept._path.parent / "hub" / "models--org--model" / "snapshots" / COMMIT  # type: ignore[union-attr]
    first, second = (f"model-0000{part}-of-00002.safetensors" for part in (1, 2))
    rest = {file.name for file in SlowHub.folder.iterdir()} - {second}
    deadline = time.monotonic() + 30
    while not all((blobs / name).exists() for name in rest) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert all((blobs / name).exists() for name in rest), "without its config a part of a checkpoint is none"
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("org/model was not loaded: cancelled")
    expect(page.locator("#card .verdict")).to_contain_text("1 of 2 weight files are missing")
    SlowHub.asked.clear()
    SlowHub.may_finish.set()
    page.get_by_role("button", name="Download").click()
    expect(page.locator("#card .facts")).to_contain_text("3 layers of 8 experts")
    ready(page)
    assert state.look().loaded.settings.checkpoint == "org/model"  # type: ignore[union-attr]
    assert second in SlowHub.asked
    assert first not in SlowHub.asked


def test_without_a_network_one_sentence_says_so(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    pick(page, "org/elsewhere")
    page.get_by_role("button", name="Download").click()
    expect(page.get_by_role("alert")).to_contain_text("'org/elsewhere' could not be downloaded")
    expect(page.get_by_role("alert")).to_contain_text("check network and disk")


def test_a_folder_of_checkpoints_joins_the_list(page: Page, tmp_path: Path) -> None:
    save(tmp_path / "org" / "small")
    pick(page, str(tmp_path))
    expect(page.get_by_role("alert")).to_contain_text("holds 1 checkpoint")
    choose(page, "#checkpoint", "small · ")
    expect(page.locator("#card .facts")).to_contain_text("handmade, 1 layers of 2 experts")


def test_every_control_has_a_name_and_an_explanation(page: Page) -> None:
    more(page)
    for name in ("Link", "Strategy", "Eviction", "Prefetch", "Context (tokens)"):
        expect(page.get_by_label(name, exact=True)).to_be_visible()
    controls = page.locator("#controls :is(input, button):visible").all()
    assert len(controls) > 12
    for control in controls:
        described: Any = control.evaluate(
            "each => each.ariaLabel || each.labels?.[0]?.textContent.trim() || each.textContent.trim()"
        )
        assert described, control.evaluate("each => each.outerHTML")
    page.locator("#eviction [data-testid=block-info]").hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Who leaves the cache for a newcomer")
    assert "cache slot keeps" in (page.locator("#split input[type=range]").get_attribute("aria-description") or "")


def test_more_opens_and_closes_from_the_keyboard(page: Page) -> None:
    more(page, False)
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#steer")).to_be_visible()
    page.get_by_label("By hand").press("Escape")
    expect(page.locator("#steer")).to_be_hidden()
    expect(page.locator("#more")).to_be_focused()


def test_nothing_scrolls_with_everything_open(page: Page) -> None:
    more(page)
    for width, height in ((390, 844), (1440, 900)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for control in page.locator("#steer :is(input, button):visible").all():
            box = control.bounding_box()
            assert box is not None
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
    box = page.locator("#steer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 900
    more(page, False)
