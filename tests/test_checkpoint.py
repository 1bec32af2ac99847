"""A ModelSpec says what Transformers would build, for every family, and what cannot be run is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import FAMILIES, make_model, write_sparse

from moepic_core.checkpoint import read_spec
from moepic_core.errors import BadCheckpoint
from moepic_core.spec import ModelSpec, MoeLayer

GEOMETRY = {  # family: (decoder layers, MoE layers, neurons, hidden, matrices)
    "mixtral": (4, [0, 1, 2, 3], 40, 48, 3),
    "qwen2_moe": (4, [0, 1, 3], 24, 32, 3),
    "qwen3_moe": (4, [0, 2, 3], 24, 32, 3),
    "olmoe": (4, [0, 1, 2, 3], 40, 32, 3),
    "deepseek_v2": (4, [1, 2, 3], 24, 32, 3),
    "deepseek_v3": (4, [1, 2, 3], 24, 32, 3),
    "gpt_oss": (4, [0, 1, 2, 3], 40, 32, 3),
    "phimoe": (4, [0, 1, 2, 3], 40, 32, 3),
    "qwen3_next": (4, [0, 2, 3], 24, 32, 3),
    "glm4_moe": (4, [1, 2, 3], 24, 32, 3),
    "granitemoe": (4, [0, 1, 2, 3], 40, 32, 3),
    "ernie4_5_moe": (5, [1, 3], 24, 32, 3),
    "hunyuan_v1_moe": (4, [0, 1, 2, 3], 40, 32, 3),
    "minimax_m2": (4, [0, 1, 2, 3], 40, 32, 3),
    "afmoe": (4, [1, 2, 3], 24, 32, 3),
    "flex_olmo": (4, [0, 1, 2, 3], 40, 32, 3),
    "nemotron_h": (5, [1, 4], 24, 32, 2),
    "lfm2_moe": (4, [1, 2, 3], 24, 32, 3),
    "jamba": (4, [1, 3], 40, 32, 3),
    "dots1": (4, [1, 2, 3], 24, 32, 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_geometry_that_it_was_made_with(family: str, checkpoints: Callable[..., Path]) -> None:
    num_layers, moe_layers, neurons, hidden, matrices = GEOMETRY[family]
    spec = read_spec(checkpoints(family))
    assert spec.num_layers == num_layers
    assert spec.moe_layers == tuple(MoeLayer(layer, 8, neurons, hidden, matrices, 4) for layer in moe_layers)
    assert (spec.top_k, spec.hidden, spec.vocab_size, spec.context_length) == (2, hidden, 320, 512)
    assert (spec.model_type, spec.dtype, spec.shards) == (family, "float32", ("model.safetensors",))


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_model_in_memory(family: str, checkpoints: Callable[..., Path]) -> None:
    from transformers import DynamicCache

    spec = read_spec(checkpoints(family))
    model = make_model(family)
    experts = [
        weight
        for module in model.modules()
        if hasattr(module, "is_concatenated")
        for weight in module.parameters()
        if weight.ndim == 3
    ]
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # tied tensors once
    assert spec.expert_bytes == sum(weight.nbytes for weight in experts)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert spec.embedding_bytes == (0 if tied else model.get_input_embeddings().weight.nbytes)
    assert spec.resident_bytes + spec.host_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert spec.num_parameters * 4 == spec.resident_bytes + spec.host_bytes
    idle = spec.expert_bytes * (8 - spec.top_k) // 8
    assert spec.active_parameters == spec.num_parameters - idle // 4

    cache = DynamicCache(config=model.config)
    num_tokens = 8
    with torch.no_grad():
        model(torch.arange(num_tokens)[None], past_key_values=cache)
    states = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
    assert spec.kv_bytes_per_token * num_tokens == sum(state.nbytes for state in states if state is not None)


# From here on: checkpoints written by hand, without Transformers.

Tensors = dict[str, tuple[str, list[int]]]
CONFIG = {
    "model_type": "handmade",
    "architectures": ["HandmadeForCausalLM"],
    "dtype": "bfloat16",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "vocab_size": 10,
    "max_position_embeddings": 64,
}


def handmade_tensors() -> Tensors:
    """One dense and one MoE layer: 4 gated experts of 5 neurons, hidden 6."""
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", [10, 6]), "lm_head.weight": ("BF16", [10, 6])}
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = ("BF16", [4, 6])
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = ("BF16", [3, 6])
    for expert in range(4):
        for matrix, shape in (("gate", [5, 6]), ("up", [5, 6]), ("down", [6, 5])):
            tensors[f"model.layers.1.mlp.experts.{expert}.{matrix}_proj.weight"] = ("BF16", shape)
    return tensors


def save(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A checkpoint by hand; a config value of None removes the key."""
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    write_sparse(folder / "model.safetensors", handmade_tensors() if tensors is None else tensors)
    return folder


def test_the_spec_of_a_handmade_checkpoint_is_exact(tmp_path: Path) -> None:
    folder = save(tmp_path)
    spec = read_spec(folder)
    assert spec == ModelSpec(
        path=str(folder),
        name=folder.name,
        model_type="handmade",
        architecture="HandmadeForCausalLM",
        dtype="bfloat16",
        num_layers=2,
        moe_layers=(MoeLayer(1, 4, 5, 6, 3, 2),),
        top_k=2,
        hidden=6,
        vocab_size=10,
        context_length=64,
        resident_bytes=2 * (2 * 60 + 2 * 7 * 6),
        kv_bytes_per_token=2 * 2 * 7,
        num_parameters=2 * 60 + 2 * 42 + 4 * 90,
        active_parameters=2 * 60 + 2 * 42 + 2 * 90,
        file_bytes=(folder / "model.safetensors").stat().st_size,
        shards=("model.safetensors",),
        fingerprint=spec.fingerprint,
        kv_largest_layer_bytes=2 * 7,
        added_bytes=65536 + 2 * 2 * 24,  # the keys' projections look like routers here
    )


def test_a_snapshot_in_the_hub_cache_is_called_by_its_id(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--some-model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert read_spec(save(folder)).name == "org/some-model"


def test_the_fingerprint_changes_with_any_file(tmp_path: Path) -> None:
    first = read_spec(save(tmp_path)).fingerprint
    assert read_spec(tmp_path).fingerprint == first
    save(tmp_path, rope_theta=1)
    other_config = read_spec(tmp_path).fingerprint
    save(tmp_path, {**handmade_tensors(), "more": ("BF16", [1])}, rope_theta=1)
    assert len({first, other_config, read_spec(tmp_path).fingerprint}) == 3


@pytest.mark.parametrize(
    ("asked", "config", "expected"),
    [
        ("auto", {}, "bfloat16"),
        ("auto", {"dtype": None, "torch_dtype": "torch.float16"}, "float16"),
        ("auto", {"dtype": None}, "bfloat16"),  # as stored
        ("float32", {}, "float32"),
        ("float16", {"dtype": "float64"}, "float16"),
    ],
)
def test_dtype_is_as_asked_or_as_the_config_says_or_as_stored(
    asked: str, config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    spec = read_spec(save(tmp_path, **config), asked)
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[expected]
    assert (spec.dtype, spec.moe_layers[0].itemsize) == (expected, itemsize)
    assert (spec.resident_bytes, spec.expert_bytes) == (204 * itemsize, 360 * itemsize)


def test_what_transformers_never_loads_does_not_count(tmp_path: Path) -> None:
    tensors = handmade_tensors()
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        tensors[name.replace("layers.1", "layers.2")] = tensors[name]  # beyond num_hidden_layers
        tensors[name.replace("model", "mtp")] = tensors[name]
    expected = read_spec(save(tmp_path))
    spec = read_spec(save(tmp_path, tensors))
    assert spec.moe_layers == expected.moe_layers
    assert (spec.resident_bytes, spec.num_parameters) == (expected.resident_bytes, expected.num_parameters)


def test_a_nested_language_config_and_a_vision_tower_are_understood(tmp_path: Path) -> None:
    tensors = {name.replace("model.", "model.language_model."): info for name, info in handmade_tensors().items()}
    tensors |= {f"model.visual.blocks.{block}.attn.k_proj.weight": ("BF16", [8, 8]) for block in range(5)}
    inner = {key: value for key, value in CONFIG.items() if key not in ("model_type", "architectures")}
    outer = dict.fromkeys(inner)
    spec = read_spec(save(tmp_path, tensors, **outer, text_config=inner))
    assert spec.moe_layers == (MoeLayer(1, 4, 5, 6, 3, 2),)
    assert spec.kv_bytes_per_token == 28
    assert spec.resident_bytes == 2 * (204 + 5 * 64)


def test_fused_and_transposed_experts_biases_and_convolutions_are_told_apart(tmp_path: Path) -> None:
    tensors = {name: info for name, info in handmade_tensors().items() if "experts" not in name}
    tensors |= {
        "model.layers.1.mlp.experts.gate_up_proj": ("BF16", [4, 6, 10]),
        "model.layers.1.mlp.experts.gate_up_proj_bias": ("BF16", [4, 10]),
        "model.layers.1.mlp.experts.down_proj": ("BF16", [4, 5, 6]),
        "model.layers.0.conv.weight": ("BF16", [4, 1, 3]),
    }
    spec = read_spec(save(tmp_path, tensors, ssm_state_size=5))
    assert spec.moe_layers == (MoeLayer(1, 4, 5, 6, 3, 2),)
    assert spec.resident_bytes == 2 * (204 + 40 + 12)
    assert spec.state_bytes == 2 * (4 * 4 * (3 + 5))  # channels × (inputs + a row of the state), the largest twice
    assert read_spec(save(tmp_path, tensors)).state_bytes == 2 * (4 * 4 * 3)


def test_a_latent_size_is_the_hidden_size_of_the_experts(tmp_path: Path) -> None:
    assert read_spec(save(tmp_path, hidden_size=12, moe_latent_size=6)).moe_layers[0].hidden == 6


def test_a_fused_qkv_projection_is_shared_out_by_heads(tmp_path: Path) -> None:
    tensors = {name: info for name, info in handmade_tensors().items() if "self_attn" not in name}
    tensors |= {f"model.layers.{layer}.self_attn.qkv_proj.weight": ("BF16", [16, 6]) for layer in range(2)}
    spec = read_spec(save(tmp_path, tensors, num_attention_heads=4, num_key_value_heads=2))
    assert spec.kv_bytes_per_token == 2 * 2 * 8  # 4 of 8 heads hold keys and values


def without(*parts: str) -> Tensors:
    return {name: info for name, info in handmade_tensors().items() if not any(part in name for part in parts)}


def reshaped(part: str, dtype: str, shape: list[int]) -> Tensors:
    return {name: (dtype, shape) if part in name else info for name, info in handmade_tensors().items()}


REFUSALS: dict[str, tuple[Tensors | None, dict[str, Any], str]] = {
    "quantized": (
        None,
        {"quantization_config": {"quant_method": "mxfp4"}},
        "is already quantized (mxfp4), which is not",
    ),
    "quantized, nested": (
        None,
        {"text_config": {"quantization_config": {}, "compression_config": "x"}},
        "(unnamed method",
    ),
    "stored quantized": (
        reshaped("experts", "F8_E4M3", [5, 6]),
        {},
        "stores experts as F8_E4M3, which looks quantized",
    ),
    "dense, with a vision tower": (
        {"visual.blocks.0.weight": ("BF16", [6, 6]), **without("experts")},
        {"num_experts": None},
        "is a dense model without routed experts",
    ),
    "dense": (
        without("experts"),
        {"num_experts": None},
        "is a dense model without routed experts; MoEpic is for Mixture",
    ),
    "one expert": (without("experts"), {"num_experts": 1}, "is a dense model without routed experts"),
    "no experts": (without("experts"), {}, "config.json says 4 experts, but no expert weights of a known layout were"),
    "more experts": (None, {"num_experts": 3}, "says 3 experts, model.layers.1 has gate_proj.weight of expert 3 too"),
    "fewer experts": (None, {"num_experts": 6}, "has gate_proj.weight of 4 experts, wanted 6: expert 4 is missing"),
    "absurdly many": (
        None,
        {"num_experts": 2**60},
        "gate_proj.weight of 4 experts, wanted 1152921504606846976: expert 4",
    ),
    "expert missing": (without("experts.2.up"), {}, "has up_proj.weight of 3 experts, wanted 4: expert 2 is missing"),
    "unequal": (
        reshaped("experts.1.up", "BF16", [6, 6]),
        {},
        "up_proj.weight of expert 1 is [6, 6], of most others [5, 6]",
    ),
    "fused, other number": (
        {**without("experts"), "model.layers.1.mlp.experts.up_proj": ("BF16", [3, 5, 6])},
        {},
        "says 4 experts, model.layers.1.mlp.experts.up_proj holds 3",
    ),
    "hidden": (None, {"hidden_size": 7}, "says hidden size 7, experts of model.layers.1 are [5, 6]"),
    "one matrix": (without("gate", "up"), {}, "need 2 or 3 matrices of one size, found [6, 5]"),
    "no neurons": (reshaped("experts", "BF16", [0, 6]), {}, "need 2 or 3 matrices of one size, found [0, 6]"),
    "no top-k": (None, {"num_experts_per_tok": None}, "gives no number of experts per token (num_experts_per_tok or"),
    "top-k too high": (None, {"num_experts_per_tok": 5}, "wants 5 experts per token, a layer has 4"),
    "top-k no number": (None, {"num_experts_per_tok": "2"}, "gives no number of experts per token"),
    "layers": (None, {"num_hidden_layers": 3}, "says 3 layers, but no tensor of layer 2 exists"),
    "no context": (None, {"max_position_embeddings": None}, "gives no context length (max_position_embeddings or"),
    "dtype": (None, {"dtype": "float64"}, "wants dtype 'float64'; choose one of float32, bfloat16, float16 instead of"),
    "no model type": (None, {"model_type": None}, "needs a model_type, found None"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_cannot_be_run_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    tensors, config, message = REFUSALS[reason]
    with pytest.raises(BadCheckpoint) as raised:
        read_spec(save(tmp_path, tensors, **config))
    assert message in str(raised.value)


def test_a_dtype_that_no_device_computes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="dtype 'int8' cannot run here; choose one of float32, bfloat16, float16"):
        read_spec(save(tmp_path), "int8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json; choose a folder with config.json and *.safetensors"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object, found list"),
        ("[" * 100_000, "config.json is not valid JSON"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    (save(tmp_path) / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadCheckpoint) as raised:
        read_spec(tmp_path)
    assert message in str(raised.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*CONFIG, "x"]), inner, max_size=2),
    max_leaves=4,
)
KEYS = [*CONFIG, "text_config", "quantization_config", "moe_latent_size", "layers_block_type", "torch_dtype"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_a_random_config_is_refused_or_read(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").unlink(missing_ok=True)
    if not (tmp_path / "model.safetensors").exists():
        write_sparse(tmp_path / "model.safetensors", handmade_tensors())
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    try:
        spec = read_spec(tmp_path)
    except BadCheckpoint:
        return
    assert spec.moe_layers == (MoeLayer(1, 4, 5, 6, 3, spec.moe_layers[0].itemsize),)


def test_a_hundred_shards_are_read_within_a_second(tmp_path: Path) -> None:
    num_shards, num_layers, num_experts = 100, 50, 128
    tensors: Tensors = {}
    for layer in range(num_layers):
        for expert in range(num_experts):
            for matrix, shape in (("gate", [512, 1024]), ("up", [512, 1024]), ("down", [1024, 512])):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"] = ("BF16", shape)
    names = list(tensors)
    per_shard = len(names) // num_shards
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        own = names[number * per_shard : (number + 1) * per_shard]
        write_sparse(tmp_path / shard, {name: tensors[name] for name in own})
        weight_map.update(dict.fromkeys(own, shard))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {**CONFIG, "num_experts": num_experts, "hidden_size": 1024, "num_hidden_layers": num_layers}
    (tmp_path / "config.json").write_text(json.dumps(config))

    start = time.process_time()
    spec = read_spec(tmp_path)
    seconds = time.process_time() - start
    assert len(spec.shards) == num_shards
    assert spec.expert_bytes == len(tensors) * 512 * 1024 * 2
    assert seconds < 1, f"{len(tensors)} tensors took {seconds:.2f} s"
