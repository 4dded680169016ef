"""LoRA's layers under torch.compile: one graph, the eager results, and one mask for forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.nn.dora import dora_linear, row_squares
from trimtab.nn.dropping import dropped
from trimtab.nn.lora_embedding import lora_embedding
from trimtab.nn.lowrank import lora_linear
from trimtab.nn.weights import Dense

KINDS = ("lora", "dora", "embedding")


def parts() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    leaves = [torch.randn(s).requires_grad_() for s in ((6, 8), (3, 8), (5, 3), (5,))]
    return (*leaves, torch.randn(5, 8), torch.randn(5))


def layer(kind: str, dropout: float, x: Tensor, a: Tensor, b: Tensor, m: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    base = Dense()
    if kind == "dora":
        squares = row_squares(base, w)
        return dora_linear(x, w, bias, a, b, m, base=base, scale=0.7, squares=squares, dropout=dropout)
    if kind == "lora":
        return lora_linear(x, w, bias, a, b, base=base, scale=0.7, dropout=dropout)
    return lora_embedding(torch.tensor([1, 3, 1]), w.t(), a, b, scale=0.7) * m


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_with_the_eager_results(kind: str) -> None:
    """fullgraph=True compiles, and outputs and gradients are those of eager mode."""
    leaves = parts()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(kind, 0.0, *leaves), layer(kind, 0.0, *leaves)
    assert torch.allclose(ours, eager, atol=1e-6)
    g = torch.randn_like(eager)
    trained = leaves[:3] if kind == "lora" else leaves[1:4] if kind == "embedding" else leaves[:4]
    for a, b in zip(
        torch.autograd.grad((ours * g).sum(), trained), torch.autograd.grad((eager * g).sum(), trained), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_compiled_dropout_uses_its_mask_twice(kind: str) -> None:
    """With x = 1 the branch's mask shows in y, and the gradient of x has the same zeros; another call, another mask."""
    rank, width = 1, 64
    w, a, b = torch.zeros(2, width), torch.ones(rank, width), torch.ones(2, rank)
    w[:, 0] = 1.0
    x = torch.eye(width).requires_grad_()  # row i shows whether entry i was dropped there
    squares, m = row_squares(Dense(), w), torch.full((2,), 9.0)

    def run(x: Tensor) -> Tensor:
        if kind == "dora":
            return dora_linear(x, w, None, a, b, m, base=Dense(), scale=1.0, squares=squares, dropout=0.5)
        return lora_linear(x, w, None, a, b, base=Dense(), scale=1.0, dropout=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    kept = y.detach()[1:, 0] != 0
    assert 0.2 < kept.float().mean() < 0.8
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient.diagonal()[1:] != 0, kept)
    assert not torch.equal(compiled(x).detach()[1:, 0] != 0, kept)


def test_the_compiled_mask_is_the_eager_one() -> None:
    """One seed gives one mask, compiled or not."""
    x, seed = torch.randn(30, 20), torch.tensor(11)
    compiled = torch.compile(lambda x, seed: dropped(x, 0.4, seed), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seed), dropped(x, 0.4, seed))
