"""From a checkpoint's name to the parts of an engine: finds, checks, reads, packs and probes. Called by `Engine.load`.

Everything that can be refused is refused from headers alone, before a weight is read. When something fails, nothing is
left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .arena import Arena, is_out_of_memory
from .budgets import Needs, budget_bytes
from .calibrate import probe
from .checkpoint import read_spec
from .disk_store import DiskStore, default_packed_folder
from .errors import BadCheckpoint, OutOfRoom
from .extras import brought_routing
from .finder import resolve
from .hf.embedding import bring_rows
from .hf.experts import ExpertLayer, install, router_of
from .hf.loading import load_model
from .hf.model import HfModel
from .hf.probe import probe_model, silence_experts
from .hf.text import Text
from .host_store import HostStore
from .lazy_tensors import AHEAD_BYTES, LazyTensors
from .links import Link, parse_link
from .memory import Memory
from .needs import check_memory, context_length, free_for_budget, workspace_bytes
from .ram_store import RamStore
from .residency import Residency
from .shards import read_tensors
from .spec import MachineProfile, ModelSpec, Settings
from .steering import Steering
from .telemetry import Telemetry
from .transfer.base import Transfer
from .turn import Turn

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Parts:
    settings: Settings  # as the model allows them
    spec: ModelSpec
    machine: MachineProfile
    link: Link
    hf: HfModel
    text: Text
    residency: Residency
    needs: Needs
    steering: Steering
    notices: tuple[str, ...]
    turn: Turn
    context_length: int


def assemble(
    settings: Settings, progress: Progress | None, cancelled: Callable[[], bool] | None, memory: Memory
) -> Parts:
    """Loads the checkpoint that `settings` name. Raises a MoepicError with one sentence."""
    path = resolve(settings.checkpoint, settings.revision)
    spec = read_spec(path, settings.dtype)
    machine = probe(settings.device)
    link = parse_link(settings.link, machine.device)
    check_memory(settings, spec, machine, link)
    device, dtype = torch.device(machine.device), getattr(torch, spec.dtype)
    headers = read_tensors(path)
    total, read = sum(info.num_bytes for info in headers.values()), 0

    def count(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress is not None:
            progress(read, total)

    store: HostStore
    if link.kind == "disk":
        store = DiskStore(spec, dtype, Path(settings.packed_dir or default_packed_folder()).expanduser())
    else:
        store = RamStore(spec, dtype, pinned=link.kind == "bus")
    try:
        # Where the packed file is there already, most of the checkpoint will not be read.
        tensors = LazyTensors(headers, count, cancelled, 0 if store.complete else AHEAD_BYTES)
        model, modules = load_model(spec, tensors, store, device)
        tensors.close()
        bring_rows(model, spec, tensors, device, link.kind == "disk")
        if link.kind == "disk":
            tensors.forget()
        return _connect(settings, spec, machine, link, store, model, modules, memory)
    except BaseException as error:
        store.close()
        if is_out_of_memory(error):
            raise OutOfRoom(
                f"memory ran out while {spec.name} was loading; close other programs that use it, shorten the context, "
                f"or use device cpu with link 'disk'"
            ) from error
        raise


def _connect(
    settings: Settings,
    spec: ModelSpec,
    machine: MachineProfile,
    link: Link,
    store: HostStore,
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    memory: Memory,
) -> Parts:
    """Joins the loaded model, its store and a residency."""
    device = torch.device(machine.device)
    hf = HfModel(model, device)
    stays = bool(spec.token_tables) and hf.embedding is None
    if stays:
        spec = spec.with_embedding_on_device()
    text = Text(spec.path, model.generation_config)
    layers = [
        ExpertLayer(module, geometry, router_of(model, path, geometry, spec.top_k))
        for (path, module), geometry in zip(modules.items(), spec.moe_layers, strict=True)
    ]
    context = context_length(settings, spec)
    silence_experts(model, modules.values())
    found = probe_model(hf, context)
    hf.continues = found.continues
    if not found.continues:
        settings = settings.replace(prefill_chunk=context)
    workspace = workspace_bytes(settings, spec, context, machine.device)
    needs = Needs(spec.moe_layers, spec.top_k, hf.resident_bytes(), found.kv_bytes, workspace)
    arena = Arena(device, budget_bytes(settings.vram, needs, free_for_budget(machine, link, spec)))
    for kind, nbytes in (("resident", needs.resident), ("kv", needs.kv), ("workspace", needs.workspace)):
        arena.reserve(kind, nbytes)
    telemetry = Telemetry(len(layers), max(layer.num_experts for layer in spec.moe_layers), spec.top_k)
    notices = _notices(spec, store, layers, found.continues, stays)
    try:
        brought = brought_routing(spec)
    except BadCheckpoint as error:  # planning does without it
        brought, notices = None, (*notices, f"routing that came with the checkpoint is not used: {error}")
    steering = Steering(spec, machine, link.label, needs, telemetry, memory, brought)
    turn, dtype, transfer = Turn(), getattr(torch, spec.dtype), _transfer(link, device)  # threads last of all
    residency = Residency(spec.moe_layers, dtype, store, transfer, arena, telemetry, turn.stop.is_set)
    install(model, layers, list(modules.values()), residency)
    return Parts(settings, spec, machine, link, hf, text, residency, needs, steering, notices, turn, context)


def _notices(
    spec: ModelSpec, store: HostStore, layers: list[ExpertLayer], continues: bool, stays: bool
) -> tuple[str, ...]:
    """What the user should know about this model for as long as it is loaded."""
    notices = [store.notice] if store.notice else []
    if any(layer.router is None for layer in layers):
        notices.append(f"{spec.architecture}: no router was found beside some experts, so those are not prefetched")
    if stays:
        notices.append(
            f"{spec.architecture}: the token embedding is more than a lookup, so it stays on the device, which the "
            f"needs that were shown before loading did not count"
        )
    if not continues:
        notices.append(
            f"{spec.architecture} cannot continue a prompt in Transformers: prompts run in one pass, and every "
            f"turn reads the whole conversation again"
        )
    return tuple(notices)


def _transfer(link: Link, device: torch.device) -> Transfer:
    if device.type == "cuda":
        from .transfer.cuda import CudaTransfer

        return CudaTransfer(device)
    if link.bytes_per_s is not None:
        from .transfer.emulated import EmulatedTransfer

        return EmulatedTransfer(link.bytes_per_s)
    from .transfer.thread import ThreadTransfer

    return ThreadTransfer(num_workers=2)
