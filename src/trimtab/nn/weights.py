"""Frozen weights: how one is stored, multiplied with, and written into at a merge.

A holder is a plain object, never a module: the weight stays a parameter of its layer, under its own name,
and is handed to the holder's methods. What a holder adds is the *carry*: a 16-bit weight W stands for
W + carry, where the carry (2 bytes an entry, in host memory) is what rounding would have lost. It is read
and written only when something is merged, so it costs nothing in training.

For a bf16 weight the carry is an int16: the distance, in steps of the fp32 grid, from W to the fp32 value
that it stands for. bf16 is the upper half of fp32, so W and carry together are that value exactly. (A bf16
carry takes as much room and holds 17 bits: after fifty restarts entries are off by more than 2^-15.) For an
fp16 weight it is the difference itself, in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

#: Entries that a merge works on at a time (64 MiB in float64): a merge never holds a second copy of a weight.
MERGE_CHUNK = 1 << 23


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An fp32 `value` as its nearest neighbour in a 16-bit `dtype` and the carry that makes up for the rest."""
    narrow = value.to(dtype)
    if dtype != torch.bfloat16:
        return narrow, (value - narrow.float()).to(torch.bfloat16)
    steps = value.view(torch.int32) - narrow.float().view(torch.int32)
    # A tie that rounded down lies 2^15 steps above: one more than int16 holds, so it is one fp32 step off.
    return narrow, steps.clamp_(max=2**15 - 1).to(torch.int16)


def join(narrow: Tensor, carry: Tensor) -> Tensor:
    """The fp32 value that a 16-bit weight and its carry stand for; the inverse of `split`."""
    wide = narrow.float()
    if narrow.dtype != torch.bfloat16:
        return wide + carry
    return (wide.view(torch.int32) + carry).view(torch.float32)


def zero_carry(weight: Tensor) -> Tensor:
    """The carry of a weight that nothing was lost from, in host memory, pinned where the weight is on CUDA."""
    dtype = torch.int16 if weight.dtype == torch.bfloat16 else torch.bfloat16
    if weight.device.type == "meta":
        return torch.zeros(weight.shape, dtype=dtype, device="meta")
    return torch.zeros(weight.shape, dtype=dtype, device="cpu", pin_memory=weight.device.type == "cuda")


def narrow_with_carry(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`wide` in `dtype`, and in host memory the carry of what that lost."""
    narrow, lost = split(wide.float(), dtype)
    carry = zero_carry(narrow)
    carry.copy_(lost)
    return narrow, carry


class Dense:
    """A frozen weight held as one tensor of the compute dtype (bf16, fp16 or fp32).

    Args:
        transposed: the weight is stored (in, out), as GPT-2's Conv1D does, instead of (out, in).
        carry: what rounding lost, in the weight's stored shape; None stands for nothing.
        exact: keep a carry when a merge rounds; without it the rest is lost, as in the papers' pure bf16.
    """

    def __init__(self, *, transposed: bool = False, carry: Tensor | None = None, exact: bool = True) -> None:
        self.transposed = transposed
        self.carry = carry
        self.exact = exact

    def matmul(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W' + b in x's dtype, for x (T, in); the result is (T, out) and fresh."""
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
        """Blocks of stored rows, each small enough to be worked on in float64."""
        rows, columns = weight.shape
        height = max(1, MERGE_CHUNK // max(1, columns))
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def rows(self, weight: Tensor, block: slice) -> Tensor:
        """The value W + carry of a block of stored rows, in fp32 or wider, on the weight's device; fresh."""
        stored = weight[block]
        if self.carry is None:
            return stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
        return join(stored, self.carry[block].to(stored.device))

    def write_rows(self, weight: Tensor, block: slice, value: Tensor) -> None:
        """Store a `value` of a block of stored rows, rounded to nearest; what a 16-bit dtype loses is carried."""
        if not self.exact or weight.dtype not in (torch.bfloat16, torch.float16):
            weight[block] = value.to(weight.dtype)
            return
        if self.carry is None:
            self.carry = zero_carry(weight)
        weight[block], lost = split(value.float(), weight.dtype)
        self.carry[block] = lost.to(self.carry.device)
