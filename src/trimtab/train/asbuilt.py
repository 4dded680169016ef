"""Which tensors of a model are still as its source gave them, so that a checkpoint needs no copy of them."""

from __future__ import annotations

from hashlib import sha256

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.train.tensorfile import raw_bytes


class AsBuilt:
    """The tensors of a model at one moment: those that were put elsewhere or written into since are told apart.

    A buffer is compared by its bytes, since torch's own layers write into them unseen (batch norm, say); a parameter by
    its place and version, which what is written through `.data` does not change. So whoever relies on this keeps the
    `fingerprint` of what it found, and compares it with that of the tensor that is built again.

    Args:
        model: as its source gave it, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = WeakTensorKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen[tensor] = _state(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._seen and bool(self._seen[tensor] == _state(tensor))


def _state(tensor: Tensor) -> tuple[int, int] | str:
    if isinstance(tensor, nn.Parameter):
        return tensor.data_ptr(), tensor._version
    return fingerprint(tensor)


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in row-major order, as hex."""
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(raw_bytes(tensor))
    return found.hexdigest()
