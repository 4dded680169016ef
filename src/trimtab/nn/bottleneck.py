"""The bottleneck layer: a linear layer and, on its output, a small network with a skip; its hand-written backward.

Legend: T tokens, I in_features, O out_features, M width of the bottleneck.

Forward (arXiv 1902.00751):  y_TO = x_TI W_OI' + b    h_TM = y D_MO' + b1    z_TO = y + f(h) U_OM' + b2
Backward for a gradient g_TO of z, with a = f(h) formed again from y:
    dU = g' a    db2 = sum g    dh_TM = (g U) f'(h)    dD = dh' y    db1 = sum dh    dy = g + dh D    dx = dy W

W is frozen, so x is not needed: the function saves y alone. Autograd would keep h and a as well, and casts of
D and U. D, U and their biases are fp32 parameters, cast to the activations' dtype here.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.precision import apply_rows, column_sum
from trimtab.nn.weights import Holder

Context = Any

Activation = Literal["gelu", "relu", "silu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def activate(h: Tensor, kind: Activation) -> Tensor:
    """f(h); "gelu" is the exact one."""
    if kind == "gelu":
        return F.gelu(h)
    if kind == "silu":
        return F.silu(h)
    return torch.relu(h) if kind == "relu" else torch.tanh(h)


def activate_backward(g: Tensor, h: Tensor, kind: Activation) -> Tensor:
    """g f'(h), written out, so that torch.compile sees plain operations."""
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(g, h)  # type: ignore[no-any-return]
    if kind == "silu":
        return torch.ops.aten.silu_backward(g, h)  # type: ignore[no-any-return]
    return g * (h > 0) if kind == "relu" else g * (1 - torch.tanh(h).square())


class _BottleneckFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        base: Holder,
        activation: Activation,
    ) -> Tensor:
        ctx.base, ctx.activation, ctx.up_bias_dtype = base, activation, up_bias.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        y_TO = base.matmul(weight, x, bias)
        ctx.save_for_backward(y_TO, weight, down, down_bias, up, x if ctx.needs_input_grad[1] else None)
        h_TM = F.linear(y_TO, down.to(y_TO.dtype), down_bias.to(y_TO.dtype))
        z_TO = torch.addmm(y_TO, activate(h_TM, activation), up.to(y_TO.dtype).t())
        return z_TO.add_(up_bias.to(y_TO.dtype))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        y_TO, weight, down, down_bias, up, x_TI = ctx.saved_tensors
        need_x, need_w, need_b, need_down, need_down_bias, need_up, need_up_bias = ctx.needs_input_grad[:7]
        down_MO = down.to(g_TO.dtype)
        h_TM = F.linear(y_TO, down_MO, down_bias.to(g_TO.dtype))
        dx = dw = db = d_down = d_down_bias = d_up = d_up_bias = None
        if need_up:
            d_up = (g_TO.t() @ activate(h_TM, ctx.activation)).to(up.dtype)
        if need_up_bias:
            d_up_bias = column_sum(g_TO, ctx.up_bias_dtype)
        dh_TM = activate_backward(g_TO @ up.to(g_TO.dtype), h_TM, ctx.activation)
        if need_down:
            d_down = (dh_TM.t() @ y_TO).to(down.dtype)
        if need_down_bias:
            d_down_bias = column_sum(dh_TM, down_bias.dtype)
        if need_x or need_w or need_b:
            dy_TO = torch.addmm(g_TO, dh_TM, down_MO)
            if need_x:
                dx = ctx.base.grad_input(weight, dy_TO)
            if need_w:
                dw = ctx.base.grad_weight(x_TI, dy_TO).to(weight.dtype)
            if need_b:
                db = column_sum(dy_TO, ctx.bias_dtype)
        return dx, dw, db, d_down, d_down_bias, d_up, d_up_bias, None, None


def bottleneck_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    *,
    base: Holder,
    activation: Activation,
) -> Tensor:
    """y + f(y D' + b1) U' + b2 for y = x W' + b, of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        down: D (m, out), usually fp32, as the three below.
        down_bias: b1 (m,).
        up: U (out, m).
        up_bias: b2 (out,).
        base: the holder of `weight`.
        activation: f.
    """
    return apply_rows(_BottleneckFunction, x, weight, bias, down, down_bias, up, up_bias, base, activation)


class BottleneckMixin(Adapted):
    """A linear layer with a bottleneck adapter on its output."""

    label = "Bottleneck"
    parts = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")
    adapter_down: nn.Parameter
    adapter_down_bias: nn.Parameter
    adapter_up: nn.Parameter
    adapter_up_bias: nn.Parameter
    activation: Activation

    def forward(self, x: Tensor) -> Tensor:
        return bottleneck_linear(
            x,
            self.weight,
            self.bias,
            self.adapter_down,
            self.adapter_down_bias,
            self.adapter_up,
            self.adapter_up_bias,
            base=self.base,
            activation=self.activation,
        )
