"""Page-locks host memory in place, so that a GPU copies from it at full speed without help of the CPU.

`ram_store` pins each layer's records and falls back to pageable memory, visibly, where that fails. Torch's own
`pin_memory()` allocates anew and rounds up to a power of two; registering takes exactly what is there.
"""

# torch.cuda is not annotated.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

_NEVER_LOCKED = (1, 713)  # cudaErrorInvalidValue, cudaErrorHostMemoryNotRegistered: a mistake of ours
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of this process


@dataclass(eq=False)
class Pinned:
    """What became of a request to page-lock `tensor`. Holds the memory until `release`."""

    tensor: torch.Tensor
    error: str | None  # why it is still pageable; None: it is page-locked
    released: bool = False

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def release(self) -> None:
        """Unlock the memory, before it is freed and after all copies from it are settled. Again: does nothing.

        On a device that has failed it stays locked until the process ends.
        """
        if self.error is None and not self.released:
            code = int(torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr()))
            assert code not in _NEVER_LOCKED, f"cudaHostUnregister of {self.nbytes} bytes returned {code}"
        self.released = True


def pin(tensor: torch.Tensor) -> Pinned:
    """Page-lock the memory of `tensor` (contiguous, on the CPU), or say why that is not possible."""
    assert tensor.is_contiguous(), tensor.stride()
    assert tensor.device.type == "cpu", tensor.device
    if not torch.cuda.is_available():
        return Pinned(tensor, "there is no CUDA device")
    cudart = torch.cuda.cudart()
    code = cudart.cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), _PORTABLE)
    if int(code) == 0:
        return Pinned(tensor, None)
    _forget_last_error()
    return Pinned(tensor, cudart.cudaGetErrorString(code))


def _forget_last_error() -> None:
    """CUDA keeps the code of a failed call, and torch would blame its next kernel: launch a spare one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
