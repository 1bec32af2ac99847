"""Forward passes: the model over whatever the KV memory does not hold yet, and once more when memory runs out.

Replies and rehearsals run them. A pass tells the residency where it begins and ends; a stop ends it within one layer
with Cancelled. Takes no turn and chooses no token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arena import is_out_of_memory
from .assembly import Parts
from .errors import DeviceFailed, OutOfRoom
from .governor import Governor
from .units import format_bytes


class Passes:
    def __init__(self, parts: Parts, governor: Governor) -> None:
        self.chunk = parts.settings.prefill_chunk  # the most tokens of one pass
        self._hf = parts.hf
        self._residency = parts.residency
        self._governor = governor
        self._context_length = parts.context_length

    def run(self, ids: list[int]) -> tuple[Tensor, int]:
        """Runs what of `ids` is not in the KV memory yet: the last one's logits `[vocab]`, and its number.

        Raises DeviceFailed when the device does not answer any more, RuntimeError when a memory is full.
        """
        done = len(self._hf.cached_ids)
        while True:
            chunk = ids[done : done + self.chunk]
            self._residency.begin_pass(len(chunk))
            try:
                logits = self._hf.forward(chunk)
            except torch.AcceleratorError as error:
                if is_out_of_memory(error):
                    raise
                raise DeviceFailed(error) from error
            last = self._residency.end_pass()
            done += len(chunk)
            if done == len(ids):
                return logits, last

    def run_or_shrink(self, ids: list[int]) -> tuple[Tensor, int, str | None]:
        """As `run`; when memory runs out, makes the cache smaller, tries once more, and has a notice to tell.

        Raises OutOfRoom when that is not enough.
        """
        try:
            return *self.run(ids), None
        except (RuntimeError, OutOfRoom) as error:
            if not (isinstance(error, OutOfRoom) or is_out_of_memory(error)):
                raise
            notice = self._governor.shrink()
        try:
            return *self.run(ids), notice
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfRoom(
                f"memory ran out twice, although the budget is down to "
                f"{format_bytes(self._governor.plan.memory.budget)}; lower vram or context_length "
                f"({self._context_length}), or close other programs"
            ) from error
