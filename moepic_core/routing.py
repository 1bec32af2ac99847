"""Which experts every token used, layer by layer, and which were guessed: `RoutingTrace`.

Recorded while serving (`telemetry`, `trace_file`) or made up (`synthetic`); read by hit curves, cost model, planner and
simulator. Decode tokens only, in the order in which they were made. Pure arrays: no file, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

UNKNOWN = "unknown"  # the subject of what was made in chats, which nobody has named
BROUGHT = "brought"  # that of what came with a checkpoint, if nobody has named it there


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """`experts[t, l]` are the experts that token t used in MoE layer l; `guesses[t, l]` what was predicted for them."""

    experts: NDArray[np.int16]  # [tokens, layers, k], -1 where a token used fewer
    guesses: NDArray[np.int16]  # [tokens, layers, depth], best first, -1 where there was none
    num_experts: tuple[int, ...]  # per layer
    replies: NDArray[np.int32]  # [tokens], number of the reply that a token belongs to, never falling
    subjects: NDArray[np.int16]  # [tokens], index into `subject_names`; all 0 where subjects are unknown
    subject_names: tuple[str, ...]
    source: str  # for people: "recorded from demo-moe", "synthetic: …"

    def __post_init__(self) -> None:
        tokens, layers, _ = self.experts.shape
        assert self.guesses.shape[:2] == (tokens, layers), (self.guesses.shape, self.experts.shape)
        assert len(self.num_experts) == layers, (len(self.num_experts), layers)
        assert self.replies.shape == self.subjects.shape == (tokens,), (self.replies.shape, self.subjects.shape, tokens)
        for array in (self.experts, self.guesses, self.replies, self.subjects):
            array.setflags(write=False)

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    def last(self, tokens: int) -> RoutingTrace:
        """The newest `tokens` tokens."""
        start = max(0, self.num_tokens - tokens)
        return RoutingTrace(
            self.experts[start:], self.guesses[start:], self.num_experts, self.replies[start:], self.subjects[start:],
            self.subject_names, self.source,
        )  # fmt: skip

    def first(self, tokens: int) -> RoutingTrace:
        """The oldest `tokens` tokens."""
        return replace(
            self, experts=self.experts[:tokens], guesses=self.guesses[:tokens], replies=self.replies[:tokens],
            subjects=self.subjects[:tokens],
        )  # fmt: skip

    def of_layers(self, layers: Sequence[int]) -> RoutingTrace:
        """The same tokens in some of the layers."""
        return replace(
            self, experts=self.experts[:, layers], guesses=self.guesses[:, layers],
            num_experts=tuple(self.num_experts[layer] for layer in layers),
        )  # fmt: skip


def joined(earlier: RoutingTrace, later: RoutingTrace) -> RoutingTrace:
    """One trace after the other, of the same model. Replies and subjects keep their order and names."""
    names = tuple(dict.fromkeys((*earlier.subject_names, *later.subject_names)))
    first = int(earlier.replies.max(initial=0)) + 1
    places = [np.array([names.index(name) for name in trace.subject_names], np.int16) for trace in (earlier, later)]
    return RoutingTrace(
        _stacked(earlier.experts, later.experts),
        _stacked(earlier.guesses, later.guesses),
        later.num_experts,
        np.concatenate((earlier.replies, later.replies + first)),
        np.concatenate((places[0][earlier.subjects], places[1][later.subjects])),
        names,
        later.source,
    )


def _stacked(first: NDArray[np.int16], second: NDArray[np.int16]) -> NDArray[np.int16]:
    """One below the other, the narrower one padded with -1."""
    width = max(first.shape[2], second.shape[2])
    pad = [np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[2])), constant_values=-1) for part in (first, second)]
    return np.concatenate(pad)
