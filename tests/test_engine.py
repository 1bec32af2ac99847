"""The engine over real tiny checkpoints: turns, budgets that move, stops, failures, and nothing left behind."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import make_tokenizer
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepic_core import arena as arena_module
from moepic_core.engine import Engine
from moepic_core.errors import BadCheckpoint, BadSettings, MoepicError, OutOfRoom, TransferFailed
from moepic_core.events import Done, Event, Notice, PromptRead, TokenMade
from moepic_core.hf.text import Sampling
from moepic_core.packing import aligned_bytes
from moepic_core.spec import Settings

PROMPT = [3 + (31 * place) % 300 for place in range(24)]
Load = Callable[..., Engine]


@pytest.fixture
def load(checkpoints: Callable[..., Path], tmp_path: Path) -> Iterator[Load]:
    engines: list[Engine] = []

    def make(family: str = "qwen3_moe", **settings: object) -> Engine:
        fixed = {
            "device": "cpu",
            "context_length": 96,
            "prefill_chunk": 8,
            "packed_dir": str(tmp_path),
            "link": "pcie4x16",
        }
        engines.append(Engine.load(Settings.create(checkpoint=str(checkpoints(family)), **{**fixed, **settings})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def greedy(engine: Engine, prompt: list[int], new_tokens: int = 12) -> list[int]:
    return list(done_of(engine.generate(prompt, Sampling(max_new_tokens=new_tokens, ignore_eos=True))).token_ids)


def done_of(events: Iterator[Event]) -> Done:
    last = list(events)[-1]
    assert isinstance(last, Done)
    return last


def half(engine: Engine) -> int:
    return (engine.needs.smallest + engine.needs.everything) // 2


def test_events_of_a_reply(load: Load) -> None:
    engine = load(split=0.4)
    events = list(engine.generate(PROMPT, Sampling(max_new_tokens=5, ignore_eos=True)))
    read = [event for event in events if isinstance(event, PromptRead)]
    assert [(event.read, event.total, event.cached) for event in read] == [(8, 24, 0), (16, 24, 0), (24, 24, 0)]
    made = [event for event in events if isinstance(event, TokenMade)]
    assert isinstance(events[-1], Done)
    assert tuple(event.token_id for event in made) == events[-1].token_ids
    assert events[-1].reason == "length"
    reply = engine.snapshot().reply
    assert reply is not None
    assert (reply.prompt_tokens, reply.new_tokens) == (24, 5)
    assert engine.snapshot().phase == "idle"


def test_the_next_turn_costs_only_its_new_tokens(load: Load) -> None:
    engine = load()
    first = greedy(engine, PROMPT, 10)
    conversation = PROMPT + first + [11, 12, 13]
    events = list(engine.generate(conversation, Sampling(max_new_tokens=6, ignore_eos=True)))
    assert [(event.total, event.cached) for event in events if isinstance(event, PromptRead)] == [(4, 33)]
    fresh = load()
    assert list(events[-1].token_ids) == greedy(fresh, conversation, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "jamba"])
def test_an_edited_conversation_is_read_from_the_first_difference(family: str, load: Load) -> None:
    engine = load(family)
    greedy(engine, PROMPT, 20)
    edited = [*PROMPT[:15], 5, 6, 7]
    answer = greedy(engine, edited, 6)
    assert answer == greedy(load(family), edited, 6)


def test_regenerating_the_same_prompt_gives_the_same_answer(load: Load) -> None:
    engine = load()
    assert greedy(engine, PROMPT) == greedy(engine, PROMPT)


def test_a_budget_that_moves_mid_generation_changes_nothing_but_memory(load: Load) -> None:
    engine = load(split=0.5)
    expected = greedy(engine, PROMPT, 40)
    engine.hf.forget()
    made = []
    for event in engine.generate(PROMPT, Sampling(max_new_tokens=40, ignore_eos=True)):
        if isinstance(event, TokenMade):
            made.append(event.token_id)
            budgets = (engine.needs.smallest, half(engine), engine.needs.everything)
            plan = engine.reconfigure(vram=budgets[len(made) % 3], split=(0.5, 0.0, 1.0, 0.3)[len(made) % 4])
            assert engine.residency.arena.used_bytes == plan.memory.used <= plan.memory.budget
            engine.check()
    assert made == expected


def test_a_budget_moved_from_another_thread_while_tokens_flow(load: Load) -> None:
    engine = load(split=0.5)
    expected = greedy(engine, PROMPT, 60)
    engine.hf.forget()
    budgets = [engine.needs.smallest, half(engine), engine.needs.everything]
    moved, stop = [], threading.Event()

    def mover() -> None:
        while not stop.is_set():
            moved.append(engine.reconfigure(vram=budgets[len(moved) % 3]))

    thread = threading.Thread(target=mover)
    thread.start()
    try:
        assert greedy(engine, PROMPT, 60) == expected
    finally:
        stop.set()
        thread.join()
    assert len(moved) > 3
    engine.check()


def test_a_lowered_budget_gives_memory_back_before_it_takes_any(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA torch keeps what is freed until it is told; a fake device records when it is, and what is still held."""
    engine = load(split=0.5)
    arena, cache = engine.residency.arena, engine.residency.caches[0]
    held = [weakref.ref(tensor) for slot in cache.slots for tensor in (slot.buffer, slot.weights)]
    told: list[tuple[int, int]] = []

    def empty_cache() -> None:
        told.append((arena.bytes_by_kind["cache"], sum(tensor() is not None for tensor in held)))

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(arena_module, "_allocate", lambda nbytes, device: aligned_bytes(nbytes))
    monkeypatch.setattr(arena, "device", torch.device("cuda"))
    assert len(held) == 2 * engine.plan.layers[0].slots > 0
    engine.reconfigure(split=0.4)  # every slot has another size: the old memory has to go first
    assert told == [(0, 0)]
    engine.reconfigure(vram=engine.needs.smallest)
    assert told == [(0, 0), (engine.plan.memory.cache, 0)]
    engine.reconfigure(vram=engine.needs.everything)
    assert len(told) == 2  # nothing was freed


def test_two_hundred_reconfigurations_leak_nothing(load: Load) -> None:
    engine = load()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(200):
        strategy = ("moepic", "mixtral-offloading", "pregated", "on-demand")[number % 4]
        engine.reconfigure(
            vram=(engine.needs.smallest, half(engine), engine.needs.everything)[number % 3], strategy=strategy
        )
        if number % 25 == 0:
            greedy(engine, PROMPT, 3)
    engine.check()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    engine.close()
    assert engine.residency.arena.bytes_by_kind["cache"] == engine.residency.arena.bytes_by_kind["staging"] == 0


def test_closing_leaves_no_thread_and_no_file(load: Load) -> None:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for link in ("disk", "emulated:1GB/s"):
        engine = load(link=link)
        greedy(engine, PROMPT, 2)
        engine.close()
        engine.close()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == files
    with pytest.raises(MoepicError, match="unloaded"):
        engine.generate(PROMPT)


@pytest.mark.parametrize("after", [0, 1, 2, 5, 9])
def test_a_stop_at_any_event_leaves_a_usable_engine(after: int, load: Load) -> None:
    engine = load(vram="auto", split=0.3)
    expected = greedy(engine, PROMPT)
    engine.hf.forget()
    events = []
    for event in engine.generate(PROMPT, Sampling(max_new_tokens=12, ignore_eos=True)):
        events.append(event)
        if len(events) == after + 1:
            engine.request_stop()
    assert isinstance(events[-1], Done)
    assert events[-1].reason == "stopped"
    assert list(events[-1].token_ids) == expected[: len(events[-1].token_ids)]
    engine.check()
    assert greedy(engine, PROMPT) == expected


def test_a_stop_takes_effect_within_a_layer_of_a_slow_prefill(load: Load) -> None:
    engine = load(link="emulated:300kB/s", vram="auto", prefill_chunk=96)
    engine.reconfigure(vram=engine.needs.smallest)
    threading.Timer(0.15, engine.request_stop).start()
    done, reply = done_of(engine.generate(PROMPT)), engine.snapshot().reply
    assert (done.reason, done.token_ids) == ("stopped", ())
    assert reply is not None
    assert reply.read_prompt_tokens == 0, "the one pass over the prompt takes longer than a second over this link"
    engine.check()
    engine.reconfigure(vram=engine.needs.everything)


def test_dropping_the_iterator_frees_the_engine(load: Load) -> None:
    engine = load()
    events = engine.generate(PROMPT)
    next(events)
    with pytest.raises(BadSettings, match="already"):
        engine.generate(PROMPT)
    events.close()  # type: ignore[attr-defined]
    greedy(engine, PROMPT, 2)


def test_a_reply_that_nobody_asks_for_a_token_ends_when_it_is_closed(load: Load) -> None:
    engine = load()
    engine.generate(PROMPT).close()  # type: ignore[attr-defined]
    assert engine.snapshot().phase == "idle"
    assert len(greedy(engine, PROMPT, 5)) == 5
    engine.check()


def test_closing_while_generating_ends_the_reply(load: Load) -> None:
    engine = load()
    events = engine.generate(PROMPT, Sampling(max_new_tokens=60, ignore_eos=True))
    for _ in range(6):
        next(events)
    engine.close()
    assert done_of(events).reason == "stopped"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moepic")]


def test_memory_that_runs_out_once_shrinks_the_cache_and_goes_on(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(split=0.5)
    expected = greedy(engine, PROMPT)
    engine.hf.forget()
    forward, failures = engine.hf.model.forward, [5]

    def failing(*args: object, **kwargs: object) -> object:
        failures[0] -= 1
        if failures[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory, says the test")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.hf.model, "forward", failing)
    before = engine.plan.memory.budget
    events = list(engine.generate(PROMPT, Sampling(max_new_tokens=12, ignore_eos=True)))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert len(notices) == 1
    assert "set vram to" in notices[0]
    assert engine.plan.memory.budget < before
    assert list(events[-1].token_ids) == expected  # type: ignore[union-attr]
    engine.check()


def test_memory_that_stays_out_ends_the_reply_with_advice(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load()

    def failing(*_: object, **__: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory, says the test")

    with monkeypatch.context() as patch:
        patch.setattr(engine.hf.model, "forward", failing)
        with pytest.raises(OutOfRoom, match="lower vram or context_length"):
            greedy(engine, PROMPT)
    greedy(engine, PROMPT, 2)
    engine.check()


def test_an_arena_that_the_machine_cannot_fill_settles_for_less(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(vram="auto", split=1.0)
    engine.reconfigure(vram=engine.needs.smallest)
    allocate, limit = torch.empty, (engine.needs.smallest + half(engine)) // 2

    def scarce(*size: object, **options: object) -> torch.Tensor:
        if options.get("dtype") is torch.uint8 and engine.residency.arena.used_bytes > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: says the test")
        return allocate(*size, **options)  # type: ignore[call-overload,no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", scarce)
        plan = engine.reconfigure(vram=engine.needs.everything)
    assert engine.needs.smallest < plan.memory.budget <= limit
    assert any("for now" in notice for notice in engine.notices)
    engine.check()
    greedy(engine, PROMPT, 3)


def test_a_packed_file_cut_short_ends_the_reply_with_one_sentence(load: Load, tmp_path: Path) -> None:
    engine = load(link="disk", vram="auto", split=0.0)
    expected = greedy(engine, PROMPT, 3)
    engine.hf.forget()
    packed = next(tmp_path.glob("*.moepic"))
    whole = packed.read_bytes()
    os.truncate(packed, 8192)
    with pytest.raises(TransferFailed, match=packed.name):
        greedy(engine, PROMPT, 3)
    engine.check()
    packed.write_bytes(whole)  # the same file, whole again
    assert greedy(engine, PROMPT, 3) == expected


def test_a_packed_file_replaced_while_in_use_changes_nothing(load: Load, tmp_path: Path) -> None:
    engine = load(link="disk", split=0.0)
    expected = greedy(engine, PROMPT, 4)
    engine.hf.forget()
    packed = next(tmp_path.glob("*.moepic"))
    other = tmp_path / "other"
    other.write_bytes(bytes(packed.stat().st_size))
    other.replace(packed)
    assert greedy(engine, PROMPT, 4) == expected


def test_a_link_a_hundred_times_slower_is_only_slower(load: Load) -> None:
    expected = greedy(load(link="emulated:200MB/s", split=0.5), PROMPT, 4)
    assert greedy(load(link="emulated:2MB/s", split=0.5), PROMPT, 4) == expected


def test_bad_requests_are_refused_and_lose_nothing(load: Load) -> None:
    engine = load()
    cases: list[tuple[Callable[[], object], type[MoepicError], str]] = [
        (lambda: engine.generate([]), BadSettings, "empty"),
        (lambda: engine.generate([1] * 96), BadSettings, "context of 96"),
        (lambda: engine.generate([1, 5000]), BadSettings, "vocabulary"),
        (lambda: engine.reconfigure(vram="12 parsecs"), BadSettings, "2GB"),
        (lambda: engine.reconfigure(vram=10), OutOfRoom, "smallest is"),
        (lambda: engine.reconfigure(split=1.5), BadSettings, "0 .* to 1"),
        (lambda: engine.reconfigure(stratgy="moepic"), BadSettings, "did you mean 'strategy'"),
        (lambda: engine.reconfigure(dtype="float16"), BadSettings, "load again"),
        (lambda: Sampling(temperature=-1), BadSettings, "temperature"),
    ]
    plan = engine.plan
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()
        assert engine.plan is plan
    greedy(engine, PROMPT, 2)


def test_the_reply_ends_where_the_context_does(load: Load) -> None:
    engine = load(context_length=30)
    assert done_of(engine.generate(PROMPT, Sampling(max_new_tokens=50, ignore_eos=True))).reason == "context"


def test_a_second_start_uses_the_packed_file_again(load: Load, tmp_path: Path) -> None:
    expected = greedy(load(link="disk"), PROMPT)
    packed = next(tmp_path.glob("*.moepic"))
    written = packed.stat().st_mtime_ns
    assert greedy(load(link="disk"), PROMPT) == expected
    assert packed.stat().st_mtime_ns == written


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    import tiny_checkpoints
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoints.make("qwen3_moe", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"lacks 1 tensors, among them model\.layers\.0\.self_attn\.q_proj\.weight"):
        Engine.load(Settings(checkpoint=str(folder), device="cpu", link="pcie4x16"))


def test_a_checkpoint_whose_tensor_has_another_shape_is_refused(tmp_path: Path) -> None:
    import tiny_checkpoints
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoints.make("qwen3_moe", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:-8].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match="q_proj"):
        Engine.load(Settings(checkpoint=str(folder), device="cpu", link="pcie4x16"))


@pytest.mark.parametrize("flag", ["has_post_expert_norm", "is_of_a_later_transformers"])
def test_a_layout_that_cannot_be_split_is_refused_by_the_name_of_its_flag(
    flag: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flagged(self: MixtralExperts, *arguments: object) -> None:
        make(self, *arguments)
        setattr(self, flag, True)

    make = MixtralExperts.__init__
    monkeypatch.setattr(MixtralExperts, "__init__", flagged)
    with pytest.raises(BadCheckpoint, match=rf"^MixtralExperts lays its experts out .* \({flag}\); this family is not"):
        Engine.load(Settings(checkpoint=str(checkpoints("mixtral")), device="cpu", link="pcie4x16"))


@pytest.mark.parametrize("place", ["moepic_core.ram_store.RamStore.add", "torch.nn.Module.to"])
def test_memory_that_runs_out_while_loading_is_one_sentence_and_leaves_nothing(
    place: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(place, full)
    with pytest.raises(OutOfRoom, match=r"^memory ran out while mixtral\d+ was loading; close other programs"):
        Engine.load(Settings(checkpoint=str(checkpoints("mixtral")), device="cpu", link="pcie4x16"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moepic")]


def test_loading_reports_every_byte_and_can_be_stopped(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    from moepic_core.errors import Cancelled

    settings = Settings(checkpoint=str(checkpoints("olmoe")), device="cpu", link="disk", packed_dir=str(tmp_path))
    seen: list[tuple[int, int]] = []
    with pytest.raises(Cancelled):
        Engine.load(settings, lambda read, total: seen.append((read, total)), cancelled=lambda: len(seen) >= 5)
    assert not list(tmp_path.iterdir())
    seen.clear()
    Engine.load(settings, lambda read, total: seen.append((read, total))).close()
    assert seen[-1][0] == seen[-1][1]


def test_chat_text_and_sampling(tmp_path: Path) -> None:
    import tiny_checkpoints

    folder = tiny_checkpoints.make("qwen3_moe", tmp_path / "chat")
    make_tokenizer(folder)
    with Engine.load(Settings(checkpoint=str(folder), device="cpu", link="pcie4x16")) as engine:
        messages = [{"role": "user", "content": "héllo 🙂"}]
        ids = engine.encode(messages)
        assert "héllo 🙂" in engine.text.tokenizer.decode(ids)
        warm = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, top_k=50, seed=7, repetition_penalty=1.1)
        first, second = done_of(engine.generate(messages, warm)), done_of(engine.generate(messages, warm))
        assert first == second
        assert done_of(engine.generate(messages, Sampling(max_new_tokens=12, temperature=0.9, seed=8))) != first
        events = list(engine.generate("The", Sampling(max_new_tokens=9, ignore_eos=True)))
        pieces = "".join(event.text for event in events if isinstance(event, TokenMade))
        assert isinstance(events[-1], Done)
        assert events[-1].text == pieces
        unfinished = [*messages, {"role": "assistant", "content": "I was say"}]
        assert engine.text.tokenizer.decode(engine.encode(unfinished)).endswith("I was say")
