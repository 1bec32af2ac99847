"""Broken configs, tokenizers and generation configs: one sentence each, and our own bugs are not hidden in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from moepic_core.checkpoint import read_spec
from moepic_core.engine import Engine
from moepic_core.errors import BadCheckpoint, BadSettings, Cancelled
from moepic_core.hf import loading
from moepic_core.hf.refusals import refusals
from moepic_core.hf.text import Sampling, Text
from moepic_core.spec import Settings

CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {  # family, changed values, words of the sentence
    "a number in quotes": ("qwen3_moe", {"num_attention_heads": "4"}, "'num_attention_heads'.* expected int, got str"),
    "null for a number": ("qwen3_moe", {"num_attention_heads": None}, "'num_attention_heads'"),
    "a number for a word": ("qwen3_moe", {"hidden_act": 5}, "'hidden_act'"),
    "an unknown activation": ("qwen3_moe", {"hidden_act": "zork"}, "it knows no 'zork'"),
    "no epsilon": ("qwen3_moe", {"rms_norm_eps": None}, "'rms_norm_eps'"),
    "a word for a flag": ("qwen3_moe", {"norm_topk_prob": "maybe"}, "'norm_topk_prob'"),
    "a word for a token": ("qwen3_moe", {"pad_token_id": "x"}, "'pad_token_id'"),
    "a token outside": ("qwen3_moe", {"pad_token_id": 9999}, "Padding_idx must be within num_embeddings"),
    "no heads": ("qwen3_moe", {"num_attention_heads": 0}, "."),
    "every zeroth layer": ("qwen3_moe", {"decoder_sparse_step": 0}, "modulo by zero"),
    "labels that are none": ("qwen3_moe", {"id2label": 5}, "'int' object has no attribute"),
    "an unknown rope": ("qwen3_moe", {"rope_parameters": {"rope_type": "zork", "rope_theta": 1e4}}, "zork"),
    "an odd head": ("mixtral", {"head_dim": 7}, "."),
    "wrong kinds of layers": ("gpt_oss", {"layer_types": ["nonsense"] * 4}, "layer_types"),
}


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def throw(error: Exception) -> NoReturn:
    raise error


def settings_for(folder: Path) -> Settings:
    return Settings.create(checkpoint=str(folder), device="cpu", link="pcie4x16", context_length=64)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_cannot_use_is_refused_in_one_sentence(
    name: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    family, changes, words = CONFIGS[name]
    folder = copied(checkpoints(family), tmp_path / "model", **changes)
    with pytest.raises(BadCheckpoint, match=words) as refused:
        Engine.load(settings_for(folder))
    assert str(refused.value).startswith("Transformers cannot load model: ")
    assert str(refused.value).endswith("; correct config.json, or download the checkpoint again")
    assert "\n" not in str(refused.value)
    with pytest.raises(BadCheckpoint) as inspected:
        loading.check_family(read_spec(folder))
    assert str(inspected.value) == str(refused.value)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h", "jamba"])
def test_sound_families_pass_the_check_that_needs_no_weights(family: str, checkpoints: Callable[..., Path]) -> None:
    loading.check_family(read_spec(checkpoints(family)))


def test_a_model_that_transformers_does_not_know_is_refused_before_its_weights_are_read(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    unknown = read_spec(copied(checkpoints("mixtral"), tmp_path / "unknown", model_type="zork_moe"))
    with pytest.raises(BadCheckpoint, match="model type 'zork_moe' has no causal language model in this Transformers"):
        loading.check_family(unknown)
    other = read_spec(copied(checkpoints("qwen3_moe"), tmp_path / "other", mlp_only_layers=[]))
    with pytest.raises(
        BadCheckpoint, match="has 4 expert layers behind Transformers' experts interface, the files hold 3"
    ):
        loading.check_family(other)


@pytest.mark.parametrize("content", ["[]", "{", "7", '{"eos_token_id": "x"}', '{"eos_token_id": [[1]]}'])
def test_a_broken_generation_config_is_refused(content: str, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    folder = copied(checkpoints("mixtral"), tmp_path / "model")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(BadCheckpoint) as refused, Engine.load(settings_for(folder)):
        pass
    assert "eos_token_id" in str(refused.value) or "generation_config.json of model" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", '{"version": "1.0", "trunca', "[]"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_was_cut_off_is_refused(
    file: str, content: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints("mixtral"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / file).write_text(content)
    with pytest.raises(
        BadCheckpoint, match=r"cannot load the tokenizer of model: .*; download its tokenizer files again"
    ):
        Text(str(folder), None)


def test_what_our_own_code_throws_under_transformers_comes_back_as_it_is(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls us while it loads: to look at the skeleton, and for every tensor."""
    settings = settings_for(checkpoints("mixtral"))

    for failure in (AssertionError("a mistake of ours"), Cancelled("loading was stopped"), KeyError("ours")):
        for name in ("experts_of", "check_layout"):
            with monkeypatch.context() as patch:
                patch.setattr(loading, name, lambda *_, error=failure: throw(error))
                with pytest.raises(type(failure)) as raised:
                    Engine.load(settings)
            assert raised.value is failure
    with pytest.raises(MemoryError), refusals("model", "help"):
        raise MemoryError


@pytest.mark.parametrize("seed", [-1, 2**64, 99999999999999999999999])
def test_a_seed_that_torch_cannot_take_is_out_of_range(seed: int) -> None:
    with pytest.raises(BadSettings, match=f"seed {seed} is out of range; allowed is 0 to 18446744073709551615"):
        Sampling(seed=seed)
    Sampling(seed=2**64 - 1)
