"""Graphics cards and models by name, for the simulator: what a plan would do where nothing can be measured.

Command line and figures ask for a `ModelSpec`, a `MachineProfile`, `Needs` and `Costs` and use them like real ones;
whatever follows from them is labelled "estimated". Cards are their makers' data sheets, models are their public
configs, and a test holds parameter counts to the published ones. Times are bytes over a share of the memory bandwidth,
plus a fixed time per launched operation (ours): right for comparing strategies on a card, not for comparing products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .budgets import Needs
from .costs import Costs, LayerCosts
from .errors import BadSettings, nearest
from .links import PRESETS_BYTES_PER_S
from .needs import needs_of
from .spec import MachineProfile, ModelSpec, MoeLayer, Settings

EFFICIENCY = 0.8  # share of the memory bandwidth that products of one vector and a matrix of some MB reach
ITEMSIZE = 2  # bfloat16; gpt-oss too, which is published in 4 bits, because the engine runs no packed formats yet
CHUNK_BYTES = 4 << 20  # as `transfer.cuda` cuts
CONTEXT_TOKENS = 1024  # whose keys and values a token reads
HOST_BYTES = 512 << 30  # a host is assumed that holds all experts of every model here

# Operations that decoding one token launches one after the other, rounded.
_OPS_ATTENTION = 35  # two norms, four projections, rotary embedding, KV update, attention, residual sums
_OPS_MLP = 6
_OPS_ROUTER = 5
_OPS_STEP = 10  # routes to the host, partial results, weighted sum
_OPS_SEGMENT = 5
_OPS_TRANSFER = 3  # a copy, and an event on either side
_OPS_AFTER = 20  # norm, head, sampling, embedding


@dataclass(frozen=True)
class Machine:
    """A graphics card on its usual slot. Marked ≈ are figures that no data sheet gives."""

    name: str
    title: str
    vram_bytes: int
    memory_bytes_per_s: float
    link: str  # of `links.PRESETS_BYTES_PER_S`: payload from pinned memory, ≈ 80 % of the nominal rate
    link_latency_s: float = 10e-6  # ≈ launch and completion of one transfer
    op_s: float = 6e-6  # ≈ launch of one operation by PyTorch, without graphs


@dataclass(frozen=True)
class Model:
    """The numbers of a public config that sizes follow from. Counts of weights include biases and norms."""

    name: str
    title: str
    num_layers: int
    num_experts: int
    top_k: int
    neurons: int  # of one routed expert
    hidden: int
    vocab_size: int
    context_length: int
    attention_weights: int  # per layer, with both norms
    kv_values: int  # per layer and token, as Transformers keeps them
    shared_weights: int = 0  # per MoE layer: shared experts and their gate
    bias_weights: int = 0  # per MoE layer: of router and experts
    num_dense_layers: int = 0  # the first ones
    dense_weights: int = 0  # of the MLP of a dense layer

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def router_weights(self) -> int:
        return self.num_experts * self.hidden

    @property
    def expert_weights(self) -> int:
        """Of one routed expert: gate, up and down."""
        return 3 * self.hidden * self.neurons

    @property
    def resident_weights(self) -> int:
        """All but routed experts; embedding and head are two matrices in every model here, the former on the host."""
        moe_layer = self.router_weights + self.shared_weights + self.bias_weights
        return (
            self.num_layers * self.attention_weights
            + self.num_moe_layers * moe_layer
            + self.num_dense_layers * self.dense_weights
            + (2 * self.vocab_size + 1) * self.hidden
        )

    def num_parameters(self, experts_per_layer: int) -> int:
        """With this many routed experts in each layer: all of them, or the active ones."""
        return self.resident_weights + self.num_moe_layers * experts_per_layer * self.expert_weights


def _grouped(hidden: int, heads: int, kv_heads: int, head_dim: int, extra: int = 0) -> dict[str, int]:
    """Attention with grouped queries: q, k, v, o and two norms; `extra` for biases and what else is small."""
    projections = hidden * head_dim * 2 * (heads + kv_heads)
    return {"attention_weights": projections + 2 * hidden + extra, "kv_values": 2 * kv_heads * head_dim}


def _latent(hidden: int, heads: int, latent: int, nope: int, rope: int, value: int) -> dict[str, int]:
    """DeepSeek's latent attention without a query latent; the latent and one rotary key are kept."""
    query, down = hidden * heads * (nope + rope), hidden * (latent + rope)
    up, out = latent * heads * (nope + value), heads * value * hidden
    return {"attention_weights": query + down + up + out + latent + 2 * hidden, "kv_values": latent + rope}


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("rtx3060", "RTX 3060 12 GB", 12 << 30, 360e9, "pcie4x16"),
        Machine("rtx4060", "RTX 4060 8 GB", 8 << 30, 272e9, "pcie4x8"),  # the card has eight lanes
        Machine("rtx4090", "RTX 4090 24 GB", 24 << 30, 1008e9, "pcie4x16"),
        Machine("rtx5090", "RTX 5090 32 GB", 32 << 30, 1792e9, "pcie5x16"),
        Machine("a6000", "RTX A6000 48 GB", 48 << 30, 768e9, "pcie4x16"),  # the paper's (arXiv 2509.08342)
    )
}
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("mixtral-8x7b", "Mixtral-8x7B", 32, 8, 2, 14336, 4096, 32000, 32768, **_grouped(4096, 32, 8, 128)),
        Model("qwen1.5-moe-a2.7b", "Qwen1.5-MoE-A2.7B", 24, 60, 4, 1408, 2048, 151936, 8192,
              **_grouped(2048, 16, 16, 128, extra=3 * 2048), shared_weights=3 * 2048 * 5632 + 2048),
        Model("qwen3-30b-a3b", "Qwen3-30B-A3B", 48, 128, 8, 768, 2048, 151936, 40960,
              **_grouped(2048, 32, 4, 128, extra=2 * 128)),
        Model("gpt-oss-20b", "gpt-oss-20b in bf16", 24, 32, 4, 2880, 2880, 201088, 131072,
              **_grouped(2880, 64, 8, 64, extra=80 * 64 + 2880 + 64), bias_weights=32 * (3 * 2880 + 1)),
        Model("gpt-oss-120b", "gpt-oss-120b in bf16", 36, 128, 4, 2880, 2880, 201088, 131072,
              **_grouped(2880, 64, 8, 64, extra=80 * 64 + 2880 + 64), bias_weights=128 * (3 * 2880 + 1)),
        Model("deepseek-v2-lite", "DeepSeek-V2-Lite", 27, 64, 6, 1408, 2048, 102400, 163840,
              **_latent(2048, 16, 512, 128, 64, 128), shared_weights=3 * 2048 * 2 * 1408,
              num_dense_layers=1, dense_weights=3 * 2048 * 10944),
    )
}  # fmt: skip


def machine_named(name: str) -> Machine:
    """Raises BadSettings for a name that is no preset."""
    if name not in MACHINES:
        raise BadSettings(f"machine '{name}' is unknown{nearest(name, MACHINES)} Allowed: {', '.join(MACHINES)}")
    return MACHINES[name]


def model_named(name: str) -> Model:
    """Raises BadSettings for a name that is no preset."""
    if name not in MODELS:
        raise BadSettings(f"model '{name}' is unknown{nearest(name, MODELS)} Allowed: {', '.join(MODELS)}")
    return MODELS[name]


def spec_of(model: Model) -> ModelSpec:
    """What `checkpoint` would read from the model's headers, but for files."""
    first, itemsize = model.num_dense_layers, ITEMSIZE
    layers = tuple(
        MoeLayer(number, model.num_experts, model.neurons, model.hidden, 3, itemsize)
        for number in range(first, model.num_layers)
    )
    num_parameters = model.num_parameters(model.num_experts)
    return ModelSpec(
        path="", name=model.title, model_type="preset", architecture="preset", dtype="bfloat16",
        num_layers=model.num_layers, moe_layers=layers, top_k=model.top_k, hidden=model.hidden,
        vocab_size=model.vocab_size, context_length=model.context_length,
        resident_bytes=(model.resident_weights - model.vocab_size * model.hidden) * itemsize,
        kv_bytes_per_token=model.num_layers * model.kv_values * itemsize, num_parameters=num_parameters,
        active_parameters=model.num_parameters(model.top_k), file_bytes=num_parameters * itemsize, shards=(),
        fingerprint=f"preset {model.name}", token_tables=("model.embed_tokens.weight", "lm_head.weight"),
    )  # fmt: skip


def profile_of(machine: Machine) -> MachineProfile:
    """The card with all of its memory free."""
    rate = PRESETS_BYTES_PER_S[machine.link]
    return MachineProfile(
        device="cuda", device_name=machine.title, device_total_bytes=machine.vram_bytes,
        device_free_bytes=machine.vram_bytes, host_total_bytes=HOST_BYTES, host_free_bytes=HOST_BYTES, cpu_cores=8,
        link_bytes_per_s=rate, link_contended_bytes_per_s=rate,
    )  # fmt: skip


def needs_for(model: Model, machine: Machine, context_length: int | None = None) -> Needs:
    """Device bytes by kind, by the rules that hold for checkpoints. Raises BadSettings for too long a context."""
    settings = Settings.create(checkpoint=model.name, context_length=context_length)
    return needs_of(settings, spec_of(model), profile_of(machine))


def costs_for(model: Model, machine: Machine) -> Costs:
    """Seconds of a decode step, estimated: weights and KV read once, and every operation's launch, one after the
    other.
    """

    def seconds(num_weights: float, num_ops: int) -> float:
        return num_weights * ITEMSIZE / (machine.memory_bytes_per_s * EFFICIENCY) + num_ops * machine.op_s

    attention_s = seconds(model.attention_weights + model.kv_values * CONTEXT_TOKENS, _OPS_ATTENTION)
    router_s = seconds(model.router_weights, _OPS_ROUTER)
    shared_s = seconds(model.shared_weights, _OPS_MLP) if model.shared_weights else 0.0
    dense_s = attention_s + seconds(model.dense_weights, _OPS_MLP)
    layer = LayerCosts(
        before_s=attention_s + router_s + shared_s,
        step_s=seconds(0, _OPS_STEP),
        guess_s=router_s,
        segment_s=seconds(0, _OPS_SEGMENT),
        row_s=seconds(3 * model.hidden, 0),
        admit_s=seconds(2 / ITEMSIZE, 0),  # each byte is read and written
        transfer_s=seconds(0, _OPS_TRANSFER),
    )
    first = replace(layer, before_s=layer.before_s + model.num_dense_layers * dense_s)
    return Costs(
        layers=(first, *[layer] * (model.num_moe_layers - 1)),
        after_s=seconds(model.vocab_size * model.hidden, _OPS_AFTER),
        link_bytes_per_s=PRESETS_BYTES_PER_S[machine.link],
        link_latency_s=machine.link_latency_s,
        chunk_bytes=CHUNK_BYTES,
        source="estimated",
    )
