"""DoRA (arXiv 2402.09353): the low-rank update turns the rows of a weight, and a vector sets their lengths.

Legend: T tokens, I in_features, O out_features, R rank.

    V_OI = W + s B A        n_O = |V| of each row, taken as a constant in the backward (section 4.3)
    c_O = m / n             W'_OI = c V

Forward:   y_TO = c (x W' + s (x A') B') + b
Backward, with k_TO = c g and h_TR = s k B:
    dx_TI = k W + h A       dA_RI = h' x        dB_OR = s k' (x A')        dm_O = sum over T of g (x V') / n

V is never formed. Its row norms come from three skinny products, of which the first costs what r tokens cost:
    n^2 = |W|^2 + 2 s B . (W A') + s^2 (B (A A')) . B        (. multiplies entries and sums each row)
and |W|^2 is kept, since W is frozen. A write into W need not show (fused optimizers, `.data` and compiled forwards
raise no version), so each forward also sums the squares in one pass in fp32, and takes these sums for the rows in
which they are not what they were when |W|^2 was formed. That reads W once more, with the operations of one token, and
waits for no device.

Saved for the backward are x, which every layer that reads it shares, and two vectors of output width; x V', which dm
needs, is formed again: one product more than LoRA's backward.

With dropout the branch sees drop(x), and y = x W' + b + (c - 1) (drop(x) W') + c s (drop(x) A') B', as PEFT has it:
a second product with W in the forward, and another in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.dropping import draw_seed, dropped, gain
from trimtab.nn.precision import apply_rows, column_sum, compute_dtype_of, without_autocast
from trimtab.nn.weights import Holder

Context = Any

#: Sums of squares in fp32 that differ by no more than this share are of one row: the order of summing may differ.
_SAME = 2.0**-20


@torch.no_grad()
def row_squares(base: Holder, weight: Tensor) -> Tensor:
    """|W|^2 of each output row (O,), summed in float64, in fp32 or wider."""
    parts = []
    for block in base.row_blocks(weight):
        rows = base.rows(weight, block)
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        parts.append(rows.to(wide).square().sum(1).to(rows.dtype))
    return torch.cat(parts)


@torch.no_grad()
def row_norms(
    base: Holder, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, squares: Tensor, dtype: torch.dtype
) -> Tensor:
    """|W + s B A| of each output row (O,), as wide as `squares`.

    Args:
        base: the holder of `weight`.
        weight: as `base` stores it.
        lora_A: (R, I).
        lora_B: (O, R).
        scale: s.
        squares: |W|^2 of each row (O,).
        dtype: in which to multiply with W: that of the activations.
    """
    a, b = lora_A.to(squares.dtype), lora_B.to(squares.dtype)
    crossed_OR = base.matmul(weight, lora_A.to(dtype), None).t().to(squares.dtype)
    crossed_OR = crossed_OR.mul(2 * scale).addmm_(b, a @ a.t(), alpha=scale * scale)
    return crossed_OR.mul_(b).sum(1).add_(squares).clamp_(min=0).sqrt_()


def _share(magnitude: Tensor, norms: Tensor) -> Tensor:
    """c = m / n, and 1 for a row of zeros, which has no direction."""
    return torch.where(norms > 0, magnitude.to(norms.dtype) / norms, 1.0)


class _DoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        norms: Tensor,
        base: Holder,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        gained = gain(dropout)
        scale *= gained
        ctx.base, ctx.scale, ctx.dropout, ctx.seed = base, scale, dropout, seed
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, norms)
        ctx.bias_dtype = None if bias is None else bias.dtype
        c_O = _share(magnitude, norms)
        branch = x if seed is None else x.masked_fill(dropped(x, dropout, seed), 0)
        u_TR = branch @ lora_A.to(x.dtype).t()
        y_TO = base.matmul(weight, x, bias)
        if seed is None:
            y_TO.mul_(c_O)
            if bias is not None:
                y_TO.add_(bias * (1 - c_O))  # exactly nothing as long as c = 1
        else:
            y_TO.add_(base.matmul(weight, branch, None).mul_((c_O - 1) * gained))
        return y_TO.addmm_(u_TR, (lora_B * (c_O * scale)[:, None]).to(x.dtype).t())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, weight, lora_A, lora_B, magnitude, norms = ctx.saved_tensors
        need_x, need_w, need_b, need_A, need_B, need_m = ctx.needs_input_grad[:6]
        a_RI, b_OR = lora_A.to(g_TO.dtype), (lora_B * ctx.scale).to(g_TO.dtype)
        mask = None if ctx.seed is None else dropped(x_TI, ctx.dropout, ctx.seed)
        branch = x_TI if mask is None else x_TI.masked_fill(mask, 0)
        gained = gain(ctx.dropout)
        dx = dw = db = dA = dB = dm = None
        k_TO = (g_TO * _share(magnitude, norms)).to(g_TO.dtype)
        h_TR = k_TO @ b_OR
        if need_A:
            dA = (h_TR.t() @ branch).to(lora_A.dtype)
        if need_B or need_m:
            u_TR = branch @ a_RI.t()
            if need_B:
                dB = (k_TO.t() @ u_TR).to(lora_B.dtype).mul_(ctx.scale)
            if need_m:
                dm = ctx.base.matmul(weight, branch, None).mul_(gained).addmm_(u_TR, b_OR.t()).mul_(g_TO)
                dm = dm.sum(0, dtype=norms.dtype)
                dm = torch.where(norms > 0, dm / norms, 0.0).to(magnitude.dtype)
        if need_x:
            if mask is None:
                dx = ctx.base.grad_input(weight, k_TO).addmm_(h_TR, a_RI)
            else:
                through = ctx.base.grad_input(weight, (k_TO - g_TO).mul_(gained)).addmm_(h_TR, a_RI)
                dx = ctx.base.grad_input(weight, g_TO).add_(through.masked_fill_(mask, 0))
        if need_w:
            dw = ctx.base.grad_weight(branch, k_TO) * gained
            if mask is not None:
                dw = dw + ctx.base.grad_weight(x_TI - branch * gained, g_TO)
            dw = dw.to(weight.dtype)
        if need_b:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db, dA, dB, dm, None, None, None, None, None


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    base: Holder,
    scale: float,
    squares: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """C (x W' + s x A' B') + b with c = m / |W + s B A|, of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        lora_A: (r, in), usually fp32.
        lora_B: (out, r), usually fp32.
        magnitude: m (out,), usually fp32.
        base: the holder of `weight`.
        scale: s.
        squares: |W|^2 of each row (out,), from `row_squares`.
        dropout: probability of dropping an entry of the branch's input; 0 outside training.
    """
    dtype = compute_dtype_of(x)
    with without_autocast(x.device.type):
        norms = row_norms(base, weight, lora_A, lora_B, scale, squares, dtype)
    seed = draw_seed(dropout)
    return apply_rows(_DoRAFunction, x, weight, bias, lora_A, lora_B, magnitude, norms, base, scale, dropout, seed)


def _state_of(base: Holder, weight: Tensor) -> tuple[object, ...]:
    """What mostly tells one value of a weight from another without reading it: where it lies, how often it was written.

    A swap of `.data` leaves the version alone and changes the place; a write in place does the opposite.
    """
    tensors = [weight, *base.stored(weight).values()]
    return tuple((str(t.device), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


class DoRAMixin(Adapted):
    """A linear layer whose rows are turned by a LoRA branch and stretched by a vector.

    Attributes:
        squares: the state of the weight, its |W|^2 of each row in fp32, and exactly; None where they are to be
            formed anew.
    """

    label = "DoRA"
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    starts_at_zero = "lora_B"
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter
    scale: float
    dropout: float
    squares: tuple[tuple[object, ...], Tensor, Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        return dora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            base=self.base,
            scale=self.scale,
            squares=self.known_squares(),
            dropout=self.dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def known_squares(self) -> Tensor:
        """|W|^2 of each row of the weight as it is now, on its device."""
        compiling = torch.compiler.is_compiling()  # a compiled forward cannot ask for the weight's state
        state = () if compiling else _state_of(self.base, self.weight)
        now, known = self.base.quick_squares(self.weight), self.squares
        if known is None or known[1].device != self.weight.device or not (compiling or known[0] == state):
            known = self.squares = (state, now, row_squares(self.base, self.weight))
        _, then, exact = known
        return torch.where((now - then).abs() <= then * _SAME, exact, now.to(exact.dtype))

    @torch.no_grad()
    def set_magnitude(self) -> None:
        """Let m be the lengths that the rows have now, so that c = 1: to the bit, if A and B stay."""
        self.squares = None
        norms = row_norms(
            self.base, self.weight, self.lora_A, self.lora_B, self.scale, self.known_squares(), self.lora_A.dtype
        )
        self.lora_magnitude_vector.copy_(norms)

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """M (W + carry + s B A) / |W + carry + s B A|, the lengths rounded as in the forward, so that c can be 1."""
        rows = rows.addmm_(self.lora_B[block].to(rows), self.lora_A.to(rows), alpha=self.scale)
        dtype = torch.promote_types(self.lora_magnitude_vector.dtype, torch.float32)
        norms = rows.square().sum(1).to(dtype).sqrt_()
        return rows.mul_(_share(self.lora_magnitude_vector[block], norms)[:, None])
