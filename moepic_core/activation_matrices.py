"""Guessing experts from past requests: an activation matrix per request, and the past one most like the current.

The predictor of MoE-Infinity as we read it (arXiv 2401.14361). `residency` and `simulator` say when a request begins
and which experts each layer used, and ask for a layer's likely experts, best first; what is fetched is their decision.
All counting is exact. Knows no scores: `predictor` keeps the accuracy of every kind of guess.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

MAX_MATRICES = 100


class ActivationMatrices:
    """Activation counts of past requests, and how like each of them the current request is so far.

    The likeness of two matrices is the mean over layers of the cosine between their rows; rows of which nothing is
    known yet count 0. It is kept up to date layer by layer: an observation costs one sum over the k rows it touches.
    """

    def __init__(self, num_experts: Sequence[int], max_matrices: int = MAX_MATRICES) -> None:
        shape = (len(num_experts), max(num_experts))
        self._past = np.zeros((*shape, max_matrices), np.float32)  # counts; experts' rows are contiguous in memory
        self._norms = np.ones((shape[0], max_matrices))  # of the past rows, 1 for a row without activations
        self._num_past = 0
        self._current = np.zeros(shape)  # counts of the current request
        self._products = np.zeros((shape[0], max_matrices))  # of past rows and current ones
        self._cosines = np.zeros((shape[0], max_matrices))

    def begin_request(self) -> None:
        """Files the matrix of the request that ends, unless it is empty. When all places are taken, it replaces the
        one that it is most like, so that the collection stays diverse (ours).
        """
        if self._current.any():
            if self._num_past < self._past.shape[2]:
                place = self._num_past
                self._num_past += 1
            else:
                place = self._most_like()
            self._past[:, :, place] = self._current
            norms = np.linalg.norm(self._current, axis=1)
            self._norms[:, place] = np.where(norms > 0, norms, 1)
        self._current[:] = self._products[:] = self._cosines[:] = 0

    def observe(self, layer: int, experts: Collection[int]) -> None:
        """One more token of the current request used the distinct `experts` in `layer`."""
        used, row = list(experts), self._current[layer]
        if not used:
            return
        row[used] += 1
        self._products[layer] += self._past[layer, used].sum(axis=0)
        np.divide(self._products[layer], self._norms[layer] * np.sqrt(row @ row), out=self._cosines[layer])

    def rank(self, layer: int) -> list[int]:
        """Experts that the past request most like this one used in `layer`, most used first, lowest id among equals.

        Empty before the second request. Among equally similar requests the one filed first answers.
        """
        if self._num_past == 0:
            return []
        counts = self._past[layer, :, self._most_like()]
        order = np.argsort(-counts, kind="stable")
        ranked: list[int] = order[: np.count_nonzero(counts)].tolist()
        return ranked

    def check(self) -> None:
        """Raise AssertionError with both sides if the likeness kept contradicts the matrices."""
        products = np.einsum("lem,le->lm", self._past, self._current)
        norms = np.linalg.norm(self._past, axis=1)
        assert np.array_equal(products, self._products), f"products {self._products}, the matrices say {products}"
        kept = np.where(norms > 0, self._norms, 0)
        assert np.allclose(kept, norms), f"norms {kept}, the matrices say {norms}"
        lengths = np.maximum(np.linalg.norm(self._current, axis=1, keepdims=True), 1)
        cosines = products / (self._norms * lengths)
        assert np.allclose(cosines, self._cosines), f"cosines {self._cosines}, the matrices say {cosines}"
        filed = np.flatnonzero(self._past.any(axis=(0, 1))).tolist()
        assert filed == list(range(self._num_past)), f"matrices at {filed}, {self._num_past} are counted"

    def _most_like(self) -> int:
        return int(self._cosines[:, : self._num_past].sum(axis=0).argmax())
