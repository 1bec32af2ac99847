"""How much memory a model takes and a budget may have, from headers alone. Pure; before and after loading alike.

The engine checks with it before it reads a weight, the command line and the page show it before anything is loaded.
Weights and KV are upper estimates here; the engine replaces them by what it measures.
"""

from __future__ import annotations

from .budgets import HEADROOM, Needs, budget_bytes
from .errors import BadSettings, OutOfRoom
from .links import Link
from .spec import DeviceKind, MachineProfile, ModelSpec, Settings
from .units import format_bytes

DEFAULT_CONTEXT = 4096  # tokens that KV memory is reserved for when the user does not say
CUDA_LIBRARY_BYTES = 32 << 20  # cuBLAS workspaces


def context_length(settings: Settings, spec: ModelSpec) -> int:
    """Tokens that fit, prompt and reply together. Raises BadSettings past what the model was made for."""
    if settings.context_length is None:
        return min(DEFAULT_CONTEXT, spec.context_length)
    if settings.context_length > spec.context_length:
        raise BadSettings(f"context_length {settings.context_length} is more than the model's {spec.context_length}")
    return settings.context_length


def needs_of(settings: Settings, spec: ModelSpec, machine: MachineProfile) -> Needs:
    """Device bytes by kind from headers alone: upper estimates, so that a budget that they allow loads. One layer's KV
    counts twice, since growing it copies it.
    """
    context = context_length(settings, spec)
    kv = (spec.kv_bytes_per_token + spec.kv_largest_layer_bytes) * context + spec.state_bytes
    workspace = workspace_bytes(settings, spec, context, machine.device)
    return Needs(spec.moe_layers, spec.top_k, spec.resident_bytes + spec.added_bytes, kv, workspace)


def workspace_bytes(settings: Settings, spec: ModelSpec, context: int, device: DeviceKind) -> int:
    """Device bytes of activations at their largest, for one prefill chunk (an upper estimate, ours).

    Counts the (token, k) sums in float32 twice, 32 hidden-sized tensors, 8 neuron-sized ones, one attention mask, three
    rows of logits, and on CUDA what its libraries take.
    """
    chunk = min(settings.prefill_chunk, context)
    itemsize = max(layer.itemsize for layer in spec.moe_layers)
    neurons = max(layer.neurons for layer in spec.moe_layers)
    per_token = 8 * spec.top_k * spec.hidden + 32 * spec.hidden * itemsize + 8 * neurons * itemsize + 4 * context
    return chunk * per_token + 12 * spec.vocab_size + (CUDA_LIBRARY_BYTES if device == "cuda" else 0)


def check_memory(settings: Settings, spec: ModelSpec, machine: MachineProfile, link: Link) -> None:
    """Refuses early, from headers alone, what cannot work: a budget below the smallest, host memory for the store,
    more guesses than a token uses experts.
    """
    settings.most_guesses(spec.top_k)
    budget_bytes(settings.vram, needs_of(settings, spec, machine), free_for_budget(machine, link, spec))
    if link.kind != "disk" and spec.host_bytes > machine.host_free_bytes:
        raise OutOfRoom(
            f"the host copy of the weights needs {format_bytes(spec.host_bytes)} of host memory and "
            f"{format_bytes(machine.host_free_bytes)} is free; use link 'disk' (device cpu), close other "
            f"programs or choose a smaller checkpoint"
        )


def free_for_budget(machine: MachineProfile, link: Link, spec: ModelSpec) -> int:
    """Bytes that budget `auto` may take: what was free before loading, less headroom, less the copy in the same
    memory.
    """
    copy = spec.host_bytes if link.kind == "emulated" else 0
    return max(0, int(machine.device_free_bytes * HEADROOM) - copy)
