"""From a checkpoint folder to a ModelSpec, by reading `config.json` and safetensors headers alone.

The engine and the page call `read_spec` before anything is allocated. Geometry comes from tensor shapes, so any family
works that stores its routed experts one by one (`….experts.7.….weight`) or fused (`[experts, …, …]`); the config is
checked against it. What cannot be run is refused with BadCheckpoint. No weight is read and no model is built here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from .errors import BadCheckpoint
from .model_config import ModelConfig
from .safetensors_header import ITEMSIZES, TensorInfo
from .shards import fingerprint, read_tensors
from .spec import ModelSpec, MoeLayer

_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BUFFERS_BYTES = 64 << 10  # of rotary frequencies and the like, which no file holds; some models have a few kinds
_DEVICE_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# model.layers.3.mlp.experts.7.up_proj.weight → stack `model.layers`, layer 3, rest `mlp.experts.7.up_proj.weight`
_LAYER = re.compile(r"(.*?)\.([0-9]{1,6})\.(.+)")
_LISTED_EXPERT = re.compile(r"(?:.*\.)?experts\.(0|[1-9][0-9]{0,5})\.(.+)")
_FUSED_EXPERTS = re.compile(r"(?:.*\.)?experts\..+")
_SPECULATIVE = re.compile(r"(?:.*\.)?mtp")  # heads that guess several tokens at once; Transformers does not load them
_KEYS_VALUES = re.compile(r"(?:.*\.)?(?:k_proj|v_proj|kv_a_proj_with_mqa)\.weight")
_FUSED_QKV = re.compile(r"(?:.*\.)?(?:qkv_proj|query_key_value|Wqkv)\.weight")


@dataclass
class _Layer:
    """Tensors of one decoder layer, sorted. A matrix is `rest of its name` → `expert` → shape [rows, columns]."""

    name: str
    listed: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=lambda: defaultdict(dict))
    fused: dict[str, tuple[int, ...]] = field(default_factory=dict)  # [experts, rows, columns]
    experts: list[TensorInfo] = field(default_factory=list)
    others: dict[str, TensorInfo] = field(default_factory=dict)


def read_spec(path: str | Path, dtype: str = "auto") -> ModelSpec:
    """The ModelSpec of the checkpoint in folder `path`, in `dtype` on the device ("auto": as the checkpoint says).

    `kv_bytes_per_token` is an estimate: it counts every attention layer as if it kept all tokens; what is "at most" in
    the spec is an estimate from above, too. Raises BadCheckpoint when files are missing or damaged, weights are
    quantized, the model is dense, or config and tensors disagree.
    """
    folder = Path(path)
    config = ModelConfig(folder)
    if config.quantization:
        raise BadCheckpoint(
            f"{folder} is already quantized ({config.quantization}), which is not supported yet; "
            "choose the checkpoint in bfloat16, float16 or float32"
        )
    tensors = read_tensors(folder)
    layers, outside = _decoder_layers(tensors, config)
    moe_layers = [(number, layer) for number, layer in layers.items() if layer.experts]
    if not moe_layers:
        raise _no_experts(folder, config)
    if len(layers) < config.num_layers:
        absent = next(number for number in range(config.num_layers) if number not in layers)
        raise BadCheckpoint(f"{config.path} says {config.num_layers} layers, but no tensor of layer {absent} exists")
    experts = [info for _, layer in moe_layers for info in layer.experts]
    others = [*outside, *(info for layer in layers.values() for info in layer.others.values())]
    dtype = _device_dtype(folder, config, experts, dtype)
    itemsize = _DEVICE_ITEMSIZES[dtype]
    geometry = tuple(_moe_layer(number, layer, config, itemsize) for number, layer in moe_layers)
    if config.top_k > config.num_experts:
        raise BadCheckpoint(f"{config.path} wants {config.top_k} experts per token, a layer has {config.num_experts}")
    num_parameters = _num_weights(experts) + _num_weights(others)
    tables = _token_tables(tensors, config)
    on_host = config.vocab_size * config.hidden * itemsize if tables else 0
    idle = sum((layer.num_experts - config.top_k) * layer.expert_bytes for layer in geometry) // itemsize
    shards = sorted({info.file.name for info in tensors.values()})
    kv_widths = [_kv_width(layer, config) for layer in layers.values()]
    states = [_state_bytes(layer, config) for layer in layers.values()]
    return ModelSpec(
        path=str(folder),
        name=_name(folder),
        model_type=config.model_type,
        architecture=config.architecture,
        dtype=dtype,
        num_layers=config.num_layers,
        moe_layers=geometry,
        top_k=config.top_k,
        hidden=config.hidden,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        resident_bytes=_device_bytes(others, itemsize) - on_host,
        kv_bytes_per_token=itemsize * sum(kv_widths),
        num_parameters=num_parameters,
        active_parameters=num_parameters - idle,
        file_bytes=sum((folder / shard).stat().st_size for shard in shards),
        shards=tuple(shards),
        fingerprint=fingerprint(folder, shards, config.text),
        token_tables=tables,
        kv_largest_layer_bytes=itemsize * max(kv_widths),
        state_bytes=sum(states) + max(states),
        added_bytes=_BUFFERS_BYTES + (4 - itemsize) * _num_weights(info for info in others if _is_small(info, config)),
    )


def _token_tables(tensors: dict[str, TensorInfo], config: ModelConfig) -> tuple[str, ...]:
    """Token embedding and output head, in no order, where the config says that they are two and just two tensors can be
    meant; else nothing. Which is which shows when the model is loaded.
    """
    shape = (config.vocab_size, config.hidden)
    names = [
        name
        for name, info in tensors.items()
        if info.shape == shape and info.dtype in _FLOATS and not (_LAYER.fullmatch(name) or _SPECULATIVE.match(name))
    ]
    return tuple(sorted(names)) if config.is_untied and len(names) == 2 else ()


def _decoder_layers(tensors: dict[str, TensorInfo], config: ModelConfig) -> tuple[dict[int, _Layer], list[TensorInfo]]:
    """Decoder layers by number, in order, and all tensors outside of them; without those that are never loaded."""
    stacks: dict[str, dict[int, _Layer]] = defaultdict(dict)
    outside = []
    for name, info in tensors.items():
        if _SPECULATIVE.match(name):
            continue
        if match := _LAYER.fullmatch(name):
            stack, number = stacks[match[1]], int(match[2])
            if number not in stack:
                stack[number] = _Layer(f"{match[1]}.{number}")
            _sort_into(stack[number], match[3], info, config)
        else:
            outside.append(info)
    # A vision tower is a stack of layers too: the decoder is the stack with the most MoE layers.
    decoder = max(stacks, key=lambda stack: sum(bool(layer.experts) for layer in stacks[stack].values()), default="")
    layers = stacks.pop(decoder, {})
    for layer in (layer for stack in stacks.values() for layer in stack.values()):
        outside += [*layer.experts, *layer.others.values()]
    # What lies beyond the last layer guesses several tokens at once, too.
    return {number: layer for number, layer in sorted(layers.items()) if number < config.num_layers}, outside


def _sort_into(layer: _Layer, rest: str, info: TensorInfo, config: ModelConfig) -> None:
    """A matrix of routed experts, or anything else. Biases of experts are small and count as anything else."""
    if len(info.shape) == 2 and (match := _LISTED_EXPERT.fullmatch(rest)):
        layer.listed[match[2]][int(match[1])] = info.shape
        layer.experts.append(info)
    elif len(info.shape) == 3 and (_FUSED_EXPERTS.fullmatch(rest) or _looks_fused(info.shape, config)):
        layer.fused[rest] = info.shape
        layer.experts.append(info)
    else:
        layer.others[rest] = info


def _looks_fused(shape: tuple[int, ...], config: ModelConfig) -> bool:
    """[experts, …, hidden] in any order of the last two: convolutions are three-dimensional too, but narrow."""
    return config.names_experts and shape[0] == config.num_experts and config.expert_hidden in shape[1:]


def _moe_layer(number: int, layer: _Layer, config: ModelConfig, itemsize: int) -> MoeLayer:
    """Geometry of the experts in `layer`, checked against the config. The smallest matrix is neurons × hidden."""
    shapes = [_listed_shape(layer.name, leaf, shapes, config) for leaf, shapes in layer.listed.items()]
    shapes += [_fused_shape(layer.name, rest, shape, config) for rest, shape in layer.fused.items()]
    hidden = config.expert_hidden
    for shape in shapes:
        if hidden not in shape:
            raise BadCheckpoint(f"{config.path} says hidden size {hidden}, experts of {layer.name} are {list(shape)}")
    neurons = min(map(prod, shapes)) // hidden
    matrices, rest = divmod(sum(map(prod, shapes)), max(1, neurons * hidden))
    if rest or matrices not in (2, 3):
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise BadCheckpoint(f"experts of {layer.name} need 2 or 3 matrices of one size, found {found}")
    return MoeLayer(number, config.num_experts, neurons, hidden, matrices, itemsize)


def _listed_shape(layer: str, leaf: str, shapes: dict[int, tuple[int, ...]], config: ModelConfig) -> tuple[int, ...]:
    wanted = config.num_experts
    if beyond := [expert for expert in shapes if expert >= wanted]:
        raise BadCheckpoint(f"{config.path} says {wanted} experts, {layer} has {leaf} of expert {max(beyond)} too")
    if len(shapes) < wanted:
        absent = next(expert for expert in range(wanted) if expert not in shapes)
        raise BadCheckpoint(f"{layer} has {leaf} of {len(shapes)} experts, wanted {wanted}: expert {absent} is missing")
    (shape, _), *odd = Counter(shapes.values()).most_common()
    if odd:
        expert = next(expert for expert in shapes if shapes[expert] != shape)
        found = list(shapes[expert])
        raise BadCheckpoint(f"{layer}: {leaf} of expert {expert} is {found}, of most others {list(shape)}")
    return shape


def _fused_shape(layer: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    if shape[0] != config.num_experts:
        raise BadCheckpoint(f"{config.path} says {config.num_experts} experts, {layer}.{name} holds {shape[0]}")
    return shape[1:]


def _device_dtype(folder: Path, config: ModelConfig, experts: list[TensorInfo], dtype: str) -> str:
    """The dtype on the device: as asked for, else as the config says, else that of most expert weights."""
    weights: Counter[str] = Counter()
    for info in experts:
        weights[info.dtype] += prod(info.shape)
    stored = weights.most_common(1)[0][0]
    if quantized := weights.keys() - _FLOATS.keys():
        raise BadCheckpoint(
            f"{folder} stores experts as {min(quantized)}, which looks quantized and is not supported yet; "
            "choose the checkpoint in bfloat16, float16 or float32"
        )
    if dtype == "auto":
        dtype = config.dtype or _FLOATS[stored]
    if dtype not in _DEVICE_ITEMSIZES:
        raise BadCheckpoint(f"dtype {dtype!r} cannot run here; choose one of {', '.join(_DEVICE_ITEMSIZES)}")
    return dtype


def _device_bytes(tensors: Iterable[TensorInfo], itemsize: int) -> int:
    """Bytes on the device: numbers take `itemsize`, everything else (masks, indices) stays as it is."""
    return sum(prod(info.shape) * (itemsize if info.dtype in _FLOATS else ITEMSIZES[info.dtype]) for info in tensors)


def _num_weights(tensors: Iterable[TensorInfo]) -> int:
    return sum(prod(info.shape) for info in tensors)


def _kv_width(layer: _Layer, config: ModelConfig) -> int:
    """Numbers that `layer` caches per token: as many as its key and value projections have rows.

    Multi-head latent attention caches its latent, as Transformers does. Layers without such projections (Mamba,
    convolution, linear attention) keep a state of fixed size and count as zero.
    """
    width = sum(info.shape[0] for name, info in layer.others.items() if info.shape and _KEYS_VALUES.fullmatch(name))
    for name, info in layer.others.items():
        if info.shape and _FUSED_QKV.fullmatch(name):
            query_heads, kv_heads = config.attention_heads
            width += info.shape[0] * 2 * kv_heads // (query_heads + 2 * kv_heads)
    return width


def _state_bytes(layer: _Layer, config: ModelConfig) -> int:
    """The most that `layer` keeps whatever the length, in float32: for each channel of a convolution its last inputs
    and, where there is a state space or linear attention behind it, one row of that state.
    """
    convolutions = [info.shape for info in layer.others.values() if len(info.shape) == 3 and info.shape[1] == 1]
    return sum(4 * channels * (width + config.state_width) for channels, _, width in convolutions)


def _is_small(info: TensorInfo, config: ModelConfig) -> bool:
    """A router or a vector: what some families keep in float32."""
    return info.dtype in _FLOATS and (len(info.shape) < 2 or info.shape == (config.num_experts, config.hidden))


def _no_experts(folder: Path, config: ModelConfig) -> BadCheckpoint:
    if config.names_experts:
        return BadCheckpoint(
            f"{config.path} says {config.num_experts} experts, but no expert weights of a known layout were found "
            f"({folder.name}); the checkpoint is incomplete or of an unsupported kind"
        )
    return BadCheckpoint(f"{folder} is a dense model without routed experts; MoEpic is for Mixture-of-Experts models")


def _name(folder: Path) -> str:
    """The hub id of a snapshot in the Hugging Face cache, else the folder's own name."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return folder.name
