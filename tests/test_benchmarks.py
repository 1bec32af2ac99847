"""The parts of benchmarks that decide what is reported: rounds, floors, paths, caps and raw reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks import memory_cap
from benchmarks.capped_decode import KILLED, run, summarised, times_best_rival
from benchmarks.capped_decode import System as Contestant
from benchmarks.common import checkpoint_name, short, spread, take_turns
from benchmarks.figures import against_floor
from benchmarks.memory_cap import NoCap, capped
from benchmarks.raw_rates import aligned, read_raw
from benchmarks.rival_replies import print_replies, rival_options
from moepic_core.errors import MoepicError
from moepic_core.transfer.thread import CHUNK_BYTES


def test_turns_go_there_and_back_and_are_spread() -> None:
    seen: list[str] = []

    def turn(name: str) -> int:
        seen.append(name)
        return len(seen)

    turns = take_turns({name: partial(turn, name) for name in "ab"}, 3)
    assert "".join(seen) == "abbaab"
    all_rounds = [{"a": 1, "b": 2}, {"a": 4, "b": 3}, {"a": 5, "b": 6}]
    assert [results for results in all_rounds if results in turns.rounds] == turns.rounds
    assert len(turns.rounds) == (3 if turns.all_kept else 3 - turns.num_disturbed)
    assert spread([3.0, 1.0, 2.5]) == {"median": 2.5, "min": 1.0, "max": 3.0}


def test_the_floor_is_the_slower_of_link_and_memory_and_wasted_guesses_only_count_for_the_share() -> None:
    figures = {"tpot_s": 0.5, "bytes_per_token": 300.0, "needed_bytes_per_token": 200.0, "used_bytes_per_token": 900.0}
    assert against_floor(figures, 1000.0, 9000.0) == {
        "link_bytes_per_s": 1000.0, "link_share": pytest.approx(0.6), "floor_s": 0.2, "times_floor": 2.5,
    }  # fmt: skip
    assert against_floor(figures, 1000.0, 3000.0)["floor_s"] == pytest.approx(0.3)


def test_checkpoints_go_by_two_names_and_no_path_from_the_root_is_told(tmp_path: Path) -> None:
    (tmp_path / "a" / "fused").mkdir(parents=True)
    assert checkpoint_name(tmp_path / "a" / "fused") == "a/fused"
    assert checkpoint_name("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
    assert [short(each) for each in ("/x/y/a/fused", "a/fused", "--vram", "50%")] == [
        "a/fused", "a/fused", "--vram", "50%",
    ]  # fmt: skip


def test_the_best_rival_of_a_round_is_the_one_to_beat_and_the_killed_ones_are_counted() -> None:
    def answered(first_s: float, second_s: float) -> dict[str, object]:
        return {"replies": [{"tpot_s": first_s}, {"tpot_s": second_s}], "peak_bytes": 5}

    killed = {"replies": [], "killed": "for its memory", "peak_bytes": 7}
    round_ = {"moepic": answered(1.0, 0.2), "mapped": answered(0.1, 0.5), "llama.cpp": answered(0.1, 0.4)}
    assert times_best_rival(round_) == pytest.approx(2.0)
    assert times_best_rival({**round_, "moepic": killed}) is None
    assert times_best_rival({**round_, "llama.cpp": killed}) == pytest.approx(2.5)
    assert times_best_rival({"moepic": answered(1.0, 0.2), "mapped": killed}) is None
    summary = summarised([answered(1.0, 0.5), killed, answered(0.5, 0.25)])
    assert summary["killed"] == 1
    assert summary["peak_bytes"] == {"median": 5, "min": 5, "max": 7}
    assert summary["tokens_per_s"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert summary["first_reply_tokens_per_s"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert "tokens_per_s" not in summarised([killed])


def test_a_contestant_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(MoepicError, match="mapped ended with 3: no such model"):
        run(Contestant("mapped", ["sh", "-c", "echo no such model >&2; exit 3"], [tmp_path]), None)
    said = run(Contestant("mapped", ["sh", "-c", """echo note; echo '{"replies": []}'"""], [tmp_path]), None)
    assert said == {"replies": []}


def test_a_rival_ends_after_its_tokens_or_its_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids").write_text("[5, 6]")
    given = ["weights", "--prompt-ids-file", str(tmp_path / "ids"), "--max-new-tokens", "4", "--seconds"]
    prompts: list[list[int]] = []

    def reply(prompt: list[int]) -> Iterator[int]:
        prompts.append(prompt)
        return iter(range(100))

    for seconds, wanted in (("1000", 4), ("0", 2)):  # one interval at least
        print_replies(reply, rival_options("").parse_args([*given, seconds]))
        assert capsys.readouterr().out.count(f'"num_tokens": {wanted}') == 2
    assert prompts == [[5, 6]] * 4


def test_a_raw_read_brings_every_chunk(tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    (tmp_path / "data").write_bytes(data)
    whole, ring = aligned(3 * CHUNK_BYTES), aligned(CHUNK_BYTES)
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    try:
        read_raw(fd, len(data), memoryview(whole.numpy()))
        read_raw(fd, len(data), memoryview(ring.numpy()), num_threads=1)
    finally:
        os.close(fd)
    assert whole.numpy().tobytes() == data
    assert ring.numpy().tobytes() == data[-CHUNK_BYTES:]


def test_without_cgroups_for_memory_a_cap_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(NoCap, match=r"no process can be limited in memory here: .* use another machine"),
        capped(1, tmp_path),
    ):
        pass
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    assert memory_cap._kind(tmp_path).limit_file == "memory.max"
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("0")
    assert memory_cap._kind(tmp_path).parent == tmp_path / "memory"


def test_a_cap_lets_in_what_fits_and_kills_what_does_not() -> None:
    hog = ("python3", "-c", "import sys; held = bytearray(int(sys.argv[1])); print(len(held))")
    try:
        with capped(64 << 20) as cap:
            fits = cap.run([*hog, str(16 << 20)], 60.0, os.environ)
            too_much = cap.run([*hog, str(256 << 20)], 60.0, os.environ)
            peak_bytes, folder = cap.peak_bytes, cap.folder
    except NoCap as error:
        pytest.skip(str(error))
    assert (fits.returncode, fits.stdout) == (0, f"{16 << 20}\n")
    assert too_much.returncode == KILLED
    assert 16 << 20 <= peak_bytes <= 64 << 20
    assert not folder.exists()
