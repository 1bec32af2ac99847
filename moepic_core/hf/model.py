"""One loaded model: the forward pass over new tokens, and the KV memory that is kept between turns.

Attention, norms, routers, the cache classes are Transformers'; this file only decides which tokens are new.
Called by the engine. Knows nothing of where experts live.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .embedding import embedding_of
from .linear import quicken


class HfModel:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        quicken(model)
        self.model = model
        self.device = device
        self.embedding = embedding_of(model)  # None: on the device, like everything else
        self.cached_ids: list[int] = []  # tokens whose keys and values are kept
        self.continues = True  # several tokens may follow cached ones in one pass
        self._cache: Any = None
        self._chooses_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def resident_bytes(self) -> int:
        """Bytes of everything that is on the device now; tied tensors count once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    def kv_bytes_by_layer(self) -> list[int]:
        """Bytes of the kept keys, values and recurrent states, per layer that keeps any."""
        return [
            sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(vars(layer)))
            for layer in self._kv_layers()
        ]

    def recurrent_states(self) -> list[Tensor]:
        """Copies of the states that summarise all tokens so far, of the layers that have any."""
        return [
            state.clone()
            for layer in self._kv_layers()
            for state in tensors_in(getattr(layer, "recurrent_states", None))
        ]

    def kv_windows(self) -> list[int | None]:
        """Per layer the length of its sliding window, None where it keeps everything."""
        return [getattr(layer, "sliding_window", None) for layer in self._kv_layers()]

    @torch.inference_mode()
    def forward(self, ids: list[int], all_logits: bool = False) -> Tensor:
        """Runs the new tokens `ids` after the cached ones: logits of the last one `[vocab]`, or of all `[tokens,
        vocab]`.

        When it raises, the KV memory is rolled back to what it was before, or forgotten where a model cannot roll back.
        """
        tokens = torch.tensor([ids], device=self.device)  # [1, tokens]
        if self.embedding is not None:
            self.embedding.expect(tokens, ids)
        keep: dict[str, Tensor] = {}
        if self._chooses_logits and not all_logits and len(ids) > 1:
            # By number, not as a slice of the end: on a CPU torch multiplies a slice of several tokens only after it
            # has copied the whole head (0.27 s and 65 MB for a vocabulary of 32,000; docs/LOG.md).
            keep["logits_to_keep"] = torch.tensor([len(ids) - 1], device=self.device)
        before = len(self.cached_ids)
        try:
            output = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **keep)
        except BaseException:
            if self._cache is None or not self._crop(before):
                self.forget()
            raise
        self._cache = output.past_key_values
        self.cached_ids += ids
        logits: Tensor = output.logits[0]
        return logits if all_logits else logits[-1]

    def reuse_prefix(self, ids: list[int]) -> int:
        """Keeps the longest common prefix of the cached tokens and `ids`; returns its length.

        At least one token of `ids` is left to run, since its logits are needed. Recurrent states and full sliding
        windows cannot be cut back; then nothing is kept unless `ids` continues exactly where the cache ends. Nothing is
        kept either where the model cannot `continue` with the several tokens that are left.
        """
        common = 0
        for old, new in zip(self.cached_ids, ids[:-1], strict=False):
            if old != new:
                break
            common += 1
        cannot_continue = not self.continues and len(ids) - common > 1
        if cannot_continue or (common < len(self.cached_ids) and not self._crop(common)):
            self.forget()
            return 0
        return common

    def forget(self) -> None:
        self._cache = None
        self.cached_ids = []

    def close(self) -> None:
        self.forget()
        if self.embedding is not None:
            self.embedding.rows.close()

    def _crop(self, length: int) -> bool:
        """Cuts every layer back to `length` tokens; False when some layer cannot (the cache is then unusable)."""
        if length == 0:
            return False
        for layer in self._kv_layers():
            if hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states"):
                return False
            excess = layer.get_seq_length() - length
            try:
                if excess > 0:
                    layer.crop(-excess)
            except RuntimeError:  # a sliding window that is already full
                return False
        del self.cached_ids[length:]
        return bool(self._kv_layers())

    def _kv_layers(self) -> list[Any]:
        return list(getattr(self._cache, "layers", ()))


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]
