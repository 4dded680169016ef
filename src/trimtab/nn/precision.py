"""Trained tensors are held in fp32 and cast where they are used.

In pure bf16 an AdamW step of 1e-3 does not move a norm weight at all: near 1.0 the spacing of bf16 is
2^-7. So what trains is an fp32 parameter, and its module casts it to the activations' dtype. Casting in
the module, rather than keeping master copies beside the optimizer, lets any torch optimizer and any loop
work on the parameters themselves, accumulates gradients in fp32, and needs no autocast.

A module is switched by swapping its class for a subclass, in place: its identity, its parameters' names,
hooks and tied tensors stay. `release` swaps it back.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.swap import Swapped, put_on, take_off
from trimtab.nn.weights import is_conv1d

Context = Any  # the context object of torch.autograd.Function has no useful static type


def compute_dtype_of(x: Tensor, own: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which to compute on `x`: autocast's where it is on, else `own`, else that of `x`."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return own or x.dtype


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off on a kind of device; "meta" has none."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def apply_rows(
    function: type[torch.autograd.Function], x: Tensor, *inputs: Any, own: torch.dtype | None = None
) -> Tensor:
    """`function` on the rows of x (..., in), in the dtype of `compute_dtype_of`; its result is (..., out).

    The function casts what else it reads, so autocast is off within it.
    """
    flat = x.to(compute_dtype_of(x, own)).reshape(-1, x.shape[-1])
    with without_autocast(x.device.type):
        out: Tensor = function.apply(flat, *inputs)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype, fp32 or wider, in which to sum and to apply formulas on numbers of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def column_sum(g_TO: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (O,) of a bias in its `dtype`, summed over the tokens in fp32 or wider."""
    return g_TO.sum(0, dtype=wide(g_TO.dtype)).to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed in fp32; in fp32, too, where the device gives it so, else in the factors' dtype.

    On CUDA a 16-bit product may add the parts of its sum in 16 bits, so there its result is asked for in fp32.
    Elsewhere fp16 is widened first: sums of large activations leave its range.
    """
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if a.is_cuda and torch.version.cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


def sum_over_tokens(g_TO: Tensor, x_TI: Tensor) -> Tensor:
    """g' x (O, I), what the gradient of a matrix sums over the tokens; see `product`."""
    return product(g_TO.t(), x_TI)


#: 16-bit numbers that are widened at a time where no kernel sums their squares in fp32.
_CHUNK = 2**17


def square_sums(x_TI: Tensor) -> Tensor:
    """Sums (T, 1) of each row's squares, in fp32 or wider, without a wide copy of x."""
    exact = wide(x_TI.dtype)
    if x_TI.dtype == exact or x_TI.device.type != "cpu" or torch.compiler.is_compiling():
        norms = torch.linalg.vector_norm(x_TI, dim=1, keepdim=True, dtype=exact)
    else:
        parts = torch.split(x_TI, max(1, _CHUNK // x_TI.shape[1]))
        norms = torch.cat([torch.linalg.vector_norm(part.to(exact), dim=1, keepdim=True) for part in parts])
    return torch.square(norms)


class _CastLinearFunction(torch.autograd.Function):
    """y = x W' + b with an fp32 W, computed in x's dtype.

    Saves the parameter itself, and x if W trains (where only b does, no activation is kept); the cast copy of
    W is formed again in the backward, since keeping it from forward to backward would cost 2 bytes a parameter
    of the whole model at the peak.
    Shapes: x (T, in), weight (out, in), bias (out) or None, y (T, out).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_TO = grads[0]
        x_TI, weight = ctx.saved_tensors
        dx = g_TO @ weight.to(g_TO.dtype) if ctx.needs_input_grad[0] else None
        dw = (g_TO.t() @ x_TI).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = None
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db


def cast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, own: torch.dtype) -> Tensor:
    """A linear layer computed in the dtype `own` (or autocast's); `weight` (out, in) and `bias` (out) may be fp32.

    x is cast, too: T5 looks at the dtype of a weight and hands its layer an input widened to it.
    """
    return apply_rows(_CastLinearFunction, x, weight, bias, own=own)


class _Held(Swapped):
    """Mixin of a module whose own parameters are fp32 and computed in another dtype."""

    label = "Held"
    trimtab_dtype: torch.dtype


class _HeldLinear(_Held):
    def forward(self, x: Tensor) -> Tensor:
        return cast_linear(x, self.weight, self.bias, self.trimtab_dtype)  # type: ignore[attr-defined]


class _HeldConv1D(_Held):
    """GPT-2's linear layer, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return cast_linear(x, self.weight.t(), self.bias, self.trimtab_dtype)  # type: ignore[attr-defined]


class _HeldEmbedding(_Held):
    """Casts the rows that were looked up, not the table."""

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = super().forward(ids)  # type: ignore[misc]
        return rows.to(self.trimtab_dtype)


class _HeldAny(_Held):
    """Any other module (norms, and whatever a model brings): it sees cast copies during its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # nn.MultiheadAttention reads the weight of its output projection without calling it.
        readers: list[Any] = [self, self.out_proj] if isinstance(self, nn.MultiheadAttention) else [self]
        shadowed = []
        try:
            for module in readers:
                for name, p in module._parameters.items():
                    if p is not None and p.dtype == torch.float32:
                        # An entry of __dict__ wins over nn.Module.__getattr__: the copy is found under the name.
                        module.__dict__[name] = p.to(self.trimtab_dtype)
                        shadowed.append((module, name))
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for module, name in shadowed:
                del module.__dict__[name]


def hold(module: nn.Module, dtype: torch.dtype) -> None:
    """Let `module` compute in `dtype` whichever of its own parameters are held in fp32."""
    if dtype in (torch.float32, torch.float64) or isinstance(module, _Held):
        return
    mixin: type[_Held]
    if type(module) is nn.Linear:
        mixin = _HeldLinear
    elif is_conv1d(module):
        mixin = _HeldConv1D
    elif isinstance(module, nn.Embedding):
        mixin = _HeldEmbedding
    else:
        mixin = _HeldAny
    put_on(module, mixin)
    module.__dict__["trimtab_dtype"] = dtype


def release(module: nn.Module) -> None:
    """Give a held module its own class back; the dtype of its parameters is the caller's to set."""
    if isinstance(module, _Held):
        take_off(module, _Held)
        del module.__dict__["trimtab_dtype"]
