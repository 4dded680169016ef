"""AdaLoRA's layer, its hand-written backward, its merge, and its orthogonality term.

Legend: T tokens, I in_features, O out_features, R rank, N matrices of one width.

Forward (arXiv 2303.10512, equation 3, with P = lora_B, Lambda = lora_E, Q = lora_A, as PEFT names them):
    y_TO = x_TI W_OI' + b + s ((drop(x)_TI Q_RI') * Lambda_R) P_OR'
Backward, with h_TR = s g_TO (P * Lambda)_OR, u_TR = drop(x) Q' and M_OR = g' u:
    dP_OR = s M * Lambda     dLambda_R = s sum over O of (M * P)     dQ_RI = h' drop(x)     dx_TI = g W + undrop(h Q)

Lambda is folded into P, the smaller matrix, so what LoRA's function keeps is all that is kept: x, which every
layer that reads it shares. Lambda's gradient comes from M, which P's needs anyway: nothing more of T rows is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.dropping import draw_seed, dropped, gain
from trimtab.nn.precision import apply_rows, column_sum, without_autocast
from trimtab.nn.weights import Holder

Context = Any

#: Prefixes of the averages' names, before their parameter's name.
AVERAGES = ("importance:", "uncertainty:")


class _AdaLoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_E: Tensor,
        lora_B: Tensor,
        base: Holder,
        scale: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        scale *= gain(dropout)
        ctx.base, ctx.scale, ctx.dropout, ctx.seed = base, scale, dropout, seed
        ctx.save_for_backward(x, weight, lora_A, lora_E, lora_B)
        ctx.bias_dtype = None if bias is None else bias.dtype
        branch = x if seed is None else x.masked_fill(dropped(x, dropout, seed), 0)
        u_TR = branch @ lora_A.to(x.dtype).t()
        y_TO = base.matmul(weight, x, bias)
        return y_TO.addmm_(u_TR, _folded(lora_B, lora_E, scale, x.dtype).t())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TO = grads[0]
        x_TI, weight, lora_A, lora_E, lora_B = ctx.saved_tensors
        need_x, need_w, need_b, need_A, need_E, need_B = ctx.needs_input_grad[:6]
        a_RI = lora_A.to(g_TO.dtype)
        dx = dw = db = dA = dE = dB = None
        mask = None if ctx.seed is None else dropped(x_TI, ctx.dropout, ctx.seed)
        branch = x_TI if mask is None else x_TI.masked_fill(mask, 0)
        if need_x or need_A:
            h_TR = g_TO @ _folded(lora_B, lora_E, ctx.scale, g_TO.dtype)
            if need_A:
                dA = (h_TR.t() @ branch).to(lora_A.dtype)
            if need_x:
                dx = ctx.base.grad_input(weight, g_TO)
                dx = dx.addmm_(h_TR, a_RI) if mask is None else dx.add_((h_TR @ a_RI).masked_fill_(mask, 0))
        if need_E or need_B:
            m_OR = (g_TO.t() @ (branch @ a_RI.t())).to(lora_B.dtype).mul_(ctx.scale)
            if need_E:
                dE = (m_OR * lora_B).sum(0).unsqueeze(1).to(lora_E.dtype)
            if need_B:
                dB = m_OR.mul_(lora_E.t())
        if need_w:
            dw = ctx.base.grad_weight(x_TI, g_TO).to(weight.dtype)
        if need_b:
            db = column_sum(g_TO, ctx.bias_dtype)
        return dx, dw, db, dA, dE, dB, None, None, None, None


def _folded(lora_B: Tensor, lora_E: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s P Lambda, of shape (out, r), rounded once."""
    return (lora_B * (lora_E.t() * scale)).to(dtype)


def adalora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    base: Holder,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """X W' + b + s drop(x) Q' Lambda P', of shape (..., out), in x's (or autocast's) dtype.

    Args:
        x: (..., in).
        weight: the frozen weight as `base` stores it.
        bias: (out,) or None.
        lora_A: Q, (r, in), usually fp32.
        lora_E: Lambda, (r, 1), usually fp32.
        lora_B: P, (out, r), usually fp32.
        base: the holder of `weight`.
        scale: s.
        dropout: probability of dropping an entry of the branch's input; 0 outside training.
    """
    seed = draw_seed(dropout)
    return apply_rows(_AdaLoRAFunction, x, weight, bias, lora_A, lora_E, lora_B, base, scale, dropout, seed)


class AdaLoRAMixin(Adapted):
    """A linear layer with the triplets P, Lambda, Q beside its frozen weight."""

    label = "AdaLoRA"
    parts = ("lora_A", "lora_E", "lora_B")
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        return adalora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_E,
            self.lora_B,
            base=self.base,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """W + carry + s P Lambda Q."""
        p_Lambda = self.lora_B[block].to(rows) * self.lora_E.to(rows).t()
        return rows.addmm_(p_Lambda, self.lora_A.to(rows), alpha=self.scale)


def _by_shape(matrices: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the matrices, those of one shape and device together: one batched product for each."""
    groups: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(index)
    return list(groups.values())


class _OrthogonalityFunction(torch.autograd.Function):
    """mean over k of ||V_k V_k' - I||, the Frobenius norm not squared; V_k is (R, width).

    Gradient: with G = V V' - I, d||G|| / dV = 2 G V / ||G||; taken as 0 where G = 0. Kept are the parameters
    themselves and G / ||G||, (N, R, R).
    """

    @staticmethod
    def forward(ctx: Context, *vectors: Tensor) -> Tensor:
        total = vectors[0].new_zeros((), dtype=torch.promote_types(vectors[0].dtype, torch.float32))
        ctx.groups, directions = _by_shape(vectors), []
        for group in ctx.groups:
            v_NRW = torch.stack([vectors[i] for i in group]).to(total.dtype)
            gram_NRR = torch.bmm(v_NRW, v_NRW.transpose(1, 2))
            gram_NRR.diagonal(dim1=1, dim2=2).sub_(1.0)
            norm_N = torch.linalg.matrix_norm(gram_NRR)
            total += norm_N.sum().to(total.device)
            scale_N = torch.where(norm_N > 0, 2.0 / (norm_N * len(vectors)), 0.0)
            directions.append(gram_NRR.mul_(scale_N[:, None, None]))
        ctx.save_for_backward(*vectors, *directions)
        return total / len(vectors)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        vectors, directions = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        out: list[Tensor | None] = [None] * count
        for group, direction_NRR in zip(ctx.groups, directions, strict=True):
            v_NRW = torch.stack([vectors[i] for i in group]).to(direction_NRR.dtype)
            d_NRW = torch.bmm(direction_NRR * grads[0].to(direction_NRR.device), v_NRW)
            for i, d in zip(group, d_NRW.unbind(), strict=True):
                out[i] = d.to(vectors[i].dtype)
        return tuple(out)


def orthogonality(rows: Sequence[Tensor]) -> Tensor:
    """mean over k of ||V_k V_k' - I||_F, a scalar in fp32 or wider, on the first matrix's device.

    Args:
        rows: matrices (r, width) whose rows are to be orthonormal: every Q, and every P transposed.
    """
    with without_autocast(rows[0].device.type):
        out: Tensor = _OrthogonalityFunction.apply(*rows)  # type: ignore[no-untyped-call]
    return out


class Importance:
    """How much each entry of some parameters matters (arXiv 2303.10512, equations 8 to 10).

    I = |w g| is averaged with `beta1`, and its distance from that average (the new one) with `beta2`; an entry's
    importance is the product of the two. Both averages are held in fp32 or wider: 8 bytes an entry.

    Attributes:
        averages: for each parameter's name the averages of I and of its distance; empty before the first `update`.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def update(self, parts: Mapping[str, nn.Parameter]) -> None:
        """Take a step in, from the parameters after it and the gradients it was made with; no gradient counts as 0."""
        if not self.averages:
            for name, part in parts.items():
                dtype = torch.promote_types(part.dtype, torch.float32)
                self.averages[name] = (torch.zeros_like(part, dtype=dtype), torch.zeros_like(part, dtype=dtype))
        means, spreads = ([self.averages[name][side] for name in parts] for side in (0, 1))
        weighed = [
            part.to(mean.dtype) * (0.0 if part.grad is None else part.grad)
            for part, mean in zip(parts.values(), means, strict=True)
        ]
        torch._foreach_abs_(weighed)
        torch._foreach_mul_(means, self.beta1)
        torch._foreach_add_(means, weighed, alpha=1 - self.beta1)
        torch._foreach_sub_(weighed, means)
        torch._foreach_abs_(weighed)
        torch._foreach_mul_(spreads, self.beta2)
        torch._foreach_add_(spreads, weighed, alpha=1 - self.beta2)

    def of_triplets(self, layer: str) -> Tensor:
        """The importance (r,) of a layer's triplets: Lambda's entry's, and the means of Q's row's and P's column's."""
        entries = [torch.mul(*self.averages[f"{layer}.{leaf}"]) for leaf in ("lora_E", "lora_A", "lora_B")]
        return entries[0][:, 0] + (entries[1].mean(1) + entries[2].mean(0))

    def tensors(self) -> dict[str, Tensor]:
        """All averages by name, for a state."""
        return {
            prefix + name: average
            for name, pair in self.averages.items()
            for prefix, average in zip(AVERAGES, pair, strict=True)
        }

    def take(self, tensors: Mapping[str, Tensor], parts: Mapping[str, nn.Parameter]) -> None:
        """Take up `tensors()` of another time.

        Raises:
            KeyError: one is missing.
        """
        self.averages.clear()
        for name, part in parts.items() if tensors else ():
            first, second = (tensors[prefix + name].to(part.device, copy=True) for prefix in AVERAGES)
            self.averages[name] = (first, second)
