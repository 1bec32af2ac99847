"""`moepic inspect`: what a checkpoint holds, and whether it runs here. Reads config and headers, no weights."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ..spec import MachineProfile, ModelSpec
from ..units import format_bytes
from .options import add_checkpoint, settings_of

HELP = "what a checkpoint holds, and whether it runs here"


def add_options(command: argparse.ArgumentParser) -> None:
    add_checkpoint(command)


def run(options: argparse.Namespace) -> None:
    from ..calibrate import probe
    from ..checkpoint import read_spec
    from ..finder import resolve
    from ..hf.loading import check_family
    from ..needs import needs_of
    from ..verdict import judge

    settings = settings_of(options)
    spec = read_spec(resolve(settings.checkpoint, settings.revision), settings.dtype)
    check_family(spec)
    machine = probe(settings.device)
    needs = needs_of(settings, spec, machine)
    verdict = judge(spec, needs, machine, settings.link)
    if options.json:
        print(json.dumps({
            "model": {**dataclasses.asdict(spec), "expert_bytes": spec.expert_bytes},
            "machine": dataclasses.asdict(machine),
            "smallest_budget_bytes": needs.smallest,
            "everything_bytes": needs.everything,
            "verdict": dataclasses.asdict(verdict),
        }))  # fmt: skip
        return
    for line in _inspection(spec, machine):
        print(line)
    print(f"smallest budget  {format_bytes(needs.smallest)}, everything resident {format_bytes(needs.everything)}")
    print(f"verdict          {verdict.text}")


def _embedding(spec: ModelSpec) -> str:
    if spec.embedding_bytes:
        return f"{format_bytes(spec.embedding_bytes)} on the host tier, since a token reads one row of it"
    return "among the other weights"


def _inspection(spec: ModelSpec, machine: MachineProfile) -> list[str]:
    first = spec.moe_layers[0]
    return [
        f"{spec.name}  ({spec.architecture}, {spec.dtype}, {len(spec.shards)} files, {format_bytes(spec.file_bytes)})",
        f"parameters       {spec.num_parameters / 1e9:.3g} B, {spec.active_parameters / 1e9:.3g} B used per token",
        f"layers           {spec.num_layers}, of which {len(spec.moe_layers)} with experts",
        f"experts          {first.num_experts} per layer, {spec.top_k} per token, {first.neurons} neurons each, "
        f"{format_bytes(first.expert_bytes)}",
        f"expert weights   {format_bytes(spec.expert_bytes)}",
        f"other weights    {format_bytes(spec.resident_bytes)}",
        f"token embedding  {_embedding(spec)}",
        f"KV per token     {format_bytes(spec.kv_bytes_per_token)} (estimate), context {spec.context_length} tokens",
        f"machine          {machine.device_name}, {format_bytes(machine.device_free_bytes)} of "
        f"{format_bytes(machine.device_total_bytes)} free, host {format_bytes(machine.host_free_bytes)} free",
    ]
