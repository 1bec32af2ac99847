"""metrics.py: every figure follows from the trace by its formula, and every figure is in the table."""

import dataclasses

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moepic_core.metrics import METRICS, Counters, Figures, Reply, Snapshot
from moepic_core.spec import LayerPlan
from moepic_core.telemetry import EventKind, Outcome, Part, Telemetry
from moepic_core.trace import TracePhase

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 7, 2
HIT, PARTIAL, MISS = Outcome.HIT, Outcome.PARTIAL, Outcome.MISS


def first_credit(events):
    """Seconds of each transfer that no transfer recorded before it covers, by the elementary spans of time."""
    bounds = np.unique(np.concatenate((events["start_s"], events["end_s"])))
    covers = (events["start_s"][:, None] <= bounds[:-1]) & (events["end_s"][:, None] >= bounds[1:])  # [events, spans]
    covers &= np.isin(events["kind"], (EventKind.DEMAND, EventKind.PREFETCH))[:, None]
    return (covers & (covers.cumsum(axis=0) == 1)) @ np.diff(bounds)


def select(rows, reply=None, phases=(TracePhase.PREFILL, TracePhase.DECODE), layer=None):
    chosen = np.isin(rows["phase"], phases)
    if reply is not None:
        chosen &= rows["reply"] == reply
    if layer is not None:
        chosen &= rows["layer"] == layer
    return chosen


def recompute(trace, **wanted):
    """Every formula of METRICS over the wanted rows; None where it is undefined."""
    chosen = select(trace.events, **wanted)
    events, routing = trace.events[chosen], trace.routing[select(trace.routing, **wanted)]
    names = {
        "np": np, "routing": routing, "outcomes": routing["outcomes"], "counts": routing["counts"],
        "kind": events["kind"], "nbytes": events["nbytes"], "end_s": events["end_s"],
        "seconds": events["end_s"] - events["start_s"], "credit": first_credit(trace.events)[chosen],
        "num_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS,
        **EventKind.__members__, **Outcome.__members__,
    }  # fmt: skip
    for metric in METRICS:
        if metric.formula:
            try:
                value = eval(metric.formula, names)
                names[metric.name] = value.item() if isinstance(value, np.generic) else value
            except (ZeroDivisionError, IndexError, ValueError, TypeError):
                names[metric.name] = None
    return names


def assert_figures(figures, names):
    for metric in METRICS:
        if metric.formula and hasattr(figures, metric.name):
            told = getattr(figures, metric.name)
            assert told == names[metric.name], f"{metric.name}: {told}, from the trace {names[metric.name]}"


def assert_recomputable(telemetry):
    """Snapshot and trace agree: last reply and session, each phase and both, each layer and all.

    Exactly so: the tests' times are multiples of 1/16 s, whose sums and differences are not rounded.
    """
    snapshot, trace = telemetry.snapshot(), telemetry.trace()
    assert (trace.lost_events, trace.lost_routing) == (0, 0)
    number = snapshot.reply.number if snapshot.reply else 0
    for scope, reply in ((snapshot.last_reply, number), (snapshot.session, None)):
        for counters, phases in (
            (scope.prefill, [TracePhase.PREFILL]),
            (scope.decode, [TracePhase.DECODE]),
            (scope.both, list(TracePhase)),
        ):
            names = recompute(trace, reply=reply, phases=phases)
            assert_figures(counters.total, names)
            np.testing.assert_array_equal(counters.activations, names["activations"])
            for layer, figures in enumerate(counters.layers):
                assert_figures(figures, recompute(trace, reply=reply, phases=phases, layer=layer))
    if snapshot.reply:
        assert_figures(snapshot.reply, recompute(trace, reply=number))


def short_conversation():
    """Two replies by hand."""
    telemetry = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K)
    event = telemetry.event
    for reply in range(2):
        t, token = 10.0 * reply, 10 * reply
        telemetry.begin_reply(t, prompt_tokens=6 + reply, cached_prompt_tokens=2 + reply)
        telemetry.layer_step(0, token, [0, 3, 5], [MISS, HIT, MISS], [4, 3, 1])
        telemetry.read_prompt(4)
        event(EventKind.DEMAND, 0, 0, Part.WHOLE, t, t + 1, 800, token)
        event(EventKind.STALL, 0, 0, Part.WHOLE, t + 0.5, t + 1, 0, token)
        telemetry.new_token(token + 3, t + 2)
        event(EventKind.PREFETCH, 1, 2, Part.BOTTOM, t + 2, t + 4, 500, token + 4)  # demand overtakes it
        event(EventKind.DEMAND, 2, 6, Part.TOP, t + 3, t + 3.5, 300, token + 4)
        event(EventKind.STALL, 2, 6, Part.TOP, t + 3.25, t + 3.5, 0, token + 4)
        event(EventKind.COMPUTE, 2, 6, Part.TOP, t + 3.5, t + 3.625, 0, token + 4)
        event(EventKind.USED, 1, 2, Part.BOTTOM, t + 4, t + 4, 400, token + 4)
        event(EventKind.WASTED, 1, 2, Part.BOTTOM, t + 4, t + 4, 100, token + 4)
        telemetry.layer_step(1, token + 4, [2, 4], [PARTIAL, HIT], [1, 1])
        telemetry.layer_step(2, token + 4, [6, 1], [MISS, HIT], [1, 1])
        telemetry.new_token(token + 4, t + 4)
        telemetry.new_token(token + 5, t + 4.5 + reply)
        telemetry.end_reply()
        telemetry.check()
    return telemetry


def test_figures_of_a_short_conversation():
    snapshot = short_conversation().snapshot()
    assert (snapshot.phase, snapshot.version) == ("idle", 34)
    assert snapshot.reply == Reply(2, 7, 3, read_prompt_tokens=4, new_tokens=3, ttft_s=2.0, decode_s=3.5)
    assert (snapshot.reply.prefill_progress, snapshot.reply.tpot_s) == (1.0, 1.75)
    assert snapshot.reply.tokens_per_s == 2 / 3.5
    one_reply = Figures(1, 1, 2, 300, 500, 400, 100, stall_s=0.25, link_busy_s=2.0)
    assert snapshot.last_reply.decode.total == one_reply
    assert snapshot.last_reply.prefill.total == Figures(5, 0, 3, 800, 0, 0, 0, stall_s=0.5, link_busy_s=1.0)
    both = snapshot.session.both.total
    assert both == Figures(12, 2, 10, 2200, 1000, 800, 200, stall_s=1.5, link_busy_s=6.0)
    assert (both.uses, both.hit_rate, both.partial_hit_rate, both.miss_rate) == (24, 10 / 24, 2 / 24, 12 / 24)
    assert (both.prefetch_accuracy, both.overlap) == (0.8, 0.75)
    assert snapshot.last_reply.decode.layers[2] == Figures(1, 0, 1, 300, 0, 0, 0, stall_s=0.25, link_busy_s=0.0)
    assert snapshot.session.prefill.activations.tolist() == [[8, 0, 0, 6, 0, 2, 0], [0] * 7, [0] * 7]


def test_every_formula_is_defined_and_agrees():
    telemetry = short_conversation()
    names = recompute(telemetry.trace(), reply=2)
    assert [metric.name for metric in METRICS if metric.formula and names[metric.name] is None] == []
    assert_recomputable(telemetry)


def test_overlap_is_never_negative():
    assert Figures(0, 0, 0, 0, 0, 0, 0, stall_s=1.5, link_busy_s=1.0).overlap == 0.0


class Serving(RuleBasedStateMachine):
    """Any order of calls: the counters never contradict themselves and always follow from the trace."""

    def __init__(self):
        super().__init__()
        self.telemetry = Telemetry(NUM_LAYERS, NUM_EXPERTS, TOP_K)
        self.now, self.token, self.replying, self.version = 0.0, 0, False, -1

    @rule()
    def begin_reply(self):
        self.telemetry.begin_reply(self.now, 9, 4)
        self.replying = True

    @precondition(lambda self: self.replying)
    @rule(eighths=st.integers(0, 40))
    def new_token(self, eighths):
        self.now += eighths / 8
        self.token += 1
        self.telemetry.new_token(self.token, self.now)

    @rule()
    def end_reply(self):
        self.telemetry.end_reply()
        self.replying = False

    @rule(
        layer=st.integers(0, NUM_LAYERS - 1),
        experts=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
        data=st.data(),
    )
    def layer_step(self, layer, experts, data):
        def column(values):
            return data.draw(st.lists(values, min_size=len(experts), max_size=len(experts)))

        outcomes, counts = column(st.sampled_from(Outcome)), column(st.integers(1, 99))
        self.telemetry.layer_step(layer, self.token, experts, outcomes, counts)

    @rule(
        kind=st.sampled_from([kind for kind in EventKind if kind is not EventKind.TOKEN]),
        layer=st.integers(0, NUM_LAYERS - 1),
        start=st.integers(0, 80),
        length=st.integers(0, 30),
        nbytes=st.integers(0, 10**12),
    )
    def event(self, kind, layer, start, length, nbytes):
        self.telemetry.event(kind, layer, 0, Part.TOP, start / 8, (start + length) / 8, nbytes, self.token)

    @invariant()
    def consistent(self):
        self.telemetry.check()
        assert self.telemetry.version > self.version
        self.version = self.telemetry.version

    def teardown(self):
        assert_recomputable(self.telemetry)


Serving.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


def test_every_public_figure_is_in_the_table():
    def figures(owner):
        fields = {field.name for field in dataclasses.fields(owner)}
        return fields | {name for name in vars(owner) if isinstance(vars(owner)[name], property)}

    containers = {"version", "reply", "last_reply", "session", "plan", "number", "top_rows"}
    shown = figures(Figures) | figures(Reply) | figures(Snapshot) | figures(LayerPlan) | {"activations"}
    assert sorted(metric.name for metric in METRICS) == sorted(shown - containers)
    assert all(metric.unit and metric.definition.endswith(".") for metric in METRICS)
    assert "activations" in {field.name for field in dataclasses.fields(Counters)}
