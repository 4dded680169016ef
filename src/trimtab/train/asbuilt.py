"""Which parameters of a model are still as its source gave them, so that a checkpoint needs no copy of them."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.train.tensorfile import raw_bytes


class AsBuilt:
    """The parameters of a model at one moment: those that were put elsewhere or written into since are told apart.

    A parameter is known by its place and torch's version counter. What trains does not count: fused optimizers write
    past the counter. Nor do buffers: torch's own layers write into them unseen (batch norm), and some are computed,
    in an order that depends on the number of threads (the scales of 4-bit weights).

    What is written through `.data` is not seen. So whoever relies on this keeps the `fingerprint` of what it found, and
    compares it with that of the parameter that is built again.

    Args:
        model: as its source gave it, on its device.
        drawn: names of parameters that its source does not have, drawn at random.
    """

    def __init__(self, model: nn.Module, drawn: Collection[str] = ()) -> None:
        self._seen = WeakTensorKeyDictionary()
        for name, parameter in model.named_parameters():
            if name not in drawn:
                self._seen[parameter] = _state(parameter)

    def forget_trained(self, model: nn.Module) -> None:
        """From now on, what trains now is none of them, even if it trains no more later."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter in self._seen:
                del self._seen[parameter]

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._seen and bool(self._seen[tensor] == _state(tensor))


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in row-major order, as hex."""
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    found.update(raw_bytes(tensor))
    return found.hexdigest()
