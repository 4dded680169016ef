"""Linear layers whose frozen weight is held in NF4 (see `nf4` for the format).

A layer is turned into an `NF4Linear` in place. Its `weight` is then an int8 parameter of shape (out, P/2), two
codes a byte, and its scales are buffers beside it, so that `.to()`, `state_dict()`, copies, pickles and sharding by
rows see everything there is. (int8 and not uint8, since T5 casts its activations to a weight's dtype unless that is
int8.) Scales keep their bits when a model is cast: only their device follows.

A large dense weight exists a piece at a time: the forward unpacks some rows, multiplies, and takes the next ones, so
that the unpacked piece stays in a CPU's cache, and a step never holds a dense weight larger than a piece; the backward
does so by columns. Every output is one dot product either way, so nothing is rounded twice. Weights no larger than a
piece, and all of them under torch.compile, are unpacked whole.

What a merge writes is rounded to NF4 again, and of an update that is small beside the steps between levels most is
lost (1.6 % of it is left at an update of 2 % of the weight). A *master* prevents that: the weight as bf16 together
with the int16 carry of `weights`, which are the two halves of an fp32 number and are kept as that, 4 bytes a weight,
in host memory or in a memory-mapped file. Merges add to the master, and the layer's codes are its nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.nn import nf4
from trimtab.nn.precision import apply_rows, column_sum, hold, release
from trimtab.nn.weights import MERGE_CHUNK, Holder

Context = Any

#: The scales of a layer: plain, or doubly quantised.
PLAIN_SCALES = ("absmax",)
DOUBLE_SCALES = ("absmax_codes", "absmax_scale", "absmax_offset")

#: Weights that are unpacked at a time: on a CPU what its cache holds, on a GPU what keeps it busy.
_PIECE_CPU, _PIECE_GPU = 1 << 21, 1 << 26


class NF4(Holder):
    """Holds the weight of one `NF4Linear`.

    Args:
        layer: the layer, whose buffers are the scales.
        compute: compute in this dtype whatever the input's is; None computes in the input's.
        master: what the weight stands for, (out, in) in fp32 on the CPU, or None.
        min_kept: a merge without a master is refused where less than this share of it would be left.
    """

    quantized = True

    def __init__(
        self, layer: NF4Linear, *, compute: torch.dtype | None, master: Tensor | None, min_kept: float
    ) -> None:
        self.layer = layer
        self.compute = compute
        self.min_kept = min_kept
        self._master = master
        self._outdated = False

    @property
    def transposed(self) -> bool:
        """Whether the plain layer stores its weight (in, out); the packed one never does."""
        return self.layer.plain_class is not nn.Linear

    @property
    def carry(self) -> Tensor | None:
        """The master: what a checkpoint stores beside the codes."""
        return self._master

    @carry.setter
    def carry(self, value: Tensor | None) -> None:
        if value is None:
            self._outdated = self._master is not None
            return
        if self._master is None:
            raise CheckpointError(
                "the stored state has a master of this NF4 layer, which was quantised without one; "
                "quantise with master='host' or a path"
            )
        if value.shape != self._master.shape or value.dtype != self._master.dtype:
            raise CheckpointError(
                f"the stored master is {value.dtype} {tuple(value.shape)}, and this NF4 layer's is "
                f"{self._master.dtype} {tuple(self._master.shape)}"
            )
        self._master.copy_(value)  # in place: it may be a mapped file
        self._outdated = False

    def start_master(self) -> None:
        """Let the master be what the codes decode to."""
        assert self._master is not None
        for block in self.row_blocks(self.layer.weight):
            self._master[block] = self._decoded(self.layer.weight, block).to(self._master.device)

    @torch.no_grad()
    def follow_codes(self) -> None:
        """After codes were loaded: let the master start from them, unless they are its nearest already.

        A checkpoint may put the master in before the codes that belong to it; then it must stay.
        """
        weight = self.layer.weight
        if self._master is None or weight.is_meta:
            return
        for block in self.row_blocks(weight):
            packed, scales = self.layer.encode(self._master[block].to(weight.device))
            own = self.layer.scales(block)
            if not (torch.equal(packed, weight[block]) and torch.equal(self.layer.decode_scales(scales), own)):
                self.start_master()
                return

    # -- training ------------------------------------------------------------------------------

    def matmul(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.compute or x.dtype
        x_TI, b = x.to(dtype), None if bias is None else bias.to(dtype)
        absmax, columns = self.layer.scales(), x.shape[1]
        rows, width = weight.shape[0], weight.shape[1] * 2
        kernel = nf4.gemm_kernel() if x.device.type == "cuda" and width == columns else None
        if kernel is not None and dtype != torch.float64:
            codes = weight.view(torch.uint8).view(-1, 1)
            fused: Tensor = kernel(x_TI, codes, (rows, width), absmax.view(-1), nf4.BLOCK, "nf4", bias=b)
            return fused.to(x.dtype)
        pieces = list(_pieces(rows, width, 1, weight.device))
        if len(pieces) == 1:
            return F.linear(x_TI, nf4.dequantize(weight, absmax, columns, dtype), b).to(x.dtype)
        y_TO = x_TI.new_empty(x.shape[0], rows)
        for piece in pieces:
            w_t = nf4.dequantize(weight[piece], absmax[piece], columns, dtype).t()
            if b is None:
                torch.mm(x_TI, w_t, out=y_TO[:, piece])
            else:
                torch.addmm(b[piece], x_TI, w_t, out=y_TO[:, piece])
        return y_TO.to(x.dtype)

    def grad_input(self, weight: Tensor, g: Tensor) -> Tensor:
        dtype = self.compute or g.dtype
        g_TO, absmax, columns = g.to(dtype), self.layer.scales(), self.layer.in_features
        pieces = list(_pieces(columns, weight.shape[0], nf4.BLOCK, weight.device))
        if len(pieces) == 1:
            return (g_TO @ nf4.dequantize(weight, absmax, columns, dtype)).to(g.dtype)
        dx_TI = g_TO.new_empty(g.shape[0], columns)
        for piece in pieces:
            codes = weight[:, piece.start // 2 : -(-piece.stop // nf4.BLOCK) * nf4.BLOCK // 2]
            scales = absmax[:, piece.start // nf4.BLOCK : -(-piece.stop // nf4.BLOCK)]
            w = nf4.dequantize(codes, scales, piece.stop - piece.start, dtype)
            torch.mm(g_TO, w, out=dx_TI[:, piece])
        return dx_TI.to(g.dtype)

    def grad_weight(self, x: Tensor, g: Tensor) -> Tensor:
        raise TypeError("a weight that is held in NF4 has no gradient")

    # -- merging -------------------------------------------------------------------------------

    def row_blocks(self, weight: Tensor) -> Iterator[slice]:
        rows, columns = weight.shape[0], self.layer.in_features
        height = max(1, MERGE_CHUNK // max(1, columns))
        for start in range(0, rows, height):
            yield slice(start, min(start + height, rows))

    def rows(self, weight: Tensor, block: slice) -> Tensor:
        if self._master is None:
            return self._decoded(weight, block)
        if self._outdated:
            raise CheckpointError(
                "the loaded state has no master for this NF4 layer: it was saved from a model that was quantised "
                "without one; quantise without master, too"
            )
        return self._master[block].to(weight.device, copy=True)

    def quick_squares(self, weight: Tensor) -> Tensor:
        pieces = _pieces(weight.shape[0], weight.shape[1] * 2, 1, weight.device)
        return torch.cat([torch.linalg.vector_norm(self._decoded(weight, p), dim=1) for p in pieces]).square_()

    def write_rows(self, weight: Tensor, block: slice, value: Tensor) -> None:
        wide = value.float()
        if self._master is not None:
            self._master[block] = wide.to(self._master.device)
        packed, scales = self.layer.encode(wide)
        with torch.no_grad():
            weight[block] = packed
        self.layer.put_scales(block, scales)

    def stored(self, weight: Tensor) -> dict[str, Tensor]:
        scales = {f".{name}": getattr(self.layer, name) for name in self.layer.scale_names}
        return {"": weight, **scales} | ({} if self._master is None else {".master": self._master})

    @property
    def lossy(self) -> bool:
        return self._master is None

    def survival(self, weight: Tensor, block: slice, value: Tensor) -> tuple[float, float]:
        if not self.lossy:
            return super().survival(weight, block, value)
        before = self._decoded(weight, block).double()
        packed, scales = self.layer.encode(value.float())
        after = nf4.dequantize(packed, self.layer.decode_scales(scales), value.shape[1], torch.float32)
        change = value.double() - before
        return float((change * (after.double() - before)).sum()), float(change.square().sum())

    def _decoded(self, weight: Tensor, block: slice) -> Tensor:
        return nf4.dequantize(weight[block], self.layer.scales(block), self.layer.in_features, torch.float32)

    def widen(self, module: nn.Module, weight: Tensor) -> Callable[[], None]:
        assert module is self.layer
        return self.layer.widen(weight)


def _pieces(length: int, across: int, step: int, device: torch.device) -> Iterator[slice]:
    """Runs of about equal length, a multiple of `step`, each with at most a piece's number of weights."""
    limit = _PIECE_CPU if device.type == "cpu" else _PIECE_GPU
    if torch.compiler.is_compiling() or length * across <= limit:
        yield slice(0, length)
        return
    count = -(-length * across // limit)
    size = -(-length // (count * step)) * step
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class _NF4Function(torch.autograd.Function):
    """y = x W' + b with W in NF4; saves the packed weight, which is there anyway, and nothing else."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, holder: NF4) -> Tensor:
        ctx.holder = holder
        ctx.save_for_backward(weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return holder.matmul(weight, x, bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        (weight,), g_TO = ctx.saved_tensors, grads[0]
        dx = ctx.holder.grad_input(weight, g_TO) if ctx.needs_input_grad[0] else None
        db = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, None, db, None


class NF4Linear(nn.Linear):
    """A linear layer with a frozen weight in NF4; made from a plain one by `packing.pack`.

    Attributes:
        weight: int8 (out, P/2), two codes a byte, the even column's in the high half.
        absmax: fp32 (out, N); or, doubly quantised, `absmax_codes` uint8 (out, N), `absmax_scale` fp32
            (out, ceil(N/256)) and `absmax_offset` fp32 ().
        holder: how the weight is used.
        compute_dtype: of the dense weight, should the layer be given one again.
        plain_class: nn.Linear, or transformers' Conv1D (whose weight is (in, out); the packed one is not).
    """

    holder: NF4
    compute_dtype: torch.dtype
    plain_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        # A model that casts its input to `weight.dtype` gives int8 here.
        own = None if x.is_floating_point() else self.compute_dtype
        return apply_rows(_NF4Function, x, self.weight, self.bias, self.holder, own=own)

    def extra_repr(self) -> str:
        bits = nf4.bits_per_weight((self.out_features, self.in_features), double=self.doubly)
        return f"{super().extra_repr()}, {bits:.3f} bits a weight"

    # -- scales --------------------------------------------------------------------------------

    @property
    def doubly(self) -> bool:
        """Whether the scales are quantised, too."""
        return "absmax" not in self._buffers

    def scales(self, block: slice = slice(None)) -> Tensor:
        """The scales (rows, N) of a block of rows, in fp32."""
        return self.decode_scales(tuple(self._scale_rows(name, block) for name in self.scale_names))

    @property
    def scale_names(self) -> tuple[str, ...]:
        """The buffers that hold the scales."""
        return DOUBLE_SCALES if self.doubly else PLAIN_SCALES

    def _scale_rows(self, name: str, block: slice) -> Tensor:
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer if buffer.dim() == 0 else buffer[block]

    def decode_scales(self, stored: tuple[Tensor, ...]) -> Tensor:
        """Scales in fp32 from the tensors that stand for them."""
        return nf4.dequantize_scales(*stored) if self.doubly else stored[0]

    def encode(self, value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Packed codes in int8 and the scales' tensors of some rows, with this layer's offset."""
        packed, absmax = nf4.quantize(value)
        if not self.doubly:
            return packed.view(torch.int8), (absmax,)
        offset = self.absmax_offset
        assert isinstance(offset, Tensor)
        return packed.view(torch.int8), (*nf4.quantize_scales(absmax, offset), offset)

    def put_scales(self, block: slice, stored: tuple[Tensor, ...]) -> None:
        """Write the scales' tensors of a block of rows; the offset stays."""
        for name, value in zip(self.scale_names, stored, strict=True):
            if value.dim():
                self._scale_rows(name, block).copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """As any module's, but for scales: they take the device of what `fn` does, never its dtype."""
        own = [n for n in self.scale_names if self._buffers[n].dtype == torch.float32]  # type: ignore[union-attr]
        for name in own:
            self._buffers[name] = self._buffers[name].view(torch.int32)  # type: ignore[union-attr]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name in own:
                self._buffers[name] = self._buffers[name].view(torch.float32)  # type: ignore[union-attr]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight.device)).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As any module's; a master that other codes were loaded over must not be merged into."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in ("weight", *self.scale_names)):
            self.holder.follow_codes()

    # -- becoming, and ceasing to be -----------------------------------------------------------

    def widen(self, weight: Tensor) -> Callable[[], None]:
        """Be a plain layer with this dense `weight` (out, in) from now on; returns what undoes that."""
        held = self.__dict__.get("trimtab_dtype")  # a bias that trains in fp32 makes the module a held one
        release(self)
        packed, before, plain = self._parameters["weight"], dict(self.__dict__), self.plain_class
        buffers = {name: self._buffers.pop(name) for name in self.scale_names}
        kept = {name: before[name] for name in ("holder", "compute_dtype", "plain_class")}
        for name in kept:
            del self.__dict__[name]
        if plain is not nn.Linear:
            del self.__dict__["in_features"], self.__dict__["out_features"]
            weight = weight.t().contiguous()
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self.__class__ = plain  # type: ignore[assignment]

        def undo() -> None:
            self.__class__ = NF4Linear
            self.__dict__.update(kept)
            if plain is not nn.Linear:
                self.__dict__.update(in_features=before["in_features"], out_features=before["out_features"])
            self._parameters["weight"] = packed
            self._buffers.update(buffers)
            if held is not None:
                hold(self, held)

        return undo
