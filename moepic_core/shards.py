"""The weight files of one checkpoint folder: which there are, which are missing, and every tensor in them.

`checkpoint` reads a folder's tensors through here, `finder` asks what is missing. Safetensors only: pickled formats can
execute code, GGUF is not supported. An index is checked against the headers, never trusted; nothing is allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from .errors import BadCheckpoint
from .safetensors_header import TensorInfo, read_header

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_REFUSED = {
    ".bin": "can execute code when it is opened",
    ".pt": "can execute code when it is opened",
    ".pth": "can execute code when it is opened",
    ".ckpt": "can execute code when it is opened",
    ".gguf": "is not supported",
}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises BadCheckpoint when the file is missing, unreadable or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} must hold a JSON object, found {type(content).__name__}; download the file again")
    return content


def shard_names(folder: Path) -> list[str]:
    """File names of all weight shards that the checkpoint in `folder` should have, present or not.

    Raises BadCheckpoint when there are no safetensors at all, or the index is malformed.
    """
    return _expected(folder)[0]


def check_complete(folder: Path) -> None:
    """Raises BadCheckpoint when weight files of the checkpoint are missing, such as after an interrupted download."""
    _check_present(folder, shard_names(folder))


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint in `folder`, from the headers of its shards alone.

    Raises BadCheckpoint for missing or damaged shards, a tensor in two shards, or one that the index names and no shard
    holds.
    """
    names, tensor_to_shard = _expected(folder)
    _check_present(folder, names)
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        header = read_header(folder / name)
        if twice := tensors.keys() & header.keys():
            tensor = min(twice)
            raise BadCheckpoint(
                f"tensor {tensor!r} is in {tensors[tensor].file.name} and in {name}; keep one of the two"
            )
        tensors.update(header)
    if absent := tensor_to_shard.keys() - tensors.keys():
        tensor = min(absent)
        raise BadCheckpoint(
            f"{_INDEX} places tensor {tensor!r} in {tensor_to_shard[tensor]}, which lacks it; download both again"
        )
    return tensors


def fingerprint(folder: Path, names: list[str], config_text: str) -> str:
    """A name for this state of the checkpoint: changes with the config and with any shard's name, size or time."""
    digest = hashlib.sha256(config_text.encode())
    for name in names:
        stat = (folder / name).stat()
        digest.update(f"\n{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _check_present(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadCheckpoint(
            f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing "
            f"(the first is {missing[0]}); download the checkpoint again, finished files are kept"
        )


def _expected(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the shards, and the index's tensor name to shard name (empty where there is no index).

    The order of search is that of Transformers: one `model.safetensors`, else the shards that the index names. Without
    either all safetensors files count, and numbers in their names (`…-00001-of-00003`) tell which are missing.
    """
    if (folder / _SINGLE).is_file():
        return [_SINGLE], {}
    if (folder / _INDEX).is_file():
        tensor_to_shard = _weight_map(folder)
        return sorted(set(tensor_to_shard.values())), tensor_to_shard
    names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise _no_safetensors(folder)
    for match in filter(None, map(_NUMBERED.fullmatch, list(names))):
        names.update(f"{match[1]}-{number:05}-of-{match[3]}.safetensors" for number in range(1, int(match[3]) + 1))
    return sorted(names), {}


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{_INDEX} needs a weight_map that names tensors and files; download the file again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadCheckpoint(f"{_INDEX} needs a file name for every tensor; download the file again")
    for shard in set(weight_map.values()):
        # A file outside the folder is never part of a checkpoint: the index must not reach for other files.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(f"{_INDEX} names the file {shard!r}; allowed are *.safetensors files in {folder}")
    return weight_map


def _no_safetensors(folder: Path) -> BadCheckpoint:
    for path in sorted(folder.iterdir()):
        if path.suffix in _REFUSED:
            return BadCheckpoint(
                f"{folder} has no *.safetensors, and {path.suffix} ({path.name}) {_REFUSED[path.suffix]}; "
                "convert the checkpoint to safetensors"
            )
    return BadCheckpoint(f"{folder} has no weights: wanted *.safetensors; download them or choose another folder")
