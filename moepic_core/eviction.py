"""Who leaves when a layer's cache is full: LCP, LRU, LFU and their kin behind one contract.

`residency` and `simulator` keep one policy per layer, tell it every activation, and ask it for a victim; `hit_curves`
asks only for the order.
A policy knows expert ids and token numbers, nothing of bytes, slots or tensors: admission is its callers' business.
Promise: the same history gives the same victim everywhere; among equals the lowest expert id leaves.
Token numbers are counted by the caller over the whole session and never go back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from math import inf, log2
from typing import Protocol

from .errors import BadSettings, nearest

LCP_OMEGA = 128  # tokens (arXiv 2509.08342)
LCP_RHO = 0.25  # what is left of a priority after LCP_OMEGA idle tokens (arXiv 2509.08342)


class EvictionPolicy(Protocol):
    """Memory of one layer's activations, and the order in which its experts would be forgotten.

    Only touching an expert moves it in that order, and only a new request changes it otherwise: time alone does not.
    """

    def begin_request(self) -> None:
        """A new reply begins. Most policies remember across requests and take no notice."""

    def touch(self, expert: int, now: int, count: int = 1) -> None:
        """Token number `now` activated `expert`; in prefill `now` is the chunk's last token, `count` how many did."""

    def victim(self, candidates: Collection[int], now: int) -> int:
        """The candidate with the least priority at token number `now`; the lowest id among equals."""

    def priority(self, expert: int, now: int) -> float:
        """Higher stays longer, minus infinity for never activated. Comparable within one policy and one `now` only.

        Any `now` will do, a past one too: all of them give the same order.
        """

    def ranking(self, now: int) -> list[int]:
        """All experts ever activated, best first: what to pre-warm, and what to keep when the cache shrinks."""

    def check(self) -> None:
        """Raise AssertionError with both sides if the bookkeeping contradicts itself."""


class _KeyedPolicy(ABC):
    """A policy whose order changes only for the expert that is touched, so that one stored key per expert suffices.

    The keys are a plain list: a victim among 8, 64 or 256 candidates takes 1, 3 or 10 µs, which NumPy beats only beyond
    64, and touching costs a quarter of a microsecond.
    """

    def __init__(self, num_experts: int) -> None:
        self._counts: list[float] = [0] * num_experts
        self._last = [-1] * num_experts
        self._keys = [-inf] * num_experts

    @abstractmethod
    def _key(self, count: float, last: int) -> float:
        """What an expert is worth after `count` activations, the last one at token number `last`."""

    def begin_request(self) -> None:
        return

    def touch(self, expert: int, now: int, count: int = 1) -> None:
        assert now >= self._last[expert], f"expert {expert} touched at token {now} after token {self._last[expert]}"
        self._counts[expert] += count
        self._last[expert] = now
        self._keys[expert] = self._key(self._counts[expert], now)

    def victim(self, candidates: Collection[int], now: int) -> int:
        assert candidates, f"no candidate to forget at token {now}"
        return min(sorted(candidates), key=self._keys.__getitem__)  # min keeps the first of equals

    def priority(self, expert: int, now: int) -> float:
        return self._keys[expert]

    def ranking(self, now: int) -> list[int]:
        touched = [expert for expert, count in enumerate(self._counts) if count]
        return sorted(touched, key=self._keys.__getitem__, reverse=True)  # a stable sort: equals stay in order of id

    def check(self) -> None:
        for expert, (count, last, key) in enumerate(zip(self._counts, self._last, self._keys, strict=True)):
            assert (count == 0) == (last == -1), f"expert {expert}: {count} activations, the last at token {last}"
            wanted = self._key(count, last) if count else -inf
            assert key == wanted, f"expert {expert}: key {key}, its history says {wanted}"


class Lcp(_KeyedPolicy):
    """Least Cache Priority, P = μ · ρ^(ν/ω) (arXiv 2509.08342): μ activations so far, ν tokens since the last one.

    Compared as log₂ P = log₂ μ − c·(now − last) with c = −log₂(ρ)/ω, which never underflows however long an expert
    idles. The term c·now is common to all experts, so the order needs only the key log₂ μ + c·last (ours).
    """

    _DECAY_PER_TOKEN = -log2(LCP_RHO) / LCP_OMEGA  # a power of two: keys that tie in theory tie in floating point

    def _key(self, count: float, last: int) -> float:
        return log2(count) + self._DECAY_PER_TOKEN * last

    def priority(self, expert: int, now: int) -> float:
        """log₂ P at token number `now`."""
        return self._keys[expert] - self._DECAY_PER_TOKEN * now


class LcpAged(Lcp):
    """LCP whose μ ages too: P = Σ ρ^((now − tᵢ)/ω) over an expert's activations tᵢ, each of which fades alike (ours).

    In the paper's formula only the pause since the last activation fades, and the next activation takes it all back:
    an expert of the morning's subject returns from a single stray one with its whole lifetime's μ, and outranks what
    the new subject uses until that has been used as often. Here it returns with what is left of μ, which in decode
    never exceeds 1 / (1 − ρ^(1/ω)) = 93. μ is brought up to date when its expert is touched and P falls as before in
    between, so the key is LCP's and only the touched expert's changes. A case of LRFU (Lee et al., IEEE Transactions
    on Computers 50(12), 2001).
    """

    def touch(self, expert: int, now: int, count: int = 1) -> None:
        self._counts[expert] *= LCP_RHO ** ((now - self._last[expert]) / LCP_OMEGA)
        super().touch(expert, now, count)


class Lru(_KeyedPolicy):
    """Least recently used: the priority is the token number of the last activation."""

    def _key(self, count: float, last: int) -> float:
        return last


class Lfu(_KeyedPolicy):
    """Least frequently used: the priority is the number of activations so far."""

    def _key(self, count: float, last: int) -> float:
        return count


class RequestFrequency(Lfu):
    """An expert's share of the current request's activations, as we read MoE-Infinity (arXiv 2401.14361).

    Within one layer the order of shares is the order of counts: LFU that forgets everything when a request begins.
    """

    def begin_request(self) -> None:
        super().__init__(len(self._keys))


_POLICIES: dict[str, type[_KeyedPolicy]] = {
    "lcp": Lcp,
    "lcp-aged": LcpAged,
    "lru": Lru,
    "lfu": Lfu,
    "request-frequency": RequestFrequency,
}


def make_policy(name: str, num_experts: int) -> EvictionPolicy:
    """A fresh policy for a layer of `num_experts` experts; `name` is one of EvictionName, else BadSettings."""
    if name not in _POLICIES:
        allowed = ", ".join(_POLICIES)
        raise BadSettings(f"eviction policy '{name}' is unknown{nearest(name, _POLICIES)} Allowed: {allowed}")
    return _POLICIES[name](num_experts)
