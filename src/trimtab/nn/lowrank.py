"""The LoRA layer, its hand-written backward, and its merge.

Legend: T tokens, I in_features, O out_features, R rank.

Forward (arXiv 2106.09685, equation 3):  y_TO = x_TI W_OI' + b + s (drop(x)_TI A_RI') B_OR'
Backward, with h_TR = s g_TO B_OR and u_TR = drop(x) A':
    dB_OR = s g' u        dA_RI = h' drop(x)        dx_TI = g W + undrop(h A)

The function saves x alone, which every layer that reads it shares; u is a skinny product and is formed
again, and nothing of output width is kept or made beside y itself: s is folded into the small matrix and
the low-rank term is added into y by `addmm_`. A dropout mask is not stored either: it is drawn again from its
seed, and what dropout multiplies by is folded into s (see `dropping`).

A and B are fp32 parameters, cast to the activations' dtype here; W is whatever its holder says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.dropping import draw_seed, dropped, gain
from trimtab.nn.precision import apply_rows, column_sum
from trimtab.nn.weights import Holder

Context = Any


class _LoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        base: Holder,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        scale *= gain(dropout)
        ctx.base, ctx.scale, ctx.dropout, ctx.seed = base, scale, dropout, seed
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        branch = x if seed is None else x.masked_fill(dropped(x, dropout, seed), 0)
        u_TR = branch @ lora_A.to(x.dtype).t()
        y_TO = base.matmul(weight, x, bias)
        return y_TO.addmm_(u_TR, (lora_B * scale).to(x.dtype).t())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, weight, lora_A, lora_B = ctx.saved_tensors
        need_x, need_w, need_b, need_A, need_B = ctx.needs_input_grad[:5]
        a_RI = lora_A.to(g_TO.dtype)
        dx = dw = db = dA = dB = None
        mask = None if ctx.seed is None else dropped(x_TI, ctx.dropout, ctx.seed)
        branch = x_TI if mask is None else x_TI.masked_fill(mask, 0)
        if need_x or need_A:
            h_TR = g_TO @ (lora_B * ctx.scale).to(g_TO.dtype)
            if need_A:
                dA = (h_TR.t() @ branch).to(lora_A.dtype)
            if need_x:
                dx = ctx.base.grad_input(weight, g_TO)
                dx = dx.addmm_(h_TR, a_RI) if mask is None else dx.add_((h_TR @ a_RI).masked_fill_(mask, 0))
        if need_B:
            dB = (g_TO.t() @ (branch @ a_RI.t())).to(lora_B.dtype).mul_(ctx.scale)
        if need_w:
            dw = ctx.base.grad_weight(x_TI, g_TO).to(weight.dtype)
        if need_b:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db, dA, dB, None, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    base: Holder,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """X W' + b + s drop(x) A' B', of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        lora_A: (r, in), usually fp32.
        lora_B: (out, r), usually fp32.
        base: the holder of `weight`.
        scale: s.
        dropout: probability of dropping an entry of the branch's input; 0 outside training.
    """
    return apply_rows(_LoRAFunction, x, weight, bias, lora_A, lora_B, base, scale, dropout, draw_seed(dropout))


class LoRAMixin(Adapted):
    """A linear layer with a LoRA branch beside its frozen weight."""

    label = "LoRA"
    parts = ("lora_A", "lora_B")
    starts_at_zero = "lora_B"
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            base=self.base,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """W + carry + s B A."""
        return rows.addmm_(self.lora_B[block].to(rows), self.lora_A.to(rows), alpha=self.scale)


def draw_a(a: Tensor, generator: torch.Generator | None) -> None:
    """Fill A (r, in) with U(-1/sqrt(in), 1/sqrt(in)), on the CPU, so that it is the same on every device.

    This is Kaiming-uniform with a = sqrt(5), as the LoRA and ReLoRA authors' code initialises A.
    """
    if a.device.type == "meta":
        return
    bound = 1.0 / math.sqrt(a.shape[1])
    drawn = torch.empty(a.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        a.copy_(drawn)
