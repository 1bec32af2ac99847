"""The token embedding as a lookup on the host tier, in the place of Transformers' own module.

`loading` calls `divert` on the skeleton, before a weight is read, so that the table never lies on the device.
`assembly` calls `bring_rows` when all else is loaded. Only plain lookups are diverted, whatever the family.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..embedding_rows import EmbeddingRows, FileRows, RamRows
from ..lazy_tensors import LazyTensors
from ..spec import ModelSpec


class HostEmbedding(nn.Module):
    """Rows of the table for token ids, on the device of the ids. It has no `weight` that anything else could use."""

    rows: EmbeddingRows  # from `bring_rows`

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.dtype = table.weight.dtype
        self._expected: tuple[Tensor, list[int]] | None = None

    def expect(self, input_ids: Tensor, ids: list[int]) -> None:
        """Tells what the next pass's `input_ids` hold, so that they need not be read back from a GPU."""
        self._expected = (input_ids, ids)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[..., tokens]` to `[..., tokens, hidden]`. Raises IndexError for an id outside the table."""
        if self._expected is not None and self._expected[0] is input_ids:
            ids = self._expected[1]
        else:
            ids = input_ids.flatten().tolist()
        rows = self.rows.gather(ids).to(input_ids.device, non_blocking=True)
        return rows.view(*input_ids.shape, self.embedding_dim)


def divert(model: nn.Module, spec: ModelSpec) -> None:
    """Puts a HostEmbedding into the skeleton where the headers promise it and the model's code allows it."""
    table = _lookup_of(model) if spec.token_tables else None
    if table is not None and table.weight.shape == (spec.vocab_size, spec.hidden):
        model.set_input_embeddings(HostEmbedding(table))  # type: ignore[operator]


def embedding_of(model: nn.Module) -> HostEmbedding | None:
    """The model's token embedding if it is on the host tier."""
    return next((module for module in model.modules() if isinstance(module, HostEmbedding)), None)


def bring_rows(model: nn.Module, spec: ModelSpec, tensors: LazyTensors, device: torch.device, disk: bool) -> None:
    """Gives a diverted embedding its table: read into RAM, or left in its file where the host tier is the `disk`."""
    embedding = embedding_of(model)
    if embedding is None:
        return
    unread = [name for name in spec.token_tables if name in tensors.unread]
    assert len(unread) == 1, f"of {spec.token_tables} Transformers has left {unread}, not just the token embedding"
    tensor = tensors[unread[0]]
    if disk:
        embedding.rows = FileRows(tensor.info, tensor.dtype, embedding.dtype)
        tensor.on_read(tensor.info.num_bytes)  # for progress: nothing more of the checkpoint will be read now
    else:
        embedding.rows = RamRows(tensor[...].to(embedding.dtype), pinned=device.type == "cuda")


def _lookup_of(model: nn.Module) -> nn.Embedding | None:
    """The token embedding if its forward is nothing but a lookup, and nothing else holds the module or its weight."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    if type(table) is not nn.Embedding or table.max_norm is not None:
        return None
    places = [name for name, module in model.named_modules(remove_duplicate=False) if module is table]
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is table.weight]
    pairs: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    tied = {*pairs, *pairs.values()}
    return table if len(places) == len(names) == 1 and tied.isdisjoint(names) else None
