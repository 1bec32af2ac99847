"""Segments add up to what `eager` computes, whatever the family's arithmetic, the split and the order of arrival."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepic_core.expert_math import ExpertMath, PairSum, padded

EXPERTS, NEURONS, HIDDEN, TOKENS, TOP_K = 5, 24, 16, 7, 3
TOLERANCE = 1e-6  # of the largest value, float32: sums of 24 products in another order


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    """The gate of gpt_oss: nothing like activation(gate) · up."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def biases(seed: int, width: int = NEURONS) -> Tensor:
    return random(EXPERTS, width, seed=seed)


KINDS = {
    "gated": ExpertMath(lambda gate, up: F.silu(gate) * up, None),
    "gated with biases": ExpertMath(lambda gate, up: F.gelu(gate) * up, None, biases(1), biases(2), biases(3, HIDDEN)),
    "clamped with biases": ExpertMath(clamped, None, 5 * biases(1), 5 * biases(2), biases(3, HIDDEN)),
    "gated, one bias": ExpertMath(lambda gate, up: F.silu(gate) * up, None, None, biases(2), None),
    "ungated": ExpertMath(None, squared_relu),
    "ungated with biases": ExpertMath(None, squared_relu, None, biases(2), biases(3, HIDDEN)),
}
X, WEIGHTS = random(TOKENS, HIDDEN, seed=4), random(TOKENS, TOP_K, seed=5).softmax(-1)
ROUTES = random(TOKENS, EXPERTS, seed=6).topk(TOP_K).indices  # [tokens, k]


def records_of(math: ExpertMath) -> Tensor:
    """`[experts, neurons, matrices, hidden]`"""
    return random(EXPERTS, NEURONS, 2 if math.combine is None else 3, HIDDEN, seed=7) / 2


def eager(math: ExpertMath, records: Tensor) -> Tensor:
    """Every token and expert by the book, with whole matrices in float64."""

    def project(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return matrix.double() @ x.double() + (0 if bias is None else bias.double())

    def bias_of(biases: Tensor | None, expert: int) -> Tensor | None:
        return None if biases is None else biases[expert]

    out = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for place, expert in enumerate(ROUTES[token].tolist()):
            *into, down = records[expert].unbind(1)
            up = project(X[token], into[-1], bias_of(math.up_bias, expert))
            if math.combine is None:
                inner = math.activation(up)
            else:
                inner = math.combine(project(X[token], into[0], bias_of(math.gate_bias, expert)), up)
            out[token] += WEIGHTS[token, place] * project(inner, down.T, bias_of(math.down_bias, expert))
    return out


def run(math: ExpertMath, records: Tensor, cuts: list[int], one_by_one: bool) -> Tensor:
    """The sum over segments that end at `cuts`; token by token as in decoding, or all at once as in prefill."""
    outputs = []
    for tokens in [[token] for token in range(TOKENS)] if one_by_one else [list(range(TOKENS))]:
        x, routes = X[tokens].to(records.dtype), ROUTES[tokens]
        total = PairSum(x, routes)
        for expert in routes.unique().tolist():
            pairs = (routes.reshape(-1) == expert).nonzero()[:, 0]
            for start, stop in zip([0, *cuts], [*cuts, NEURONS], strict=True):
                if start < stop:
                    y = math.segment(x[pairs // TOP_K], records[expert, start:stop], expert, start)
                    total.add(y, int(pairs) if one_by_one else pairs)
        outputs.append(total.total(WEIGHTS[tokens], math.down_bias))
    return torch.cat(outputs)


@pytest.mark.parametrize("one_by_one", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("cuts", [[], [1], [10], [NEURONS - 1], [5, 17]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_segments_add_up_to_eager(kind: str, cuts: list[int], one_by_one: bool) -> None:
    math = KINDS[kind]
    records = records_of(math)
    expected, found = eager(math, records), run(math, records, cuts, one_by_one)
    error = (found.double() - expected).abs() / expected.abs().max()
    assert error.max() < TOLERANCE, f"largest relative difference {error.max():.1e}, mean {error.mean():.1e}"


@pytest.mark.parametrize("one_by_one", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("kind", ["gated", "clamped with biases", "ungated"])
def test_half_precision_stays_near_eager(kind: str, one_by_one: bool) -> None:
    """Of one token the last product is a sum of rows."""
    math, cuts = KINDS[kind], [10]
    records = records_of(math).bfloat16()
    rounded = ExpertMath(math.combine, math.activation)
    expected, found = eager(rounded, records), run(rounded, records, cuts, one_by_one)
    error = (found.double() - expected).abs() / expected.abs().max()
    assert error.max() < 0.02, f"largest relative difference {error.max():.1e}, mean {error.mean():.1e}"


def test_an_expert_of_one_token_in_a_prompt_adds_what_it_adds_alone() -> None:
    math, x = KINDS["gated"], X[:2].bfloat16()
    weights = records_of(math).bfloat16()[0]
    alone, together = PairSum(x[:1], torch.tensor([[0]])), PairSum(x, torch.tensor([[0], [1]]))
    alone.add(math.segment(x[:1], weights, 0, 0), 0)
    together.add(math.segment(math.gather(x, torch.tensor([0])), weights, 0, 0), torch.tensor([0]))
    assert torch.equal(alone.total(torch.ones(1, 1), None), together.total(torch.ones(2, 1), None)[:1])


def test_a_segment_reads_a_strided_record_in_place() -> None:
    """The residency hands out views of a record; copies of its matrices give the same bits."""
    math = KINDS["gated"]
    record = records_of(math)[0]
    assert not record[:, 0].is_contiguous()
    contiguous = torch.stack([record[:, matrix].clone() for matrix in range(3)], dim=1)
    assert torch.equal(math.segment(X, record, 0, 0), math.segment(X, contiguous, 0, 0))


values = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(
    st.lists(st.tuples(values, values, values), min_size=2, max_size=2),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_two_segments_arrive_in_either_order_and_by_either_path(
    parts: list[tuple[float, ...]], dtype: torch.dtype
) -> None:
    first, second = (torch.tensor([part], dtype=dtype) for part in parts)
    sums = []
    for order in ((first, second), (second, first)):
        for tokens, place in ((1, 1), (2, torch.tensor([1]))):  # decoding names the pair by number, prefill by index
            total = PairSum(torch.zeros(tokens, 3, dtype=dtype), torch.tensor([[4, 2]] * tokens))
            for y in order:
                total.add(y, place)
            sums.append(total.total(torch.tensor([[2.0, 1.0]] * tokens), None)[0])
    assert all(torch.equal(row, sums[0]) for row in sums), sums
    assert torch.equal(sums[0], (first[0].float() + second[0].float()).to(dtype))


def test_the_total_weighs_in_float32_and_rounds_once() -> None:
    """256 + 1 + 1 is 258 in bfloat16, but 256 if every step were rounded."""
    x, routes = torch.zeros(1, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2]])
    total = PairSum(x, routes)
    for place, value in enumerate((512.0, 2.0, 2.0)):
        total.add(torch.tensor([[value]], dtype=torch.bfloat16), place)
    answer = total.total(torch.full((1, 3), 0.5, dtype=torch.bfloat16), None)
    assert answer.dtype == torch.bfloat16
    assert answer.item() == 258.0


def test_the_down_bias_is_weighted_and_counts_once_per_expert() -> None:
    x, routes = torch.zeros(2, 2), torch.tensor([[0, 1], [2, 0]])
    total = PairSum(x, routes)
    for _ in range(2):  # two segments of every pair
        total.add(torch.ones(4, 2), torch.arange(4))
    answer = total.total(
        torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    )
    assert answer.tolist() == [[0.5 * 3 + 0.25 * 12, 0.5 * 4 + 0.25 * 22], [102.0 + 2 * 3, 202.0 + 2 * 4]]


def test_pairs_that_nobody_computed_stay_zero() -> None:
    assert not PairSum(torch.ones(2, 4), torch.tensor([[0, 1], [1, 0]])).total(torch.ones(2, 2), None).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_pad_a_product_are_never_added(dtype: torch.dtype) -> None:
    """Five tokens of an expert run as six; the sixth is nobody's."""
    math, hidden_states = KINDS["gated"], torch.ones(7, X.shape[1], dtype=dtype)
    x = math.gather(hidden_states, torch.tensor([6, 0, 3, 4, 5]))
    assert x.shape[0] == (5 if dtype == torch.float32 else 6)
    total = PairSum(hidden_states, torch.zeros(7, 1, dtype=torch.int64))
    total.add(x, torch.tensor([6, 0, 3, 4, 5]))
    assert total.total(torch.ones(7, 1), None)[:, 0].tolist() == [1, 0, 0, 1, 1, 1, 1]


def test_few_numbers_of_rows_serve_all_prompts() -> None:
    sizes = [padded(rows) for rows in range(1, 513)]
    assert all(rows <= size < rows * 3 / 2 for rows, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
