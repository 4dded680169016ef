"""A trained bias on a linear layer that came without one.

y_TO = x_TI W_OI' + b_O;  db_O = sum over T of g, in fp32;  dx_TI = g W. No activation is kept, unless W trains too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.precision import apply_rows, column_sum
from trimtab.nn.weights import Holder

Context = Any


class _AddedBiasFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor, base: Holder) -> Tensor:
        ctx.base, ctx.bias_dtype = base, bias.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return base.matmul(weight, x, None).add_(bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, weight = ctx.saved_tensors
        need_x, need_w, need_b, _ = ctx.needs_input_grad
        dx = ctx.base.grad_input(weight, g_TO) if need_x else None
        dw = ctx.base.grad_weight(x_TI, g_TO).to(weight.dtype) if need_w else None
        db = None
        if need_b:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db, None


def added_bias_linear(x: Tensor, weight: Tensor, bias: Tensor, *, base: Holder) -> Tensor:
    """X W' + b, of shape (..., out), in x's (or autocast's) dtype, for x (..., in) and a trained `bias` (out,)."""
    return apply_rows(_AddedBiasFunction, x, weight, bias, base)


class AddedBiasMixin(Adapted):
    """A linear layer without a bias of its own, and a trained one beside it."""

    label = "Biased"
    parts = ("added_bias",)
    added_bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return added_bias_linear(x, self.weight, self.added_bias, base=self.base)

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """W as it is."""
        return rows
