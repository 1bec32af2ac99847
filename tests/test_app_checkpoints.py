"""What the page's picker offers: demos, folders, folders of folders, the hub cache, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from test_finder import save, snapshot

from app import checkpoints
from moepic_core.errors import BadCheckpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_everything_that_can_be_picked_has_its_line(tmp_path: Path, cache: Path) -> None:
    collection = tmp_path / "models"
    save(collection / "org" / "one")
    save(collection / "two", num_shards=2, present=1)
    lone = save(tmp_path / "lone")
    save(snapshot(cache, "org/hub"))
    save(snapshot(cache, "org/part"), num_shards=3, present=2)
    found = checkpoints.entries("typed/name", [str(collection), str(lone), str(tmp_path / "gone")])
    assert [(entry.name, entry.spec is not None, entry.incomplete) for entry in found] == [
        (str(checkpoints.BUNDLED), True, False),
        (str(collection / "org" / "one"), True, False),
        (str(collection / "two"), False, True),
        (str(lone), True, False),
        ("org/hub", True, False),
        ("org/part", False, True),
        ("typed/name", False, False),
    ]
    assert [entry.name for entry in checkpoints.entries(str(lone), [])].count(str(lone)) == 1


def test_of_several_revisions_the_complete_one_is_offered(cache: Path) -> None:
    save(snapshot(cache, "org/model", "e" * 40), num_shards=2, present=1)
    save(snapshot(cache, "org/model", "f" * 40))
    line = next(entry for entry in checkpoints.entries("org/model", []) if entry.name == "org/model")
    assert line.spec is not None
    assert checkpoints.folder("org/model") == line.path
    assert checkpoints.missing("org/model") is None


def test_where_a_name_leads(tmp_path: Path, cache: Path) -> None:
    folder = save(tmp_path / "model")
    assert checkpoints.folder(str(folder)) == folder
    assert checkpoints.folder("org/absent") is None
    assert checkpoints.missing("org/absent") is None
    save(snapshot(cache, "org/part"), num_shards=3, present=1)
    assert checkpoints.folder("org/part") is None
    assert "2 of 3 weight files are missing" in str(checkpoints.missing("org/part"))
    save(snapshot(cache, "org/gptq"), quantization_config={"quant_method": "gptq"})
    with pytest.raises(BadCheckpoint, match="already quantized"):
        checkpoints.folder("org/gptq")
    with pytest.raises(BadCheckpoint, match="is neither a folder nor a hub id"):
        checkpoints.folder("/no/such/folder")


def test_a_folder_may_hold_checkpoints_or_be_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "models" / "org" / "one")
    assert [entry.name for entry in checkpoints.held_by(str(tmp_path / "models"))] == [str(folder)]
    assert checkpoints.held_by(str(folder)) == []
    assert checkpoints.held_by("org/one") == []


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("demo-random-moe", "Demo, random weights"),
        (str(checkpoints.BUNDLED), "Demo, comes with MoEpic"),
        ("/models/Qwen3-30B", "Qwen3-30B"),
        ("org/model", "org/model"),
    ],
)
def test_titles(name: str, title: str) -> None:
    assert checkpoints.title(name) == title
