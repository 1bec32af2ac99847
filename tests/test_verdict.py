"""The three steps of the verdict, at their exact borders, for a GPU and for a machine with one memory."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from moepic_core.budgets import HEADROOM, Needs
from moepic_core.spec import DeviceKind, MachineProfile, ModelSpec, MoeLayer
from moepic_core.verdict import judge

LAYER = MoeLayer(0, num_experts=8, neurons=64, hidden=64, matrices=3, itemsize=4)  # records of 49152 bytes, exactly
SPEC = ModelSpec(
    path="/models/tiny", name="tiny", model_type="tiny", architecture="Tiny", dtype="float32", num_layers=1,
    moe_layers=(LAYER,), top_k=2, hidden=64, vocab_size=100, context_length=512, resident_bytes=900_000,
    kv_bytes_per_token=1, num_parameters=1, active_parameters=1, file_bytes=1, shards=("a",), fingerprint="f",
)  # fmt: skip
NEEDS = Needs((LAYER,), top_k=2, resident=900_000, kv=90_000, workspace=10_000)
EXPERTS = 8 * 49152
SMALLEST, EVERYTHING = 1_000_000 + 2 * 49152, 1_000_000 + 4 * 49152 + EXPERTS
WHOLE = ceil(EVERYTHING / HEADROOM)  # free memory of which a budget may take EVERYTHING
WHOLE_TWICE = ceil((EVERYTHING + EXPERTS) / HEADROOM)


def machine(device: DeviceKind, free: int, host_free: int | None = None) -> MachineProfile:
    return MachineProfile(device, "test", 10**9, free, 10**9, free if host_free is None else host_free, 4)


@pytest.mark.parametrize(
    ("device", "link", "free", "host_free", "step"),
    [
        ("cuda", "auto", WHOLE, EXPERTS, "fits whole"),
        ("cuda", "auto", WHOLE - 1, EXPERTS, "fits with offloading"),
        ("cuda", "auto", SMALLEST, EXPERTS, "fits with offloading"),
        ("cuda", "auto", SMALLEST - 1, EXPERTS, "will not run"),
        ("cuda", "auto", WHOLE, EXPERTS - 1, "will not run"),
        ("cpu", "disk", WHOLE, None, "fits whole"),
        ("cpu", "disk", WHOLE - 1, None, "fits with offloading"),
        ("cpu", "disk", SMALLEST, None, "fits with offloading"),
        ("cpu", "disk", SMALLEST - 1, None, "will not run"),
        ("cpu", "pcie4x16", WHOLE_TWICE, None, "fits whole"),  # the host's copy is in the same memory
        ("cpu", "pcie4x16", WHOLE_TWICE - 1, None, "fits with offloading"),
        ("cpu", "pcie4x16", SMALLEST + EXPERTS, None, "fits with offloading"),
        ("cpu", "pcie4x16", SMALLEST + EXPERTS - 1, None, "will not run"),
    ],
)
def test_steps(device: DeviceKind, link: str, free: int, host_free: int | None, step: str) -> None:
    assert (NEEDS.smallest, NEEDS.everything) == (SMALLEST, EVERYTHING)
    verdict = judge(SPEC, NEEDS, machine(device, free, host_free), link)
    assert verdict.step == step
    assert verdict.text.startswith(step)
    assert "\n" not in verdict.text


def test_sentences_name_the_numbers() -> None:
    def text(device: DeviceKind, free: int, host_free: int, link: str = "auto") -> str:
        return judge(SPEC, NEEDS, machine(device, free, host_free), link).text

    assert text("cuda", 2_000_000, EXPERTS) == "fits whole: 1.59 MB of 2 MB free"
    assert text("cuda", 1_200_000, EXPERTS) == (
        "fits with offloading: any budget from 1.1 MB works, 1.2 MB is free, 1.59 MB would hold everything"
    )
    assert text("cuda", 1_000_000, EXPERTS) == (
        "will not run: even without any cached expert it needs 1.1 MB, 1 MB is free"
    )
    assert text("cpu", 1_300_000, 1_300_000, "pcie3x16") == (
        "will not run over this link: its host copy needs 393 kB of host memory, 202 kB is free; "
        "a CPU device with link 'disk' needs none"
    )


def test_a_larger_context_changes_the_verdict() -> None:
    profile = machine("cuda", WHOLE, EXPERTS)
    assert judge(SPEC, NEEDS, profile, "auto").step == "fits whole"
    assert judge(SPEC, replace(NEEDS, kv=90_002), profile, "auto").step == "fits with offloading"
