"""The LoRA layer, its hand-written backward, and its merge.

Legend: T tokens, I in_features, O out_features, R rank.

Forward (arXiv 2106.09685, equation 3):  y_TO = x_TI W_OI' + b + s (drop(x)_TI A_RI') B_OR'
Backward, with h_TR = s g_TO B_OR and u_TR = drop(x) A':
    dB_OR = s g' u        dA_RI = h' drop(x)        dx_TI = g W + undrop(h A)

The function saves x alone, which every layer that reads it shares; u is a skinny product and is formed
again, and nothing of output width is kept or made beside y itself: s is folded into the small matrix and
the low-rank term is added into y by `addmm_`. A dropout mask is not stored either: it is regenerated from
a seed that was drawn from torch's CPU generator.

A and B are fp32 parameters, cast to the activations' dtype here; W is whatever its holder says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.precision import compute_dtype_of
from trimtab.nn.weights import Dense

Context = Any


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The mask of `seed`, of x's shape and dtype: 0 with probability p, else 1 / (1 - p)."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p, generator=generator)
    return keep.div_(1.0 - p)


class _LoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        base: Dense,
        scale: float,
        dropout: float,
    ) -> Tensor:
        ctx.base, ctx.scale, ctx.dropout = base, scale, dropout
        ctx.seed = int(torch.randint(2**62, (), device="cpu").item()) if dropout else 0
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        branch = x * dropout_mask(x, dropout, ctx.seed) if dropout else x
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
        mask = dropout_mask(x_TI, ctx.dropout, ctx.seed) if ctx.dropout else None
        branch = x_TI if mask is None else x_TI * mask
        if need_x or need_A:
            h_TR = g_TO @ (lora_B * ctx.scale).to(g_TO.dtype)
            if need_A:
                dA = (h_TR.t() @ branch).to(lora_A.dtype)
            if need_x:
                dx = ctx.base.grad_input(weight, g_TO)
                dx = dx.addmm_(h_TR, a_RI) if mask is None else dx.addcmul_(h_TR @ a_RI, mask)
        if need_B:
            dB = (g_TO.t() @ (branch @ a_RI.t())).to(lora_B.dtype).mul_(ctx.scale)
        if need_w:
            dw = ctx.base.grad_weight(x_TI, g_TO).to(weight.dtype)
        if need_b:
            db = g_TO.sum(0, dtype=torch.promote_types(g_TO.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, dw, db, dA, dB, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    base: Dense,
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
    flat = x.to(compute_dtype_of(x)).reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _LoRAFunction.apply(flat, weight, bias, lora_A, lora_B, base, scale, dropout)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], lora_B.shape[0])


class LoRAMixin:
    """What an adapted layer has beside its frozen weight; the layer's class is swapped in place."""

    weight: Any
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    base: Dense
    scale: float
    dropout: float
    training: bool
    plain_class: type[nn.Module]

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

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + carry + s B A in fp32, of shape (out, in), on the CPU."""
        value = torch.cat([self._sum(block).float().cpu() for block in self.base.row_blocks(self.weight)])
        return value.t().contiguous() if self.base.transposed else value

    @torch.no_grad()
    def merge_(self) -> None:
        """W + carry += s B A, a block of rows at a time; A and B are left as they are."""
        for block in self.base.row_blocks(self.weight):
            self.base.write_rows(self.weight, block, self._sum(block))

    def _sum(self, block: slice) -> Tensor:
        """W + carry + s B A of a block of stored rows, in float64, so that storing it is the only rounding.

        The product is a few parts in a thousand of a training step's work even where float64 is slow, and
        no setting of the user (TF32, bf16 in oneDNN) applies to it. MPS has no float64 and sums in fp32.
        """
        wide = torch.float32 if self.weight.device.type == "mps" else torch.float64
        left, right = self.lora_B.to(wide), self.lora_A.to(wide)
        if self.base.transposed:
            left, right = right.t(), left.t()
        return self.base.rows(self.weight, block).to(wide).addmm_(left[block], right, alpha=self.scale)


class LoRALinear(LoRAMixin, nn.Linear):
    """An nn.Linear with a LoRA branch."""


class LoRAConv1D(LoRAMixin, nn.Module):
    """GPT-2's Conv1D, whose weight is (in, out), with a LoRA branch."""


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


def adapt(module: nn.Module, *, rank: int, scale: float, dropout: float, base: Dense, dtype: torch.dtype) -> None:
    """Turn an nn.Linear or Conv1D into an adapted layer in place: A empty, B = 0, both of `dtype`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    out_features, in_features = reversed(weight.shape) if base.transposed else weight.shape
    plain = type(module)
    module.__class__ = LoRAConv1D if base.transposed else LoRALinear
    module.__dict__.update(plain_class=plain, base=base, scale=scale, dropout=dropout)
    module.lora_A = nn.Parameter(torch.zeros(rank, in_features, dtype=dtype, device=weight.device))
    module.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=weight.device))


def strip(module: nn.Module) -> None:
    """Take the adapter off a layer; its weight is left as it stands."""
    plain = module.__dict__.pop("plain_class")
    del module.lora_A, module.lora_B
    for name in ("base", "scale", "dropout"):
        del module.__dict__[name]
    module.__class__ = plain
