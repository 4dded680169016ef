"""(IA)3's layers, their hand-written backwards, and their merge (arXiv 2205.05638).

Legend: T tokens, I in_features, O out_features; l is a vector of scales, one at the start.

Outputs scaled (keys, values):       y_TO = l_O * (x_TI W_OI' + b)
    dl_O = sum over T of g * (x W' + b)          dx_TI = (g * l) W
Inputs scaled (the feed-forward's inner activation):       y_TO = (x_TI * l_I) W_OI' + b
    with h_TI = g W:   dl_I = sum over T of h * x          dx_TI = h * l

What is kept: scaled inputs need x. Scaled outputs need x W' + b, which can be formed again from x, so the narrower of
the two is kept. Where both are of one width it is x, which keys and values read alike, so the pair keeps one tensor
and not two; the price is one product more in the backward. Under grouped-query attention keys and values are narrow,
are kept themselves, and nothing is formed again.

l is multiplied in fp32 and the product rounded once: in bf16 the numbers next to 1 are 2^-7 apart, so an l cast to it
would move in jumps. l's gradient is summed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.precision import apply_rows, column_sum
from trimtab.nn.weights import Holder

Context = Any


class _ScaledOutputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, base: Holder) -> Tensor:
        ctx.base = base
        y_TO = base.matmul(weight, x, bias)
        _, need_w, _, need_l, _ = ctx.needs_input_grad
        again = x.shape[1] <= y_TO.shape[1] or need_w
        kept = y_TO if need_l and not again else None
        ctx.save_for_backward(x if (need_l and again) or need_w else None, kept, weight, bias, scales)
        return (y_TO if kept is None else y_TO.clone()).mul_(scales)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, y_TO, weight, bias, scales = ctx.saved_tensors
        need_x, need_w, need_b, need_l, _ = ctx.needs_input_grad
        dx = dw = db = dl = None
        if need_l:
            product_TO = g_TO * y_TO if y_TO is not None else ctx.base.matmul(weight, x_TI, bias).mul_(g_TO)
            dl = column_sum(product_TO, scales.dtype)
        if need_x or need_w or need_b:
            scaled_TO = g_TO.clone().mul_(scales)
            if need_x:
                dx = ctx.base.grad_input(weight, scaled_TO)
            if need_w:
                dw = ctx.base.grad_weight(x_TI, scaled_TO).to(weight.dtype)
            if need_b:
                db = column_sum(scaled_TO, bias.dtype)
        return dx, dw, db, dl, None


class _ScaledInputFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, base: Holder) -> Tensor:
        ctx.base = base
        _, need_w, _, need_l, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_l or need_w else None, weight, scales)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return base.matmul(weight, x.clone().mul_(scales), bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, weight, scales = ctx.saved_tensors
        need_x, need_w, need_b, need_l, _ = ctx.needs_input_grad
        dx = dw = db = dl = None
        if need_x or need_l:
            h_TI = ctx.base.grad_input(weight, g_TO)
            if need_l:
                dl = column_sum(h_TI * x_TI, scales.dtype)
            if need_x:
                dx = h_TI.mul_(scales)
        if need_w:
            dw = ctx.base.grad_weight(x_TI.clone().mul_(scales), g_TO).to(weight.dtype)
        if need_b:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db, dl, None


def ia3_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor, *, base: Holder, feedforward: bool
) -> Tensor:
    """l * (X W' + b), or (X * l) W' + b with `feedforward`, of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        scales: l, (out,), or (in,) with `feedforward`; usually fp32.
        base: the holder of `weight`.
        feedforward: scale the input instead of the output.
    """
    return apply_rows(_ScaledInputFunction if feedforward else _ScaledOutputFunction, x, weight, bias, scales, base)


class IA3Mixin(Adapted):
    """A linear layer whose outputs are scaled by `ia3_l` (out, 1), or its inputs by `ia3_l` (1, in)."""

    label = "IA3"
    parts = ("ia3_l",)
    ia3_l: nn.Parameter
    feedforward: bool

    def forward(self, x: Tensor) -> Tensor:
        scales = self.ia3_l.flatten()
        return ia3_linear(x, self.weight, self.bias, scales, base=self.base, feedforward=self.feedforward)

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """(W + carry) with its rows, or its columns, scaled."""
        return rows.mul_((self.ia3_l if self.feedforward else self.ia3_l[block]).to(rows))
