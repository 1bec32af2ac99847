"""The configurator against exhaustive search and a dynamic program, and what holds for every frontier."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toy_routing import Toy, toy_costs, toy_layer, toy_trace

from moepic_core.allocation import dynamic_program, fixed_point
from moepic_core.cost_model import Pieces, layer_times, pieces, table, walk
from moepic_core.frontier import frontier
from moepic_core.geometry import record_stride, top_bytes
from moepic_core.shares import cache_bytes, equal_shares, shares_of
from moepic_core.split_search import WINDOWS, LayerOptions
from moepic_core.workload import Workload, replay, workload


def workload_of(toy: Toy, depth: int) -> Workload:
    return workload(replay(toy.trace, "lcp", "next-router"), depth)


def curves_of(toy: Toy, generator: np.random.Generator) -> np.ndarray:  # type: ignore[type-arg]
    """What each layer answers to budgets in steps of half an expert, with windows drawn at random."""
    work, steps = workload_of(toy, toy.top_k), 2 * toy.layer.num_experts
    step_bytes = -(-record_stride(toy.layer) // 2)
    curves = []
    for number, layer in enumerate(toy.layers):
        options = LayerOptions(work, number, layer, toy.costs, step_bytes, steps, None)
        curves.append(options.best(generator.uniform(0, options.windows[-1], (1, 20))).seconds[0])
    return np.stack(curves)


@pytest.mark.parametrize("window", [0, 3, 6])
@pytest.mark.parametrize("ratio", [0.7, 6])
def test_a_layers_best_split_is_that_of_exhaustive_search(window: int, ratio: float) -> None:
    """Subproblem 1: all numbers of slots and all rows, each token by itself."""
    layer = toy_layer(neurons=12, hidden=1024, num_experts=5)
    costs, trace = toy_costs(layer, 1, 2, ratio), toy_trace(4, 60, 1, 5, 2, accuracy=1.0)
    work = workload(replay(trace, "lcp", "next-router"), 2)
    step_bytes = layer.row_bytes  # three alignment units: every number of rows fills some budget
    options = LayerOptions(work, 0, layer, costs, step_bytes, 60, None)
    window_s = float(WINDOWS[window] * options.windows[-1])
    seconds, slots, rows = (part[1] for part in options.best(np.full((2, 7), [[0], [window_s]])))
    for steps in range(0, 61, 4):
        least = np.inf
        for count, cut in itertools.product(range(6), range(13)):
            if count * top_bytes(layer, cut) <= steps * step_bytes and (cut > 0) == (count > 0):
                size = Pieces(*(part[:, None] for part in pieces(layer, costs.layers[0], costs, np.array([cut]))))
                found = work.layers[0].found(np.array([count]))._replace(admitted=np.zeros(1, np.int64))
                times = layer_times(size, costs.layers[0].guess_s, costs, found, window_s)
                own_s = float((times.compute_s + times.stall_s).mean())
                # The layer before does not ask for guesses where all are resident.
                least = min(least, own_s - (costs.layers[0].guess_s if (count, cut) == (5, 12) else 0))
        assert seconds[steps] == pytest.approx(least), steps
        assert slots[steps] * top_bytes(layer, int(rows[steps])) <= steps * step_bytes


@pytest.mark.parametrize("ratio", [1, 3, 10])
def test_small_models_are_planned_as_by_exhaustive_search(ratio: float) -> None:
    """Every number of slots and rows in each of two layers, at every level."""
    layer = toy_layer(neurons=4, hidden=1024, num_experts=3)
    layers, costs, trace = (layer, layer), toy_costs(layer, 2, 2, ratio), toy_trace(6, 60, 2, 3, 2)
    work = workload(replay(trace, "lcp", "none"), 0)
    found = frontier([work], layers, costs, 6 * record_stride(layer), steps_per_layer=36)  # of one alignment unit
    choices = [(0, 0), *itertools.product(range(1, 4), range(1, 5))]
    plans = [shares_of(layers, *zip(*pair, strict=True)) for pair in itertools.product(choices, choices)]
    seconds = walk(work, layers, costs, *table(*plans)).total_s
    sizes = np.array([cache_bytes(layers, plan) for plan in plans])
    for level in range(len(found.way)):
        least = seconds[sizes <= level * found.level_bytes].min()
        way, row, _ = found.best(level * found.level_bytes)
        assert way.seconds[row] == pytest.approx(least, rel=1e-9), level


def test_moves_come_within_a_hundredth_of_the_dynamic_program() -> None:
    """Subproblem 2: 200 random models, over the same curves; almost none of them is convex."""
    excess, num_convex = [], 0
    for seed in range(200):
        toy, generator = Toy(seed), np.random.default_rng(seed)
        curves = curves_of(toy, generator)
        total = int(generator.integers(1, curves.shape[1] * len(curves)))
        (moved,), _ = fixed_point(curves, np.array([total]))
        exact, layers = dynamic_program(curves, total), np.arange(len(curves))
        excess.append(float(curves[layers, moved].sum() / curves[layers, exact].sum()) - 1)
        num_convex += bool((np.diff(curves, 2, axis=1) >= -1e-9 * curves.max()).all())
        assert moved.sum() <= total
    assert max(excess) <= 0.01
    assert num_convex < 20


@pytest.mark.parametrize("seed", range(12))
def test_what_holds_for_every_frontier(seed: int) -> None:
    toy = Toy(seed)
    work = workload_of(toy, toy.top_k)
    whole = toy.needs.everything - toy.staged
    found = frontier([work, work.without_guesses()], toy.layers, toy.costs, whole)
    seconds = []
    for room in range(0, whole, max(1, whole // 40)):
        levels, row, way = found.best(room)
        shares = shares_of(toy.layers, levels.slots[row].tolist(), levels.rows[row].tolist())
        assert cache_bytes(toy.layers, shares) <= room
        used = (work, work.without_guesses())[way]
        assert levels.seconds[row] == pytest.approx(float(walk(used, toy.layers, toy.costs, *table(shares)).total_s[0]))
        seconds.append(levels.seconds[row])
        assert 1 <= levels.rounds <= 4
    assert (np.diff(seconds) <= 0).all(), "more memory, slower"


@pytest.mark.parametrize("seed", range(12))
def test_a_level_is_planned_alike_whatever_the_room(seed: int) -> None:
    toy = Toy(seed)
    work, whole = workload_of(toy, toy.top_k), toy.needs.everything - toy.staged
    large, small = (frontier([work], toy.layers, toy.costs, room) for room in (whole, whole // 3))
    for room in range(0, whole // 3, max(1, whole // 30)):
        (levels, row, _), (others, other, _) = large.best(room), small.best(room)
        assert levels.seconds[row] == others.seconds[other]
        assert levels.slots[row].tolist() == others.slots[other].tolist()


def test_a_fixed_split_is_kept() -> None:
    toy = Toy(8)
    rows = [max(1, toy.layer.neurons // 3)] * len(toy.layers)
    room = (toy.needs.everything - toy.staged) // 2
    levels, row, _ = frontier([workload_of(toy, toy.top_k)], toy.layers, toy.costs, room, rows).best(room)
    assert levels.rows[row].tolist() == rows
    assert levels.slots[row].sum() > 0


def test_layers_that_need_memory_more_get_more() -> None:
    """One layer asks for the same two experts at every token, the other for any of sixteen."""
    layer = toy_layer(16, 256, 16)
    trace, costs = toy_trace(2, 200, 2, 16, 2, accuracy=0), toy_costs(layer, 2, 2, 3)
    experts = trace.experts.copy()
    experts[:, 0] = [4, 9]
    work = workload(replay(type(trace)(experts, trace.guesses, *list(vars(trace).values())[2:]), "lcp", "none"), 0)
    room = 10 * record_stride(layer)
    levels, row, _ = frontier([work], (layer, layer), costs, room).best(room)
    assert levels.slots[row][0] == 2 and levels.slots[row][1] >= 8
    equal = walk(work, (layer, layer), costs, *table(equal_shares((layer, layer), 1.0, room))).total_s[0]
    assert levels.seconds[row] < 0.95 * equal
