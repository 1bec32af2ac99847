"""Which weight files a folder has and lacks, and that neither index nor file names are trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_sparse

from moepic_core.errors import BadCheckpoint
from moepic_core.shards import check_complete, read_tensors, shard_names

INDEX = "model.safetensors.index.json"


def shard(number: int, total: int = 2) -> str:
    return f"model-{number:05}-of-{total:05}.safetensors"


def save(folder: Path, files: dict[str, list[str]], weight_map: Any = None) -> Path:
    for file, tensors in files.items():
        write_sparse(folder / file, {tensor: ("F32", [2]) for tensor in tensors})
    if weight_map is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_index_names_the_shards(tmp_path: Path) -> None:
    save(tmp_path, {shard(1): ["a"], shard(2): ["b", "c"], "other.safetensors": ["a"]}, {"a": shard(1), "b": shard(2)})
    assert shard_names(tmp_path) == [shard(1), shard(2)]
    tensors = read_tensors(tmp_path)
    assert {name: info.file.name for name, info in tensors.items()} == {"a": shard(1), "b": shard(2), "c": shard(2)}


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    save(tmp_path, {"model.safetensors": ["a"], shard(1): ["b"]}, {"b": shard(1)})
    assert shard_names(tmp_path) == ["model.safetensors"]
    assert set(read_tensors(tmp_path)) == {"a"}


def test_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    save(tmp_path, {"experts.safetensors": ["a"], "rest.safetensors": ["b"]})
    assert set(read_tensors(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("weight_map", [{"a": shard(1, 3), "b": shard(2, 3), "c": shard(3, 3)}, None])
def test_missing_shards_are_counted_with_and_without_an_index(weight_map: Any, tmp_path: Path) -> None:
    save(tmp_path, {shard(2, 3): ["b"]}, weight_map)
    message = (
        f"{tmp_path} is incomplete: 2 of 3 weight files are missing (the first is {shard(1, 3)}); "
        "download the checkpoint again, finished files are kept"
    )
    for check in (check_complete, read_tensors):
        with pytest.raises(BadCheckpoint) as raised:
            check(tmp_path)
        assert str(raised.value) == message


def test_a_broken_link_is_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / shard(1)).symlink_to("../blobs/gone")
    save(tmp_path, {shard(2): ["b"]})
    with pytest.raises(BadCheckpoint, match="1 of 2 weight files are missing"):
        check_complete(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {shard(1): ["a", "b"], shard(2): ["b", "c"]})
    with pytest.raises(BadCheckpoint, match=f"tensor 'b' is in {shard(1)} and in {shard(2)}; keep one of the two"):
        read_tensors(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {shard(1): ["a"], shard(2): ["b"]}, {"a": shard(1), "b": shard(2), "z": shard(2)})
    with pytest.raises(BadCheckpoint, match=f"places tensor 'z' in {shard(2)}, which lacks it"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "needs a weight_map that names tensors and files"),
        ([], "needs a weight_map that names tensors and files"),
        ({"a": 3}, "needs a file name for every tensor"),
        ({"a": "../model.safetensors"}, "names the file '../model.safetensors'; allowed are *.safetensors files in"),
        ({"a": "/etc/x.safetensors"}, "names the file '/etc/x.safetensors'; allowed are"),
        ({"a": "model.bin"}, "names the file 'model.bin'; allowed are"),
    ],
)
def test_a_malformed_index_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint) as raised:
        shard_names(save(tmp_path, {}, weight_map))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", ".bin (pytorch_model.bin) can execute code when it is opened; convert the checkpoint to"),
        ("consolidated.00.pt", ".pt (consolidated.00.pt) can execute code when it is opened; convert"),
        ("weights.pth", ".pth (weights.pth) can execute code when it is opened; convert"),
        ("last.ckpt", ".ckpt (last.ckpt) can execute code when it is opened; convert"),
        ("model-Q4_0.gguf", ".gguf (model-Q4_0.gguf) is not supported; convert the checkpoint to safetensors"),
        ("readme.md", "has no weights: wanted *.safetensors"),
    ],
)
def test_other_formats_are_refused_with_the_reason(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(BadCheckpoint) as raised:
        read_tensors(tmp_path)
    assert message in str(raised.value)
