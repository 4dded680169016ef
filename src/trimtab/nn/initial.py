"""What the two factors of a low-rank update B A start from.

    kaiming      A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: what the authors of LoRA (arXiv 2106.09685) wrote in code
    gaussian     A ~ N(0, 1/r^2), B = 0: PEFT's way to what they wrote in the paper
    orthogonal   A and B both other than 0, with B A = 0, so that both learn from the first step on (PEFT's
                 "orthogonal", from datta0.github.io/posts/rethink-lora-init)
    pissa        s B A = the r largest singular components of W, which leave W (arXiv 2404.02948)

Legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trimtab.nn.draw import stable_generator
from trimtab.nn.lowrank import draw_a

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa"]


@torch.no_grad()
def draw_factors(init: Init, a_RI: Tensor, b_OR: Tensor, *key: object) -> None:
    """Fill A and B with what `init` draws, the same on every device; `key` is the seed.

    PiSSA draws nothing, so it leaves them alone (see `principal_factors`).
    """
    if a_RI.device.type == "meta" or init == "pissa":
        return
    generator = stable_generator(*key)
    if init == "orthogonal":
        _draw_orthogonal(a_RI, b_OR, generator)
        return
    if init == "gaussian":
        a_RI.copy_(torch.randn(a_RI.shape, generator=generator) / a_RI.shape[0])
    else:
        draw_a(a_RI, generator)
    b_OR.zero_()


def _draw_orthogonal(a_RI: Tensor, b_OR: Tensor, generator: torch.Generator) -> None:
    """A = G Q_even, B = H Q_odd with the rows of an orthogonal Q, so that B A = H Q_odd Q_even' G' = 0.

    PEFT draws Q, and in 16 bits its B A is rounding noise. Any orthogonal Q does: with pairs of (1, 1) and (1, -1)
    the rows of A are equal in pairs and the columns of B opposite, and B A = 0 holds in every dtype.
    """
    half, share = a_RI.shape[0] // 2, 0.1 / 2**0.5
    g = torch.randn(half, a_RI.shape[1], generator=generator) * share
    h = torch.randn(b_OR.shape[0], half, generator=generator) * share
    a_RI.copy_(g.repeat_interleave(2, dim=0))
    b_OR.copy_(torch.stack((h, -h), dim=2).flatten(1))


@torch.no_grad()
def principal_factors(weight_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with `scale` B A = the `rank` largest singular components of a weight.

    Raises:
        RuntimeError (LinAlgError): the weight is not finite.
    """
    u, s, v = torch.linalg.svd(weight_OI, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


@torch.no_grad()
def stacked(terms: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B, in fp32, with B A = the sum of c B_i A_i over the terms (c, A_i, B_i).

    They are the terms' factors one beside the other, so no product is formed. Where the ranks add up to more than
    the matrix has, the sum itself is one factor and a unit matrix the other.
    """
    a = torch.cat([a for _, a, _ in terms]).float()
    b = torch.cat([c * b.float() for c, _, b in terms], dim=1)
    size = min(b.shape[0], a.shape[1])
    if len(a) <= size:
        return a, b
    product = (b.double() @ a.double()).float()
    unit = torch.eye(size, device=a.device)
    return (unit, product) if product.shape[1] == size else (product, unit)
