"""A residency over tiny random experts with a transfer that tests drive by hand, and the slow reference beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from null_transfer import NullTransfer
from torch import Tensor

from moepic_core.arena import Arena
from moepic_core.budgets import Needs
from moepic_core.expert_math import ExpertMath, PairSum
from moepic_core.geometry import record_stride, top_rows
from moepic_core.packing import FusedLayout
from moepic_core.ram_store import RamStore
from moepic_core.residency import Residency
from moepic_core.spec import ModelSpec, MoeLayer, Plan, Settings
from moepic_core.step import Step
from moepic_core.telemetry import Telemetry
from moepic_core.transfer.base import Transfer
from moepic_core.uniform import uniform_plan

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2


def model_spec(num_layers: int = NUM_LAYERS, neurons: int = 40, hidden: int = 32) -> ModelSpec:
    """A checkpoint that exists only as numbers; a record is more than one alignment unit long."""
    layer = [MoeLayer(number, NUM_EXPERTS, neurons, hidden, 3, 4) for number in range(num_layers)]
    return ModelSpec(
        path="/nowhere/tiny", name="tiny", model_type="none", architecture="None", dtype="float32",
        num_layers=num_layers, moe_layers=tuple(layer), top_k=TOP_K, hidden=hidden, vocab_size=64, context_length=64,
        resident_bytes=0, kv_bytes_per_token=0, num_parameters=0, active_parameters=0, file_bytes=0, shards=(),
        fingerprint="0" * 16,
    )  # fmt: skip


class Rig:
    """One residency, its experts' weights in the clear, and a forward pass of one layer."""

    def __init__(
        self, transfer: Transfer | None = None, room_records: int = 100, split: float | None = 0.4, neurons: int = 40
    ) -> None:
        self.spec = model_spec(neurons=neurons)
        generator = torch.Generator().manual_seed(1)
        layout, store = FusedLayout(), RamStore(self.spec, torch.float32, pinned=False)
        self.fused: list[dict[str, Tensor]] = []
        for position, layer in enumerate(self.spec.moe_layers):
            shapes = layout.shapes(layer)
            self.fused.append({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
            for name, tensor in self.fused[-1].items():
                store.add(position, name, tensor, layout)
        store.seal()
        self.transfer = transfer if transfer is not None else NullTransfer()
        self.needs = Needs(self.spec.moe_layers, TOP_K, resident=0, kv=0, workspace=0)
        self.telemetry = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K)
        plan = self.plan(room_records, split)
        self.arena = Arena(torch.device("cpu"), plan.memory.budget)
        self.stopped = False
        self.residency = Residency(
            self.spec.moe_layers, torch.float32, store, self.transfer, self.arena, self.telemetry, lambda: self.stopped
        )
        self.residency.apply(plan)
        self.telemetry.set_phase("idle")
        self.telemetry.begin_reply(0.0, 1, 0)
        self.math = ExpertMath(combine=lambda gate, up: F.silu(gate) * up, activation=None)

    def plan(self, room_records: float, split: float | None = 0.4, **settings: object) -> Plan:
        """The uniform plan with cache room for this many whole experts."""
        budget = self.needs.fixed + int((self.needs.staging_records + room_records) * self.needs.record)
        return uniform_plan(Settings.create(checkpoint="tiny", split=split, **settings), self.needs, budget)

    def run(self, layer: int, x: Tensor, routes: Tensor, weights: Tensor, guesses: list[int] | None = None) -> Tensor:
        """x `[tokens, hidden]`, routes and weights `[tokens, k]`: the layer's output, with a prefetch of the next."""
        counts = {int(expert): int((routes == expert).sum()) for expert in routes.unique()}
        total = PairSum(x, routes)
        with Step(self.residency, layer, counts) as step:
            if guesses:
                self.residency.prefetch((layer + 1) % NUM_LAYERS, guesses)
            for piece in step:
                pairs = (routes.reshape(-1) == piece.expert).nonzero()[:, 0]
                if x.shape[0] == 1:
                    total.add(self.math.segment(x, piece.weights, piece.expert, piece.start_row), int(pairs[0]))
                else:
                    total.add(self.math.segment(x[pairs // TOP_K], piece.weights, piece.expert, piece.start_row), pairs)
        return total.total(weights, None)

    def reference(self, layer: int, x: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
        """The same by the book: every token, every expert, whole matrices."""
        gate_up, down = self.fused[layer]["gate_up_proj"], self.fused[layer]["down_proj"]
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for place in range(TOP_K):
                expert = int(routes[token, place])
                gate, up = F.linear(x[token], gate_up[expert]).chunk(2)
                out[token] += weights[token, place] * F.linear(F.silu(gate) * up, down[expert])
        return out

    @property
    def top_rows(self) -> int:
        return top_rows(self.spec.moe_layers[0], 0.4)

    @property
    def record_bytes(self) -> int:
        return record_stride(self.spec.moe_layers[0])


def inputs(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x `[tokens, hidden]`, routes `[tokens, k]` of distinct experts, weights `[tokens, k]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=generator)
    scores = torch.rand(tokens, NUM_EXPERTS, generator=generator)
    weights, routes = scores.topk(TOP_K, dim=-1)
    return x, routes, weights
