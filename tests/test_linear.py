"""Quickened layers answer like Transformers' own, for one token and for many, and only those change that gain by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moepic_core.hf import linear
from moepic_core.hf.linear import RowLinear, quicken
from moepic_core.row_sums import pays_for

pytestmark = pytest.mark.skipif(not pays_for(torch.ones(1, 1, dtype=torch.bfloat16)), reason="torch without FBGEMM")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_quickened_layer_answers_as_before(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 20, bias=bias, dtype=dtype)).requires_grad_(False)
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((48,), (1, 48), (1, 1, 48), (1, 5, 48), (2, 1, 48))]
    before = [layer(x) for x in inputs]
    where = layer[0].weight.data_ptr()
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    quicken(layer)
    assert isinstance(layer[0], RowLinear)
    assert layer[0].weight.data_ptr() == where
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in weights.items())
    for x, expected in zip(inputs, before, strict=True):
        found = layer(x)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, f"largest relative difference {error:.1e}"


def test_what_gains_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    monkeypatch.setattr(linear, "_LARGEST_BYTES", 2 * 8 * 8)
    half = torch.bfloat16
    layers = {
        "float32": nn.Linear(4, 4), "large": nn.Linear(8, 9, dtype=half), "own": Own(4, 4, dtype=half),
        "table": nn.Embedding(8, 8, dtype=half), "tied": nn.Linear(8, 8, dtype=half),
        "one": nn.Linear(8, 1, dtype=half), "fits": nn.Linear(8, 8, dtype=half),
    }  # fmt: skip
    layers["tied"].weight = layers["table"].weight
    model = nn.ModuleDict(layers).requires_grad_(False)
    quicken(model)
    assert [name for name, layer in model.items() if isinstance(layer, RowLinear)] == ["fits"]
