"""Layers that read the same input share what they make of it.

The q, k and v projections read one x, and all of them want u = x A'. The first to come makes u and the others
take it: one product instead of three, and one tensor kept for the backward instead of three.

That x is the same is told by the tensor object itself, its version (which every in-place change raises) and its
storage; an address alone may belong to another tensor by now. Only a weak reference to x is held, and u is
dropped when x dies. While x lives, u is dropped after the last reader: who reads after whom is learnt from the
forwards so far. A forward that goes another way, stops in the middle or runs in another thread therefore costs a
product at most, and gives no wrong u: what is learnt decides when u is dropped, not whether it is right.

The limit is a write past autograd between two readers of one x: `x.data.mul_(2)`, a kernel that writes through the
address. It raises no version, so the readers after it get the u of before. Autograd's own saved tensors miss such
writes, too; write to x itself, under `torch.no_grad()` if need be.

Inference tensors have no versions, and the tensors of torch.func's transforms no storage, so nothing is shared in
inference mode and under those. Code under torch.compile does not come
here; there the compiler's common-subexpression elimination shares u.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Reading:
    """What was made of one input."""

    source: weakref.ref[Tensor]
    version: int
    storage: int
    matrix: weakref.ref[Tensor]
    dtype: torch.dtype
    opener: str
    awaited: set[str] | None  # the readers that are still to come; None while that is unknown
    made: Tensor | None

    def fits(self, x: Tensor, matrix: Tensor, dtype: torch.dtype) -> bool:
        return (
            self.source() is x
            and self.version == x._version
            and self.storage == x.untyped_storage()._cdata
            and self.matrix() is matrix
            and self.dtype == dtype
        )


class _Readings(threading.local):
    """The inputs of this thread that are alive and were read, by their identity."""

    def __init__(self) -> None:
        self.by_id: dict[int, _Reading] = {}


_READINGS = _Readings()


def share(
    make: Callable[[], Tensor],
    x: Tensor,
    matrix: Tensor,
    dtype: torch.dtype,
    *,
    reader: str,
    followers: dict[str, set[str]],
) -> Tensor:
    """What `make()` makes, once for all that read the same `x` with the same `matrix` in the same `dtype`.

    Args:
        make: gives a tensor without history, a pure function of x, matrix and dtype.
        x: the input, as the reader was given it.
        matrix: what the input is multiplied with.
        dtype: in which that is computed.
        reader: the name of the reading layer.
        followers: by the name of the layer that reads an input first, the layers that read it after; filled here.
    """
    if torch.is_inference_mode_enabled() or x.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return make()
    readings = _READINGS.by_id
    reading = readings.get(id(x))
    if reading is not None and reading.fits(x, matrix, dtype) and reading.opener != reader:
        followers.setdefault(reading.opener, set()).add(reader)
        made = make() if reading.made is None else reading.made
        if reading.awaited is not None:
            reading.awaited.discard(reader)
            if not reading.awaited:
                reading.made = None  # the reading itself stays, to learn of a reader that nobody awaited
        return made
    made = make()
    known = followers.get(reader)
    followers.setdefault(reader, set())
    # A dead reference that was replaced is never called back, so this pops the reading that it belongs to.
    identity = id(x)
    readings[identity] = _Reading(
        source=weakref.ref(x, lambda _: readings.pop(identity, None)),
        version=x._version,
        storage=x.untyped_storage()._cdata,
        matrix=weakref.ref(matrix),
        dtype=dtype,
        opener=reader,
        awaited=None if known is None else set(known),
        made=made if known is None or known else None,
    )
    return made
