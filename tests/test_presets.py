"""Presets against published figures, and estimated costs against sums by hand."""

from __future__ import annotations

import pytest

from moepic_core.budgets import budget_bytes
from moepic_core.errors import BadSettings
from moepic_core.needs import CUDA_LIBRARY_BYTES
from moepic_core.presets import (
    EFFICIENCY,
    MACHINES,
    MODELS,
    Machine,
    Model,
    costs_for,
    machine_named,
    model_named,
    needs_for,
    profile_of,
    spec_of,
)
from moepic_core.simulator import simulate
from moepic_core.spec import STRATEGIES, Settings
from moepic_core.synthetic import trace_for
from moepic_core.uniform import uniform_plan

# In billions, as their makers state them: all parameters, active ones (embedding and head counted or not).
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "qwen3-30b-a3b": (30.5, 3.3),
    "gpt-oss-20b": (20.9, 3.6 + 0.58),  # the published 3.6 and 5.1 leave the embedding out
    "gpt-oss-120b": (116.8, 5.1 + 0.58),
    "deepseek-v2-lite": (15.7, 2.4 + 0.21),  # likewise
}


def test_every_model_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones(name: str) -> None:
    spec = spec_of(MODELS[name])
    total, active = PUBLISHED[name]
    assert spec.num_parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert spec.active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert spec.num_parameters * 2 == spec.resident_bytes + spec.host_bytes == spec.file_bytes


def test_the_papers_expert() -> None:
    """17.3 MB each, 24 layers of 60 (arXiv 2509.08342)."""
    spec = spec_of(MODELS["qwen1.5-moe-a2.7b"])
    assert spec.record_bytes_max == 17_301_504
    assert [layer.num_experts for layer in spec.moe_layers] == [60] * 24


def test_layers_of_experts_follow_the_dense_ones() -> None:
    spec = spec_of(MODELS["deepseek-v2-lite"])
    assert (spec.num_layers, len(spec.moe_layers)) == (27, 26)
    assert [layer.decoder_layer for layer in spec.moe_layers] == list(range(1, 27))


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("mixtral-8x7b", 32 * 2 * 8 * 128 * 2),
        ("qwen3-30b-a3b", 48 * 2 * 4 * 128 * 2),
        ("deepseek-v2-lite", 27 * (512 + 64) * 2),
    ],
)
def test_kv_memory(name: str, kv_bytes: int) -> None:
    assert spec_of(MODELS[name]).kv_bytes_per_token == kv_bytes


def test_needs_follow_the_rules_for_checkpoints() -> None:
    model, machine = MODELS["mixtral-8x7b"], MACHINES["rtx4090"]
    needs, spec = needs_for(model, machine, context_length=8192), spec_of(model)
    assert needs.layers == spec.moe_layers
    assert needs.resident == spec.resident_bytes
    assert needs.kv == 8192 * spec.kv_bytes_per_token
    assert needs.workspace > CUDA_LIBRARY_BYTES
    assert budget_bytes("auto", needs, profile_of(machine).device_free_bytes) == 24 << 30
    with pytest.raises(BadSettings, match="context_length 99999 is more than the model's 32768"):
        needs_for(model, machine, context_length=99_999)


TOY = Model("toy", "Toy", 3, 4, 2, neurons=100, hidden=10, vocab_size=1000, context_length=64, attention_weights=4000,
            kv_values=2, shared_weights=600, num_dense_layers=1, dense_weights=8000)  # fmt: skip
BENCH = Machine("bench", "Bench", 10**9, 2000 / EFFICIENCY, "pcie4x16", link_latency_s=1e-5, op_s=0.0)


def test_costs_are_bytes_over_bandwidth() -> None:
    """The toy card reads 1000 weights per second, and launches take no time."""
    costs = costs_for(TOY, BENCH)
    attention_s, router_s, shared_s, dense_s = 4.0 + 2 * 1.024, 0.04, 0.6, 8.0
    first, second = costs.layers
    assert second.before_s == pytest.approx(attention_s + router_s + shared_s)
    assert first.before_s == pytest.approx(second.before_s + attention_s + dense_s)
    assert (second.step_s, second.segment_s) == (0, 0)
    assert second.guess_s == pytest.approx(router_s)
    assert second.row_s == pytest.approx(0.03)
    assert second.admit_s * 1000 == pytest.approx(1.0)  # 500 weights, read and written
    assert costs.after_s == pytest.approx(10.0)
    assert (costs.link_bytes_per_s, costs.link_latency_s, costs.source) == (25e9, 1e-5, "estimated")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_estimates_are_plausible(model: Model, machine: Machine) -> None:
    costs = costs_for(model, machine)
    compute_s = costs.after_s + sum(
        layer.before_s + layer.step_s + model.top_k * (layer.segment_s + model.neurons * layer.row_s)
        for layer in costs.layers
    )
    floor_s = spec_of(model).active_parameters * 2 / machine.memory_bytes_per_s  # no product is faster than memory
    assert floor_s < compute_s < 12 * floor_s
    assert machine.link in ("pcie4x8", "pcie4x16", "pcie5x16")


def test_a_preset_runs_through_planner_and_simulator() -> None:
    model, machine = MODELS["qwen1.5-moe-a2.7b"], MACHINES["a6000"]
    needs, costs, trace = needs_for(model, machine), costs_for(model, machine), trace_for(model, 30)
    tpot_s = {}
    for strategy in ("pregated", "mixtral-offloading", "on-demand"):
        settings = Settings.create(checkpoint=model.name, strategy=strategy)
        plan = uniform_plan(settings, needs, 16 * 10**9)
        result = simulate(trace, plan, costs, needs.layers)
        assert result.source == (
            "simulated, costs estimated, trace synthetic: Qwen1.5-MoE-A2.7B, popularity 0.45, locality 0.6, seed 0"
        )
        tpot_s[strategy] = result.tpot_s
    assert set(tpot_s) <= set(STRATEGIES)
    assert tpot_s["mixtral-offloading"] < tpot_s["pregated"] < tpot_s["on-demand"]


def test_unknown_names_offer_the_nearest() -> None:
    assert machine_named("rtx4090").title == "RTX 4090 24 GB"
    assert model_named("gpt-oss-20b").top_k == 4
    with pytest.raises(BadSettings, match="machine 'rtx409' is unknown, did you mean 'rtx4090'"):
        machine_named("rtx409")
    with pytest.raises(BadSettings, match="model 'qwen3-30b' is unknown, did you mean 'qwen3-30b-a3b'"):
        model_named("qwen3-30b")
