"""The four nouns that travel between the rooms: ModelSpec, MachineProfile, Settings, Plan.

All are frozen. Checkpoint, calibration, planner, engine, command line and page exchange these and nothing else.
An unknown setting raises and offers the nearest name; resolving `auto` makes a new object, never a mutation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from .costs import Breakdown
from .errors import BadSettings, nearest

DeviceKind = Literal["cuda", "cpu"]
MissHandling = Literal["fetch"]
EvictionName = Literal["lcp", "lcp-aged", "lru", "lfu", "request-frequency"]
PredictorName = Literal["none", "next-router", "activation-matrices"]


@dataclass(frozen=True)
class MoeLayer:
    """Geometry of one MoE layer. One neuron is a row of gate and up and the matching column of down."""

    decoder_layer: int  # number of the decoder layer that it sits in, as in the checkpoint's tensor names
    num_experts: int
    neurons: int  # intermediate size of one expert
    hidden: int
    matrices: int  # 3 for gated experts (gate, up, down), 2 for ungated ones (up, down)
    itemsize: int  # bytes per weight on the device

    @property
    def row_bytes(self) -> int:
        """Bytes of one neuron in a record."""
        return self.matrices * self.hidden * self.itemsize

    @property
    def expert_bytes(self) -> int:
        """U of the paper: bytes of one whole expert."""
        return self.neurons * self.row_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_experts * self.expert_bytes


@dataclass(frozen=True)
class ModelSpec:
    """What the checkpoint says, read from its config and safetensors headers alone."""

    path: str  # folder that holds config.json and *.safetensors
    name: str  # folder name or hub id, for people
    model_type: str
    architecture: str
    dtype: str  # of the weights on the device: "float32", "bfloat16", "float16"
    num_layers: int
    moe_layers: tuple[MoeLayer, ...]  # in order of execution
    top_k: int
    hidden: int
    vocab_size: int
    context_length: int
    resident_bytes: int  # everything but what the host tier holds, in `dtype`
    kv_bytes_per_token: int  # estimate from the config; the engine measures it after loading
    num_parameters: int
    active_parameters: int  # used by one token
    file_bytes: int
    shards: tuple[str, ...]  # file names
    fingerprint: str  # changes when any file changes
    token_tables: tuple[str, ...] = ()  # tensors of token embedding and output head where they are two; see below
    kv_largest_layer_bytes: int = 0  # part of kv_bytes_per_token, of the layer that keeps most
    state_bytes: int = 0  # at most, of states that do not grow (Mamba, convolution, linear attention), largest twice
    added_bytes: int = 0  # at most, that loading adds to resident_bytes: rotary tables, small weights kept in float32

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layer.layer_bytes for layer in self.moe_layers)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the token embedding where it lives on the host tier: not tied to the output head, so that a token
        needs one row of it (`hf.embedding`). 0 where it is a part of `resident_bytes`.
        """
        return self.vocab_size * self.hidden * self.moe_layers[0].itemsize if self.token_tables else 0

    def with_embedding_on_device(self) -> ModelSpec:
        """For a model whose code turned out not to allow the host tier."""
        return dataclasses.replace(self, resident_bytes=self.resident_bytes + self.embedding_bytes, token_tables=())

    @property
    def host_bytes(self) -> int:
        """Bytes on the host tier: all routed experts, and the token embedding where it lives there."""
        return self.expert_bytes + self.embedding_bytes

    @cached_property
    def largest_layer_bytes(self) -> int:
        return max(layer.layer_bytes for layer in self.moe_layers)

    @cached_property
    def record_bytes_max(self) -> int:
        """Bytes of the largest single expert."""
        return max(layer.expert_bytes for layer in self.moe_layers)


@dataclass(frozen=True)
class MachineProfile:
    """What was measured on this machine. `None` means unknown, never zero."""

    device: DeviceKind
    device_name: str
    device_total_bytes: int  # VRAM, or RAM on a CPU-only machine
    device_free_bytes: int
    host_total_bytes: int
    host_free_bytes: int
    cpu_cores: int
    link_bytes_per_s: float | None = None  # alone
    link_contended_bytes_per_s: float | None = None  # while the device computes
    host_memory_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Strategy:
    """A preset of the one engine. The baselines of the field are rows of `STRATEGIES`, not code paths."""

    name: str
    split: float | None  # fixed split ratio; None lets the plan choose
    eviction: EvictionName
    allocation: Literal["none", "uniform", "planned", "dynamic-program"]
    predictor: PredictorName
    misses: MissHandling
    summary: str


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("moepic", None, "lcp-aged", "planned", "next-router", "fetch",
                 "split experts, tops cached by ageing LCP or LRU, next layer prefetched, all planned (this project)"),
        Strategy("mixtral-offloading", 1.0, "lru", "uniform", "next-router", "fetch",
                 "whole experts cached by LRU, next layer prefetched"),
        Strategy("adapmoe", 1.0, "lru", "dynamic-program", "next-router", "fetch",
                 "whole experts cached by LRU, layers' shares by dynamic program, next layer prefetched"),
        # Published with one cache for all layers that prefers to keep the nearest ones. Here each layer has its own,
        # with equal shares, because those of a dynamic program over its own hits are 0.1 to 1.4 % slower (simulated).
        Strategy("moe-infinity", 1.0, "request-frequency", "uniform", "activation-matrices", "fetch",
                 "whole experts cached by frequency in the request, prefetched by matching past requests"),
        Strategy("pregated", 0.0, "lru", "none", "next-router", "fetch",
                 "no cache, next layer prefetched"),
        Strategy("on-demand", 0.0, "lru", "none", "none", "fetch",
                 "no cache, no prefetch: every expert is fetched when it is needed"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the user wants. `auto` and None mean: decide from model and machine."""

    checkpoint: str
    device: Literal["auto", "cuda", "cpu"] = "auto"
    link: str = "auto"  # auto | disk | emulated:16GB/s | pcie3x16 | pcie4x16 | pcie5x16 …; cuda uses its own bus
    vram: str | int = "auto"  # bytes, "2GB", "2GiB", "50%" of what everything would need, "50% of experts"
    strategy: str = "moepic"
    split: float | None = None  # overrides the strategy's split ratio
    eviction: Literal["auto"] | EvictionName = "auto"
    prefetch: Literal["auto", "on", "off"] | int = "auto"  # or how many experts of the next layer are guessed
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    context_length: int | None = None  # tokens that KV memory is reserved for; None: up to 4096
    prefill_chunk: int = 512  # tokens per forward pass while the prompt is read
    revision: str | None = None
    packed_dir: str | None = None  # where the disk link keeps packed experts; None: a folder of the user's cache

    @classmethod
    def create(cls, **values: Any) -> Settings:
        """Settings from loose names (command line, page). Unknown names raise BadSettings with the nearest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise BadSettings(f"unknown setting '{name}'{nearest(name, names)} Allowed: {', '.join(names)}")
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """A copy with `changes`, checked as in `create`."""
        return Settings.create(**{**dataclasses.asdict(self), **changes})

    def __post_init__(self) -> None:
        _choice("strategy", self.strategy, STRATEGIES)
        _choice("device", self.device, ("auto", "cuda", "cpu"))
        _choice("eviction", self.eviction, ("auto", *get_args(EvictionName)))
        if isinstance(self.prefetch, str):
            _choice("prefetch", self.prefetch, ("auto", "on", "off"), " or a number of experts, 0 or more")
        elif isinstance(self.prefetch, bool) or self.prefetch < 0:
            raise BadSettings(f"prefetch {self.prefetch} is out of range; allowed: auto, on, off or 0 experts and more")
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.split is not None and not 0 <= self.split <= 1:
            raise BadSettings(f"split ratio {self.split} is out of range; allowed is 0 (nothing cached) to 1 (whole)")
        if self.prefill_chunk < 1:
            raise BadSettings(f"prefill_chunk {self.prefill_chunk} is too small; allowed is 1 token or more")
        if self.context_length is not None and self.context_length < 1:
            raise BadSettings(f"context_length {self.context_length} is too small; allowed is 1 token or more")

    def most_guesses(self, top_k: int) -> int:
        """Experts of the next layer that may be guessed where a token uses `top_k`. Raises BadSettings for more."""
        if isinstance(self.prefetch, str):
            return 0 if self.prefetch == "off" else top_k
        if self.prefetch > top_k:
            raise BadSettings(
                f"prefetch {self.prefetch} is more than the {top_k} experts that a token uses in a layer; "
                f"allowed is 0 to {top_k}, auto, on or off"
            )
        return self.prefetch


def _choice(name: str, value: str, allowed: Any, other: str = "") -> None:
    if value not in allowed:
        raise BadSettings(f"{name} '{value}' is unknown{nearest(value, allowed)} Allowed: {', '.join(allowed)}{other}")


@dataclass(frozen=True)
class LayerPlan:
    """One layer's share: `slots` tops of `top_rows` neurons stay on the device."""

    slots: int
    top_rows: int
    split_ratio: float  # top_rows / neurons


@dataclass(frozen=True)
class MemoryPlan:
    """Device bytes by kind. Their sum never exceeds `budget`."""

    resident: int
    kv: int
    workspace: int
    staging: int
    cache: int
    budget: int

    @property
    def used(self) -> int:
        return self.resident + self.kv + self.workspace + self.staging + self.cache

    @property
    def smallest(self) -> int:
        """Budget with no cached expert at all: below this nothing runs."""
        return self.used - self.cache


@dataclass(frozen=True)
class Plan:
    """What was decided. The only way into the engine."""

    layers: tuple[LayerPlan, ...]
    staging_records: int  # buffers of one whole expert each
    eviction: EvictionName
    predictor: PredictorName
    prefetch_depth: int  # experts guessed per layer, at most
    misses: MissHandling
    memory: MemoryPlan
    strategy: str
    reason: str  # why it looks like this, for people
    rounds: int = 0
    predicted: Breakdown | None = None  # of one token; None where nothing was measured to predict from
