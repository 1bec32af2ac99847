"""What the live panels cost, in the browser and on the server, at 64 layers x 256 experts and on a real model.

`python -m benchmarks.page [--seconds 8] [--rounds 3] [--tokens 64] [--checkpoint NAME]`. Needs requirements-test.txt
and a Chromium. The first part serves the real page over a made-up session: 10 tokens/s of 64 x 256 with every event
that an engine would tell, and a chat that streams 22 times a second beside it. The second part lets a real engine
decode with the panels shown, with them hidden, and with no page at all, in turn, and tells who uses the CPU meanwhile.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import shutil
import socket
import statistics
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app import checkpoints
from app.main import Server, build_app
from app.nouns import Answer, Loaded, Look, Preview
from app.state import State
from benchmarks.common import interleave, report
from moepic_core.budgets import Needs
from moepic_core.links import parse_link
from moepic_core.spec import MachineProfile, ModelSpec, MoeLayer, Settings
from moepic_core.telemetry import EventKind, Outcome, Part, Telemetry
from moepic_core.uniform import uniform_plan
from moepic_core.verdict import judge

NUM_LAYERS, NUM_EXPERTS, TOP_K = 64, 256, 8
REST_S = 3.0  # after a page was opened
TOKENS_PER_S, UPDATES_PER_S, NUM_REQUESTS = 10, 22, 100
GB = 10**9
LAYERS = tuple(MoeLayer(number, NUM_EXPERTS, 768, 2048, 3, 1) for number in range(NUM_LAYERS))
SPEC = ModelSpec(
    path="/made-up", name="made up, 64 x 256", model_type="made_up", architecture="MadeUp", dtype="bfloat16",
    num_layers=NUM_LAYERS, moe_layers=LAYERS, top_k=TOP_K, hidden=2048, vocab_size=32000, context_length=32768,
    resident_bytes=2 * GB, kv_bytes_per_token=100_000, num_parameters=77 * GB, active_parameters=3 * GB,
    file_bytes=79 * GB, shards=(), fingerprint="0",
)  # fmt: skip
MACHINE = MachineProfile("cpu", "CPU", 64 * GB, 48 * GB, 256 * GB, 200 * GB, 8)
NEEDS = Needs(LAYERS, TOP_K, 2 * GB, GB, GB)
# Long tasks and frames in the browser, and when the answer's text changed.
PROBE = """
  window.probe = { frames: 0, changes: [], stalls: 0 };
  const frame = () => { probe.frames++; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
  new PerformanceObserver((list) => { probe.stalls += list.getEntries().length; }).observe({ type: "longtask" });
  new MutationObserver(() => probe.changes.push(performance.now()))
    .observe(document.querySelector("#conversation"), { subtree: true, childList: true, characterData: true });
"""
# From now on the page asks for nothing any more.
SILENCE = (
    "window.fetch = (real => (url, ...rest) => /ui.live/.test(url) ? new Promise(() => {}) : real(url, ...rest))(fetch)"
)


class MadeUp(State):
    """Serves a model that does not exist, with telemetry as an engine would write it."""

    def __init__(self) -> None:
        super().__init__(Settings.create(checkpoint="made-up", device="cpu", link="emulated:16GB/s", vram=20 * GB))
        self._link = parse_link(self.settings.link, "cpu")
        self._dice = np.random.default_rng(0)
        self._likely = 1 / np.arange(1, NUM_EXPERTS + 1) ** 0.8
        self._likely /= self._likely.sum()
        self._book = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K)
        self._now, self._token, self._decodes = 0.0, 0, False
        plan = uniform_plan(self.settings, NEEDS, 20 * GB)
        self._residency = np.full((NUM_LAYERS, 1), plan.layers[0].slots) > np.arange(NUM_EXPERTS)
        self._book.set_plan(plan, {kind: getattr(plan.memory, kind) for kind in ("resident", "kv", "staging", "cache")})
        self._book.begin_reply(self._now, 1, 0)
        self.serve(40)
        self._book.end_reply()

    @property
    def telemetry(self) -> Telemetry:
        return self._book

    def look(self) -> Look:
        loaded = Loaded(self.settings, SPEC, MACHINE, self._link, NEEDS, True, ())
        return Look(1, None, None, loaded, self._book.snapshot(self._residency))

    def preview(self, settings: Settings) -> Preview:
        verdict = judge(SPEC, NEEDS, MACHINE, settings.link)
        return Preview(self.settings, MACHINE, self._link, SPEC, NEEDS, verdict, 20 * GB, True)

    def load(self, settings: Settings, anyway: bool = False) -> None:
        """It is loaded already."""

    def reply(self, *_: Any, stopped: Callable[[], bool], **__: Any) -> Iterator[Answer]:
        """Streams until it is stopped. From the first time on the engine seems to decode without an end."""
        if not self._decodes:
            self._decodes = True
            self._book.begin_reply(self._now, 1, 0)
            threading.Thread(target=self.decode, daemon=True).start()
        text, update = "", 0
        while not stopped():
            text, update = f"{text}word {update} ", update + 1
            yield Answer(text=text)
            time.sleep(1 / UPDATES_PER_S)
        yield Answer(text=text, reason="stopped")

    def decode(self) -> None:
        while True:
            self.serve(1)
            time.sleep(1 / TOKENS_PER_S)

    def serve(self, num_tokens: int) -> None:
        book = self._book
        for _ in range(num_tokens):
            for layer in range(NUM_LAYERS):
                experts = self._dice.choice(NUM_EXPERTS, TOP_K, False, self._likely).tolist()
                outcomes = [Outcome.HIT if expert < 40 else Outcome.PARTIAL for expert in experts]
                book.layer_step(layer, self._token, experts, outcomes, [1] * TOP_K)
                for expert in experts:
                    at = self._now + self._dice.random() * 1e-3
                    book.event(EventKind.COMPUTE, layer, expert, Part.TOP, at, at + 5e-5, 0, self._token)
                    if expert >= 40:
                        book.event(EventKind.PREFETCH, layer, expert, Part.BOTTOM, at, at + 3e-4, 3 << 20, self._token)
                        book.event(EventKind.COMPUTE, layer, expert, Part.BOTTOM, at, at + 8e-5, 0, self._token)
                self._now += 1.5e-3
            book.event(EventKind.STALL, 0, -1, Part.WHOLE, self._now - 3e-3, self._now, 0, self._token)
            book.new_token(self._token, self._now)
            self._token += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each look at the browser")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of each decode of the second part; 0 leaves it out")
    parser.add_argument("--checkpoint", default=checkpoints.default_name())
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with sync_playwright() as playwright:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        assert chromium is not None, "no Chromium"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with child(serve_made_up) as (address, process, _):
            results |= server_cost(address, process)
            results |= browser_cost(browser, address, options.seconds)
        if options.tokens:
            results |= decode_cost(browser, options.checkpoint, options.tokens, options.rounds)
        browser.close()
    for name, value in results.items():
        print(f"{name:28} {value}")
    report("page", {"shape": [NUM_LAYERS, NUM_EXPERTS], "seconds": options.seconds, **results})


# ---- servers, each in a process of its own ----


@contextmanager
def child(serve: Callable[..., None], *arguments: str) -> Iterator[tuple[str, psutil.Process, Connection]]:
    """Address and process of a server, and a pipe to it."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, *arguments))
    process.start()
    assert process.pid is not None
    try:
        yield here.recv(), psutil.Process(process.pid), here
    finally:
        process.terminate()
        process.join()


def serve_made_up(pipe: Connection) -> None:
    server(MadeUp(), pipe.send).run()


def serve_checkpoint(pipe: Connection, checkpoint: str) -> None:
    """A real engine: answers with as many tokens as the pipe says, and tells its speed."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # as launch.py does
    state = State(Settings.create(checkpoint=checkpoint, device="cpu", link="pcie3x16", vram="50% of experts"))
    ready: queue.Queue[str] = queue.Queue()
    threading.Thread(target=server(state, ready.put).run, daemon=True).start()
    address = ready.get()
    state.load(state.settings)
    state.wait()
    assert state.look().loaded is not None, state.look().notice
    pipe.send(address)
    while True:
        for _ in state.reply([{"role": "user", "content": "why?"}], 0.0, 1.0, pipe.recv(), lambda: False):
            pass
        snapshot = state.look().snapshot
        assert snapshot is not None
        assert snapshot.reply is not None
        pipe.send(snapshot.reply.tokens_per_s or 0.0)


def server(state: State, ready: Callable[[str], object]) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Server(build_app(state), state, "127.0.0.1", port, ready)


# ---- the server ----


def server_cost(address: str, process: psutil.Process) -> dict[str, float]:
    """CPU of the server per full refresh, and the size of one."""

    def ask(query: str = "") -> int:
        with urllib.request.urlopen(f"{address}/ui/live{query}") as answer:
            return len(answer.read())

    def cpu_s() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    time.sleep(10)  # until the ceiling is found
    body = json.loads(urllib.request.urlopen(f"{address}/ui/live").read())
    costs = {}
    for name, query in (("server_ms", ""), ("server_unchanged_ms", f"?seen={body['version']}")):
        idle_from, start = cpu_s(), time.monotonic()
        time.sleep(2)
        idle = (cpu_s() - idle_from) / (time.monotonic() - start)
        before, start = cpu_s(), time.monotonic()
        for _ in range(NUM_REQUESTS):
            ask(query)
        costs[name] = round(1000 * (cpu_s() - before - idle * (time.monotonic() - start)) / NUM_REQUESTS, 2)
    return {**costs, "payload_bytes": ask(), "payload_unchanged_bytes": ask(f"?seen={body['version']}")}


# ---- the browser ----


def open_page(browser: Browser, address: str) -> Page:
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto(address)
    expect(page.locator("[data-live=status]")).to_have_text("ready", timeout=120_000)
    return page


def browser_cost(browser: Browser, address: str, seconds: float) -> dict[str, float]:
    """The page's main thread, frames and gaps in the chat, with the panels live and with nobody asking."""
    start = time.monotonic()
    page = open_page(browser, address)
    results: dict[str, float] = {"page_ready_s": round(time.monotonic() - start, 2)}
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})  # other programs do not count
    asked = []
    page.on("response", lambda answer: asked.append(answer.url) if "/ui/live" in answer.url else None)
    box = page.get_by_label("Message", exact=True)
    page.evaluate(PROBE)

    def look(name: str) -> float:
        """Watches the page for a while; answers how long its main thread worked."""
        page.evaluate("Object.assign(probe, { frames: 0, changes: [], stalls: 0 })")
        before, start = busy_s(), time.monotonic()
        page.wait_for_timeout(1000 * seconds)
        busy, passed_s, probe = busy_s() - before, time.monotonic() - start, page.evaluate("probe")
        gaps = np.diff(probe["changes"])
        gaps = gaps[gaps > 4]  # smaller ones are within one update
        results[f"{name}_fps"] = round(probe["frames"] / passed_s, 1)
        results[f"{name}_long_tasks"] = probe["stalls"]
        if len(gaps):
            results[f"{name}_chat_gap_p95_ms"] = round(float(np.percentile(gaps, 95)), 1)
            results[f"{name}_chat_gap_max_ms"] = round(float(gaps.max()), 1)
        return busy

    def busy_s() -> float:
        metrics = {entry["name"]: entry["value"] for entry in devtools.send("Performance.getMetrics")["metrics"]}
        return float(metrics["TaskDuration"])

    def chat() -> None:
        box.fill("Why?")
        page.keyboard.press("Enter")
        expect(page.locator("#conversation .bot.message").last).to_contain_text("word 20", timeout=60_000)

    chat()
    look("panels_and_chat")
    page.locator("button.stop-button").click()
    page.wait_for_timeout(1500)
    num_asked = len(asked)
    busy = look("panels")
    num_refreshes = len(asked) - num_asked
    page.evaluate(SILENCE)
    page.wait_for_timeout(1000)
    results["main_thread_ms"] = round(1000 * (busy - look("nothing")) / max(1, num_refreshes), 1)
    results["refreshes_per_s"] = round(num_refreshes / seconds, 2)
    chat()
    look("chat")
    page.context.close()
    return results


# ---- a real engine ----

SCENES = ("shown", "hidden", "closed")  # panels of an open page, and no page at all


def decode_cost(browser: Browser, checkpoint: str, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Decode speed with the panels shown as a share of that with them hidden, and with no page; who uses the CPU."""
    used: dict[str, dict[str, list[float]]] = {scene: defaultdict(list) for scene in SCENES}  # scene → process → cores
    with child(serve_checkpoint, checkpoint) as (address, process, pipe):
        page = open_page(browser, address)

        def speed(scene: str) -> float:
            stage(page, address, scene)
            before, start = cpu_s(process), time.monotonic()
            pipe.send(num_tokens)
            measured = float(pipe.recv())
            passed_s, after = time.monotonic() - start, cpu_s(process)
            for name in after:
                used[scene][name].append((after[name] - before.get(name, 0.0)) / passed_s)
            return measured

        rounds = interleave({scene: partial(speed, scene) for scene in SCENES}, num_rounds)
        page.context.close()
    return {
        "decode_shown_to_hidden": round(rounds.ratio("shown", "hidden"), 3),
        "decode_shown_to_closed": round(rounds.ratio("shown", "closed"), 3),
        **{f"decode_{scene}_tokens_per_s": round(rounds.median(scene), 2) for scene in SCENES},
        **{f"cores_{scene}": {name: round(statistics.median(cores), 3) for name, cores in used[scene].items()}
           for scene in SCENES},
        "num_disturbed_rounds": rounds.num_disturbed,
    }  # fmt: skip


def stage(page: Page, address: str, scene: str) -> None:
    """Brings the page into `scene` and lets it come to rest."""
    page.goto(address if scene != "closed" else "about:blank")
    if scene != "closed":
        expect(page.locator("[data-live=status]")).to_have_text("ready", timeout=120_000)
        fold = page.locator(".top .fold")
        if (fold.get_attribute("aria-expanded") == "true") != (scene == "shown"):
            fold.click()
    time.sleep(REST_S)


def cpu_s(server: psutil.Process) -> dict[str, float]:
    """CPU time so far of the server and of each kind of Chromium's processes."""
    times: defaultdict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            kinds = [word.removeprefix("--type=") for word in words if word.startswith("--type=")]
            if process == server or "chrom" in words[0]:
                spent = process.cpu_times()
                times["server" if process == server else kinds[0] if kinds else "browser"] += spent.user + spent.system
    return times


if __name__ == "__main__":
    main()
