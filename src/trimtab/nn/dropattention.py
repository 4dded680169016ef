"""Scaled dot-product attention with dropout, which keeps its inputs and a seed only.

On the CPU torch has no fused attention with dropout: `scaled_dot_product_attention` then computes in fp32 step by step,
and each step keeps its result, several times the probabilities of all heads. Here the probabilities of a few examples
at a time are computed, and again in the backward pass, as FlashAttention does (Dao et al. 2022, Algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.nn.dropping import can_drop, dropped, gain, new_seed
from trimtab.nn.sdpa import Asked

#: Probabilities that are computed at a time, but at least those of one example.
_AT_A_TIME = 2**20


def attention(asked: Asked) -> Tensor | None:
    """`torch.nn.functional.scaled_dot_product_attention`, or None where that one is to be used.

    That is without dropout, on other devices than the CPU, under autocast, with a mask that gets a gradient, with other
    than four dimensions (examples, heads, positions, features), where nothing gets a gradient, and with what torch
    refuses.
    """
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = asked
    parts = (query, key, value)
    if not can_drop(dropout_p) or not any(part.requires_grad for part in parts) or torch.is_autocast_enabled("cpu"):
        return None
    if any(type(part) is not Tensor or part.dim() != 4 or part.device.type != "cpu" for part in parts):
        return None
    if len({part.dtype for part in parts}) > 1 or not all(part.numel() for part in parts):
        return None
    if attn_mask is not None and (attn_mask.requires_grad or attn_mask.dim() > 4 or is_causal):
        return None
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        return None
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    if key.shape[:2] != query.shape[:2] or value.shape[:2] != query.shape[:2]:
        return None
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = _Attention.apply(query, key, value, attn_mask, factor, dropout_p, new_seed())  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    """softmax(scale Q K^T + mask), dropped, times V: in fp32 for what is narrower, a few examples at a time."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float, seed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask, seed)
        ctx.scale, ctx.p = scale, p
        examples, heads, length, _ = query.shape
        # (examples, positions, heads, features) in memory: what follows it in a model reads it so, without a copy.
        out = query.new_empty(examples, length, heads, value.shape[-1]).transpose(1, 2)
        for at, _, _, v, probabilities, stay in _pieces(query, key, value, mask, scale, p, seed):
            out[at] = (probabilities.mul_(stay) @ v).mul_(gain(p))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, seed = ctx.saved_tensors
        scale, factor = ctx.scale, gain(ctx.p)
        grads = [
            _like(part) if needed else None
            for part, needed in zip((query, key, value), ctx.needs_input_grad[:3], strict=True)
        ]
        for at, q, k, v, probabilities, stay in _pieces(query, key, value, mask, scale, ctx.p, seed):
            out = grad[at].to(v.dtype) * factor
            stay = stay.to(v.dtype)  # it is multiplied by twice, and bits are slow at that
            if grads[2] is not None:
                grads[2][at] = (probabilities * stay).transpose(-1, -2) @ out
            if grads[0] is None and grads[1] is None:
                continue
            # The gradient at the probabilities, then at the scores, of which q has the scale already.
            scores = (out @ v.transpose(-1, -2)).mul_(stay)
            scores = torch.ops.aten._softmax_backward_data(scores, probabilities, -1, scores.dtype)
            if grads[0] is not None:
                grads[0][at] = (scores @ k).mul_(scale)
            if grads[1] is not None:
                grads[1][at] = scores.transpose(-1, -2) @ q
        return (*grads, None, None, None, None)


def _like(part: Tensor) -> Tensor:
    """Room for a gradient, in memory as (examples, positions, heads, features)."""
    examples, heads, length, features = part.shape
    return part.new_empty(examples, length, heads, features).transpose(1, 2)


def _pieces(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float, seed: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of a few examples at a time: which, scale Q, K, V, the probabilities before dropout, and which of them stay."""
    examples, heads, length, _ = query.shape
    some = max(1, _AT_A_TIME // max(heads * length * key.shape[2], 1))
    dtype = torch.promote_types(query.dtype, torch.float32)
    added = None if mask is None else _added(mask, dtype)
    blind = None if added is None else added.amax(-1, keepdim=True) == float("-inf")
    for start in range(0, examples, some):
        at = slice(start, start + some)
        q, k, v = (part[at].to(dtype) for part in (query, key, value))
        q = q * scale
        scores = q @ k.transpose(-1, -2)
        if added is not None:
            scores.add_(_of(added, at))
        probabilities = scores.softmax(-1)
        if blind is not None and bool(blind.any()):  # positions that see nothing: torch gives zeros there
            probabilities.masked_fill_(_of(blind, at), 0.0)
        del scores
        yield at, q, k, v, probabilities, ~dropped(probabilities, p, seed + start)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores, with four dimensions."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _of(mask: Tensor, at: slice) -> Tensor:
    return mask if mask.shape[0] == 1 else mask[at]
