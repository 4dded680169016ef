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

import abc
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import CannotMerge
from trimtab.nn.swap import Swapped

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


def carry_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the carry of a weight of `dtype`; None for a weight that has none."""
    return {torch.bfloat16: torch.int16, torch.float16: torch.bfloat16}.get(dtype)


def zero_carry(weight: Tensor) -> Tensor:
    """The carry of a weight that nothing was lost from, in host memory, pinned where the weight is on CUDA."""
    dtype = carry_dtype(weight.dtype)
    if weight.device.type == "meta":
        return torch.zeros(weight.shape, dtype=dtype, device="meta")
    return torch.zeros(weight.shape, dtype=dtype, device="cpu", pin_memory=weight.device.type == "cuda")


def narrow_with_carry(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`wide` in `dtype`, and in host memory the carry of what that lost."""
    narrow, lost = split(wide.float(), dtype)
    carry = zero_carry(narrow)
    carry.copy_(lost)
    return narrow, carry


class Holder(abc.ABC):
    """How a frozen weight is stored. Rows are output rows, and values are (rows, in), whatever the storage.

    A holder is handed the layer's `weight` parameter in each call; it owns nothing but the carry.
    """

    #: The weight is stored in fewer bits than anything computes in.
    quantized: ClassVar[bool] = False
    #: What rounding lost, in the weight's stored shape; None stands for nothing.
    carry: Tensor | None = None
    #: A merge of which less than this share survives is refused.
    min_kept: float = 0.0

    @abc.abstractmethod
    def matmul(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W' + b in x's dtype, for x (T, in); the result is (T, out) and fresh."""

    @abc.abstractmethod
    def grad_input(self, weight: Tensor, g: Tensor) -> Tensor:
        """The gradient (T, in) of the input for a gradient `g` (T, out) of the output: g W."""

    @abc.abstractmethod
    def grad_weight(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the weight in its stored shape, should somebody let it train: g' x."""

    @abc.abstractmethod
    def row_blocks(self, weight: Tensor) -> Iterator[slice]:
        """Blocks of output rows, each small enough to be worked on in float64."""

    @abc.abstractmethod
    def rows(self, weight: Tensor, block: slice) -> Tensor:
        """The value (rows, in) of a block, carry included, in fp32 or wider, on the weight's device; fresh."""

    @abc.abstractmethod
    def quick_squares(self, weight: Tensor) -> Tensor:
        """|W|^2 of each output row (out,) without the carry, from one pass in fp32 or wider; good to 2^-20."""

    @abc.abstractmethod
    def write_rows(self, weight: Tensor, block: slice, value: Tensor) -> None:
        """Store a `value` (rows, in) of a block, rounded to nearest; what that loses is carried."""

    def fault(self, weight: Tensor) -> str:
        """Why the weight can be neither read nor written exactly; empty when it can."""
        return ""

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that `write_rows` writes, by a suffix to the weight's name; "" is the weight itself."""
        return {"": weight}

    @property
    def lossy(self) -> bool:
        """Whether a merge loses for good what rounding takes from it."""
        return False

    def survival(self, weight: Tensor, block: slice, value: Tensor) -> tuple[float, float]:
        """How much of a merge would be left, were these rows written.

        With d = value - rows and c = the change that `write_rows` would make: the sums of c d and of d d. Their
        ratio is the surviving share: 1 unless the holder is `lossy`.
        """
        whole = float((value - self.rows(weight, block)).square().sum())
        return whole, whole

    def widen(self, module: nn.Module, weight: Tensor) -> Callable[[], None]:
        """Let `module`, whose weight this holds in few bits, hold the dense `weight` (out, in) instead.

        Returns a function that undoes it, bit for bit. Only a quantised holder has something to widen.
        """
        raise TypeError(f"the weight of {type(module).__name__} is dense already")


class Dense(Holder):
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
        w = weight.to(x.dtype)
        return F.linear(x, w.t() if self.transposed else w, None if bias is None else bias.to(x.dtype))

    def grad_input(self, weight: Tensor, g: Tensor) -> Tensor:
        w = weight.to(g.dtype)
        return g @ (w.t() if self.transposed else w)

    def grad_weight(self, x: Tensor, g: Tensor) -> Tensor:
        return x.t() @ g if self.transposed else g.t() @ x

    def fault(self, weight: Tensor) -> str:
        if self.carry is None or self.carry.dtype == carry_dtype(weight.dtype):
            return ""
        return (
            f"was cast to {weight.dtype} after its adapter was attached, and the carry of what rounding lost is of "
            "another dtype; cast it back, or give attach the dtype to compute in"
        )

    def _by_output(self, stored: Tensor) -> Tensor:
        """A view of a weight or carry as (out, in)."""
        return stored.t() if self.transposed else stored

    def row_blocks(self, weight: Tensor) -> Iterator[slice]:
        rows, columns = self._by_output(weight).shape
        height = max(1, MERGE_CHUNK // max(1, columns))
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def rows(self, weight: Tensor, block: slice) -> Tensor:
        if fault := self.fault(weight):
            raise CannotMerge(f"a weight {fault}")
        stored = self._by_output(weight)[block].contiguous()
        if self.carry is None:
            return stored.to(torch.promote_types(stored.dtype, torch.float32), copy=True)
        return join(stored, self._by_output(self.carry)[block].to(stored.device).contiguous())

    def quick_squares(self, weight: Tensor) -> Tensor:
        stored, wide = self._by_output(weight), torch.promote_types(weight.dtype, torch.float32)
        blocks = [stored[block] for block in self.row_blocks(weight)]
        return torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=wide) for rows in blocks]).square_()

    def write_rows(self, weight: Tensor, block: slice, value: Tensor) -> None:
        target = self._by_output(weight)
        if not self.exact or weight.dtype not in (torch.bfloat16, torch.float16):
            target[block] = value.to(weight.dtype)
            return
        if self.carry is None:
            self.carry = zero_carry(weight)
        target[block], lost = split(value.float(), weight.dtype)
        self._by_output(self.carry)[block] = lost.to(self.carry.device)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a linear layer with a weight of shape (in, out)."""
    cls = type(module)
    while issubclass(cls, Swapped):
        cls = cls.swap_plain
    return cls.__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def holder_of(module: nn.Module, *, carry: Tensor | None = None, exact: bool = True) -> Holder:
    """How a linear layer holds its weight: its own `holder`, where a layer brings one, else `Dense`."""
    own = getattr(module, "holder", None)
    return own if isinstance(own, Holder) else Dense(transposed=is_conv1d(module), carry=carry, exact=exact)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer however it stores its weight; (num, dim) of an embedding."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    first, second = weight.shape
    return (second, first) if is_conv1d(module) else (first, second)
