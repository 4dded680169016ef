"""The VeRA layer and its hand-written backward, which keeps nothing but u.

Legend: T tokens, I in_features, O out_features, R rank.

Forward (arXiv 2310.11454, equation 2):  y_TO = x_TI W_OI' + c + b_O * ((d_R * u_TR) B_OR'),   u_TR = drop(x) A_RI'
A and B are frozen, d and b train. With M_OR = b_O * B_OR * d_R, which is small, this is y = x W' + c + u M'.
Backward, with h_TR = g_TO M and P_OR = g' u:
    db_O = (P * B) d        dd_R = b (P * B)        dx_TI = g W + undrop(h A)

Neither gradient needs x, since W and A are frozen: u alone is saved, R numbers a token, once for all layers
that read the same x (see `reading`). Where the step before keeps x for its own backward (attention keeps its
output, which the output projection reads), not even u is saved: it is made again from x.

Nothing of output width is made beside y: b, d are folded into the small matrix, and P holds the sums over
tokens of both gradients, so that z B' is not formed again. These sums are accumulated in fp32, and the fold is
done in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.nn.adapted import Adapted
from trimtab.nn.dropping import draw_seed, dropped, gain
from trimtab.nn.pairs import Pairs
from trimtab.nn.precision import column_sum, compute_dtype_of, sum_over_tokens, wide, without_autocast
from trimtab.nn.reading import share
from trimtab.nn.weights import Holder

Context = Any


def _fold(b: Tensor, B: Tensor, d: Tensor, dtype: torch.dtype) -> Tensor:
    """M (O, R) = b * B * d, rounded to `dtype` once."""
    exact = wide(dtype)
    return (B.to(exact) * d.to(exact)).mul_(b.to(exact)[:, None]).to(dtype)


#: Autograd nodes that keep their output for their own backward.
_KEEPERS = ("ScaledDotProduct", "Relu", "Sigmoid", "Softmax", "Tanh")
#: Autograd nodes whose result is their input's memory.
_VIEWS = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Squeeze", "Unsqueeze")
)


def kept_anyway(x: Tensor) -> bool:
    """Whether x is a view of what the autograd node that made it keeps, so that keeping x, too, costs nothing.

    Should a node of one of these names not keep its output, memory is lost and nothing else.
    """
    node = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(_KEEPERS)


class _VeRAFunction(torch.autograd.Function):
    """See the module. The branch's input is x itself where `branch` is None, and else has a gradient of its own."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        branch: Tensor | None,
        u: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        d: Tensor,
        b: Tensor,
        A: Tensor,
        B: Tensor,
        base: Holder,
        keep_u: bool,
    ) -> Tensor:
        if u is None:
            u = (x if branch is None else branch) @ A.to(x.dtype).t()
        ctx.base, ctx.bias_dtype, ctx.split = base, None if bias is None else bias.dtype, branch is not None
        # A and B are kept as they are, not as saved tensors: they belong to the model, and hooks that move or
        # count what is saved have no business with them.
        ctx.pair = (A, B)
        keep_x = weight.requires_grad or not keep_u
        ctx.save_for_backward(u if keep_u else None, d, b, weight, x if keep_x else None)
        y_TO = base.matmul(weight, x, bias)
        if x.shape[0] < B.shape[1]:  # a few tokens, as in generation: cheaper than folding (O, R)
            z_TR = (u * d.to(wide(x.dtype))).to(x.dtype)
            return y_TO.add_((z_TR @ B.to(x.dtype).t()) * b.to(wide(x.dtype)))
        return y_TO.addmm_(u, _fold(b, B, d, x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        u_TR, d, b, weight, x_TI = ctx.saved_tensors
        A, B = ctx.pair
        need_x, need_branch, _, need_w, need_c, need_d, need_b = ctx.needs_input_grad[:7]
        dx = dbranch = dw = dc = dd = db = None
        if need_d or need_b:
            u_TR = x_TI @ A.to(x_TI.dtype).t() if u_TR is None else u_TR
            PB_OR = sum_over_tokens(g_TO, u_TR).to(wide(g_TO.dtype)).mul_(B)
            db = (PB_OR @ d.to(PB_OR)).to(b.dtype) if need_b else None
            dd = (b.to(PB_OR) @ PB_OR).to(d.dtype) if need_d else None
        if need_x or need_branch:
            h_TR, a_RI = g_TO @ _fold(b, B, d, g_TO.dtype), A.to(g_TO.dtype)
        if need_branch:
            dbranch = h_TR @ a_RI
        if need_x:
            dx = ctx.base.grad_input(weight, g_TO)
            dx = dx if ctx.split else dx.addmm_(h_TR, a_RI)
        if need_w:
            dw = ctx.base.grad_weight(x_TI, g_TO).to(weight.dtype)
        if need_c:
            dc = column_sum(g_TO, ctx.bias_dtype)
        return dx, dbranch, None, dw, dc, dd, db, None, None, None, None


class _DropFunction(torch.autograd.Function):
    """Dropout that keeps no mask: backward makes it again from its seed."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return x.masked_fill(dropped(x, p, seed), 0).mul_(gain(p))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0].masked_fill(dropped(grads[0], ctx.p, ctx.seed), 0).mul_(gain(ctx.p)), None, None


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    d: Tensor,
    b: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    base: Holder,
    dropout: float = 0.0,
    reader: str = "",
    followers: dict[str, set[str]] | None = None,
) -> Tensor:
    """X W' + c + b * ((d * (drop(x) A')) B'), of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        d: (r,), usually fp32.
        b: (out,), usually fp32.
        A: (r, in), frozen.
        B: (out, r), frozen.
        base: the holder of `weight`.
        dropout: probability of dropping an entry of the branch's input; 0 outside training. Each layer drops
            others, as in PEFT, so u is then its own.
        reader: the layer's name among those that may share u.
        followers: what is learnt about sharing (see `reading.share`); None shares nothing.
    """
    flat = x.to(compute_dtype_of(x)).reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        u, branch, keep_u = None, None, True
        compiling = torch.compiler.is_compiling()
        if dropout:
            branch = _DropFunction.apply(flat, dropout, draw_seed(dropout))  # type: ignore[no-untyped-call]
        elif not compiling and kept_anyway(flat):
            keep_u = False
        elif followers is not None and not compiling:

            def make() -> Tensor:
                with torch.no_grad():
                    return flat @ A.to(flat.dtype).t()

            u = share(make, x, A, flat.dtype, reader=reader, followers=followers)
        out: Tensor = _VeRAFunction.apply(flat, branch, u, weight, bias, d, b, A, B, base, keep_u)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], B.shape[0])


class VeRAMixin(Adapted):
    """A linear layer with a VeRA branch beside its frozen weight.

    Attributes:
        pairs: where the layer has A and B from.
        name: the layer's name in the model.
        vera_A: (r, in), shared by the layers that are as wide; no parameter and no buffer, so that state dicts,
            optimizers and wrappers that broadcast or shard do not see it.
        vera_B: (out, r), likewise.
    """

    label = "VeRA"
    parts = ("vera_lambda_d", "vera_lambda_b")
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter
    vera_A: Tensor
    vera_B: Tensor
    pairs: Pairs
    name: str
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        if self.vera_A.device != x.device:  # moved by something that does not go through Module.to
            self._take_pair(x.device, self.vera_A.dtype)
        return vera_linear(
            x,
            self.weight,
            self.bias,
            self.vera_lambda_d,
            self.vera_lambda_b,
            self.vera_A,
            self.vera_B,
            base=self.base,
            dropout=self.dropout if self.training else 0.0,
            reader=self.name,
            followers=self.pairs.followers,
        )

    def _take_pair(self, device: torch.device, dtype: torch.dtype) -> None:
        """Hold the shared A and B of this device and dtype."""
        self.vera_A = self.pairs.get("A", self.vera_A.shape[1], device, dtype)
        self.vera_B = self.pairs.get("B", self.vera_B.shape[0], device, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow the module to where `fn` moves it, and stay shared; a change of dtype rounds the exact pair anew."""
        module = super()._apply(fn, recurse)  # type: ignore[misc]
        probe = fn(torch.empty(0, dtype=self.vera_A.dtype, device=self.vera_A.device))
        if (probe.device, probe.dtype) != (self.vera_A.device, self.vera_A.dtype):
            self._take_pair(probe.device, probe.dtype)
        return module

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """W + (b B) (d A), with A and B as they are in the forward."""
        A, B = self.vera_A, self.vera_B
        if A.device != rows.device:  # the layer is on the meta device, and a checkpoint goes by in pieces
            A = self.pairs.get("A", A.shape[1], rows.device, A.dtype)
            B = self.pairs.get("B", B.shape[0], rows.device, B.dtype)
        left = B[block].to(rows) * self.vera_lambda_b[block].to(rows)[:, None]
        return rows.addmm_(left, A.to(rows) * self.vera_lambda_d.to(rows)[:, None])
