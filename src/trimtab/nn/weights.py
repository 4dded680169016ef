"""Frozen weights: how one is stored, multiplied with, and written into at a merge.

A holder is a plain object, never a module: the weight stays a parameter of its layer, under its own name,
and is handed to the holder's methods. What a holder adds is the *carry*: a frozen bf16 weight W stands for
W + carry, where the carry (bf16, in host memory) is what rounding would have lost. It is read and written
only when something is merged, so it costs nothing in training. W + carry has at least 16 significant bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

#: fp32 elements that a merge works on at a time (32 MiB): a merge never holds a second copy of a weight.
MERGE_CHUNK = 1 << 23

CARRY_DTYPE = torch.bfloat16


def host_carry(like: Tensor) -> Tensor:
    """A zero carry for a weight, in host memory; pinned where the weight lives on a CUDA device."""
    if like.device.type == "meta":
        return torch.zeros(like.shape, dtype=CARRY_DTYPE, device="meta")
    return torch.zeros(like.shape, dtype=CARRY_DTYPE, pin_memory=like.device.type == "cuda")


def narrow_with_carry(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split `wide` into its value rounded to `dtype` and the carry that rounding left."""
    narrow = wide.to(dtype)
    carry = host_carry(narrow)
    carry.copy_(wide - narrow)
    return narrow, carry


class Dense:
    """A frozen weight held as one tensor of the compute dtype (bf16, fp16 or fp32).

    Args:
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does, instead of (out, in).
        carry: what rounding left, in the weight's stored shape; None stands for zero.
        exact: keep a carry when a merge rounds; without it the rest is lost, as in the papers' pure bf16.
    """

    def __init__(self, *, transposed: bool = False, carry: Tensor | None = None, exact: bool = True) -> None:
        self.transposed = transposed
        self.carry = carry
        self.exact = exact

    def matmul(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """X W' + b in x's dtype, for x (T, in); the result is (T, out) and fresh."""
        w = weight.to(x.dtype)
        return F.linear(x, w.t() if self.transposed else w, None if bias is None else bias.to(x.dtype))

    def grad_input(self, weight: Tensor, g: Tensor) -> Tensor:
        """The gradient (T, in) of the input for a gradient `g` (T, out) of the output: g W."""
        w = weight.to(g.dtype)
        return g @ (w.t() if self.transposed else w)

    def grad_weight(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the weight in its stored shape, should somebody let it train: g' x."""
        return x.t() @ g if self.transposed else g.t() @ x

    def row_blocks(self, weight: Tensor) -> Iterator[slice]:
        """Blocks of stored rows, each small enough to be worked on in fp32."""
        rows, columns = weight.shape
        height = max(1, MERGE_CHUNK // max(1, columns))
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def rows(self, weight: Tensor, block: slice) -> Tensor:
        """The exact value W + carry of a block of stored rows, in fp32 (or wider), on the weight's device; fresh."""
        value = weight[block].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        return value if self.carry is None else value.add_(self.carry[block].to(value.device))

    def write_rows(self, weight: Tensor, block: slice, value: Tensor) -> None:
        """Store an fp32 `value` in a block of stored rows: rounded to nearest, the rest into the carry."""
        weight[block] = value.to(weight.dtype)
        if self.exact and weight.dtype != value.dtype:
            if self.carry is None:
                self.carry = host_carry(weight)
            self.carry[block] = (value - weight[block].float()).to(CARRY_DTYPE).to(self.carry.device)
