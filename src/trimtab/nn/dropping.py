"""Dropout that keeps no mask: which entries fall is drawn again from a seed.

A mask of ones and zeros is never made in the activations' dtype. Dropped entries are set to zero, and the factor that
makes up for them is the caller's to fold into a small matrix or a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: A probability is a multiple of one part in this many: 16 random bits an entry decide.
_PARTS = 2**16


def parts_of(p: float) -> int:
    """How many of 2^16 equal parts of all draws drop an entry.

    Raises:
        ValueError: p is so near to 0 or 1 that it would stand for dropping nothing or everything.
    """
    parts = round(p * _PARTS)
    if p and not 0 < parts < _PARTS:
        raise ValueError(f"a dropout of {p} would drop {'all' if parts else 'nothing'}: use 0, or 1.6e-05 to 0.99998")
    return parts


def can_drop(p: float) -> bool:
    """Whether p is a probability that `dropped` knows: not 0 or 1, nor what would round to them."""
    return 0 < round(p * _PARTS) < _PARTS


def draw_seed(dropout: float) -> Tensor | None:
    """A seed for `dropped`; None when nothing is dropped."""
    return new_seed() if dropout else None


def new_seed() -> Tensor:
    """A seed for `dropped` from torch's CPU generator.

    It stays a tensor, on the CPU: reading it as a number costs nothing there, and would break a compiled graph.
    """
    return torch.randint(2**62, (), device="cpu")


def gain(p: float) -> float:
    """1 / (1 - p), for the p that `dropped` uses: the nearest multiple of 2^-16."""
    return _PARTS / (_PARTS - parts_of(p))


def dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Which entries of x the seed drops: bool, of x's shape, each True with probability p.

    p is rounded to a multiple of 2^-16.
    """
    mask: Tensor = _dropped_op(x, p, seed) if torch.compiler.is_compiling() else _dropped(x, p, seed)
    return mask


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    if x.is_meta:  # there is no generator of that device, nor anything to draw
        return torch.empty_like(x, dtype=torch.bool)
    generator, parts = torch.Generator(device=x.device).manual_seed(int(seed)), parts_of(p)
    if x.device.type != "cpu":
        return torch.rand(x.shape, device=x.device, generator=generator) < parts / _PARTS
    # One draw of 64 bits serves four entries: a generator of the CPU works in one thread, and is what this costs.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (draws.view(torch.int16)[: x.numel()] < parts - _PARTS // 2).view(x.shape)


#: The mask as one operation that a compiler does not look into, since it cannot trace a generator.
_dropped_op: Any = torch.library.custom_op("trimtab::dropped", _dropped, mutates_args=())
_dropped_op.register_fake(lambda x, p, seed: torch.empty(x.shape, dtype=torch.bool, device=x.device))


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of x with probability p that keeps the seed alone: drops and scales by `gain(p)`, and so its gradient."""
    result: Tensor = _Dropout.apply(x, p, seed)  # type: ignore[no-untyped-call]
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _scaled(x, p, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if grad.requires_grad and torch.is_grad_enabled():
            return dropout(grad, ctx.p, ctx.seed), None, None
        return _scaled(grad, ctx.p, ctx.seed), None, None


def _scaled(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return (x * gain(p)).mul_(~dropped(x, p, seed))
