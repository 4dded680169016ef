"""The stored form of what a token has in one layer: a row of bytes.

bf16: the numbers in bfloat16, rounded to nearest.
int8: a scale s = max |x| / 127 in fp32 (four bytes), then round(x / s); so that no number is off by more than s / 2.
exact: the numbers as they are.

The dtype that the numbers had is known beside, and is what they come back in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.config import Storage

STORAGES: tuple[Storage, ...] = get_args(Storage)
#: Hidden states of a stack; keys and queries of the decoder's cross-attention.
Kind = Literal["hidden states", "keys", "queries"]

_SCALE_BYTES = 4
_LARGEST = 127


@dataclass(frozen=True)
class Plane:
    """What is stored of each token of a stack: `calls` rows of `width` numbers.

    Attributes:
        kind: of numbers.
        stack: the number of the stack whose tokens they are.
        calls: N, the blocks that give one row each.
        width: numbers in a row.
        dtype: of these numbers.
    """

    kind: Kind
    stack: int
    calls: int
    width: int
    dtype: torch.dtype

    def row_bytes(self, storage: Storage) -> int:
        """Bytes of a row."""
        if storage == "bf16":
            return 2 * self.width
        return _SCALE_BYTES + self.width if storage == "int8" else self.dtype.itemsize * self.width

    def token_bytes(self, storage: Storage) -> int:
        """Bytes of a token."""
        return self.calls * self.row_bytes(storage)


def is_exact(storage: Storage, dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype come back as they were."""
    return storage == "exact" or (storage == "bf16" and dtype == torch.bfloat16)


def pack(x_TD: Tensor, storage: Storage) -> Tensor:
    """Rows of numbers (T, D) as rows of bytes, uint8, on the same device."""
    if storage == "bf16":
        return x_TD.to(torch.bfloat16).contiguous().view(torch.uint8)
    if storage == "exact":
        return x_TD.contiguous().view(torch.uint8)
    wide = x_TD.to(torch.float32)
    # The floor keeps a row of zeros from dividing by zero; half of it is far below what any model computes with.
    scale = (wide.abs().amax(1, keepdim=True) / _LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
    codes = (wide / scale).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1)


def unpack(rows: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """Rows of bytes as numbers (T, D) of a dtype."""
    if storage == "bf16":
        return rows.view(torch.bfloat16).to(dtype)
    if storage == "exact":
        return rows.view(dtype)
    scale = rows[:, :_SCALE_BYTES].contiguous().view(torch.float32)
    return rows[:, _SCALE_BYTES:].view(torch.int8).to(torch.float32).mul_(scale).to(dtype)
