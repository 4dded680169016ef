"""LoRA on an embedding: y = W[ids] + s (B A)[:, ids]', without a gradient of the table's size.

Legend: T tokens, N entries of the table, D its width, R rank.

Forward:   y_TD = W_ND[ids] + s u_TR B_DR'  with u = A_RN[:, ids]'
Backward, with h_TR = s g_TD B:  dA[:, ids] += h'   dB = s g' u

As in PEFT (and in the authors' code) A starts at zero and B is drawn from N(0, 1), nothing is dropped, and the
padding entry learns nothing. Saved for the backward are the ids alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.adapted import Adapted
from trimtab.nn.draw import stable_generator

Context = Any


class _LoRAEmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids, lora_A, lora_B)
        ctx.scale, ctx.padding = scale, padding
        y_TD = F.embedding(ids, weight)
        return y_TD.addmm_(lora_A[:, ids].to(y_TD.dtype).t(), (lora_B * scale).to(y_TD.dtype).t())

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        g_TD = grads[0]
        ids, lora_A, lora_B = ctx.saved_tensors
        dA = dB = None
        if ctx.needs_input_grad[2]:
            h_TR = (g_TD @ (lora_B * ctx.scale).to(g_TD.dtype)).to(lora_A.dtype)
            dA = torch.zeros_like(lora_A).index_add_(1, ids, h_TR.t())
            if ctx.padding is not None:
                dA[:, ctx.padding] = 0
        if ctx.needs_input_grad[3]:
            dB = (g_TD.t() @ lora_A[:, ids].to(g_TD.dtype).t()).to(lora_B.dtype).mul_(ctx.scale)
        return None, None, dA, dB, None, None


def lora_embedding(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scale: float, padding: int | None = None
) -> Tensor:
    """W[ids] + s (B A)[:, ids]', of shape (..., dim), in the dtype of W, which is frozen.

    Args:
        ids: (...), integers.
        weight: (num, dim).
        lora_A: (r, num), usually fp32.
        lora_B: (dim, r), usually fp32.
        scale: s.
        padding: the entry of A that learns nothing.
    """
    with torch.autocast(weight.device.type, enabled=False):
        out: Tensor = _LoRAEmbeddingFunction.apply(ids.reshape(-1), weight, lora_A, lora_B, scale, padding)  # type: ignore[no-untyped-call]
    return out.view(*ids.shape, weight.shape[1])


class LoRAEmbeddingMixin(Adapted):
    """An embedding with a LoRA branch beside its frozen table."""

    label = "LoRA"
    parts = ("lora_embedding_A", "lora_embedding_B")
    starts_at_zero = "lora_embedding_A"
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter
    padding_idx: int | None
    scale: float

    def forward(self, ids: Tensor) -> Tensor:
        return lora_embedding(
            ids,
            self.weight,
            self.lora_embedding_A,
            self.lora_embedding_B,
            scale=self.scale,
            padding=self.padding_idx,
        )

    def merged_rows(self, rows: Tensor, block: slice) -> Tensor:
        """W + carry + s (B A)', of which the rows are the table's entries."""
        a, b = self.lora_embedding_A[:, block].to(rows), self.lora_embedding_B.to(rows)
        return rows.addmm_(a.t(), b.t(), alpha=self.scale)

    @torch.no_grad()
    def draw(self, *key: object) -> None:
        """A = 0, and B from N(0, 1), the same on every device."""
        self.lora_embedding_A.zero_()
        if self.lora_embedding_B.device.type != "meta":
            drawn = torch.randn(self.lora_embedding_B.shape, generator=stable_generator(*key))
            self.lora_embedding_B.copy_(drawn)


def embedding_fault(module: nn.Module) -> str:
    """Why LoRA cannot be put on this embedding; empty if it can."""
    assert isinstance(module, nn.Embedding)
    if type(module) is not nn.Embedding:
        return f"a {type(module).__name__}, whose forward does more than a look-up"
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return "an embedding with max_norm, sparse or scale_grad_by_freq, which LoRA would pass over"
    return ""
