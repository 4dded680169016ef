"""The hand-written function of an added bias, and of a linear layer of which the bias alone trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.nn.addedbias import added_bias_linear
from trimtab.nn.precision import cast_linear
from trimtab.nn.weights import Dense


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradcheck(transposed: bool, train_base: bool) -> None:
    """Every gradient equals finite differences in float64."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 7), (5, 7), (5,)))
    weight = (w.t() if transposed else w).clone().requires_grad_(train_base)
    base = Dense(transposed=transposed)

    def run(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return added_bias_linear(x, weight, b, base=base)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), weight, b.requires_grad_()))
    assert torch.allclose(run(x.view(2, 3, 7), weight, b).view(6, 5), x @ w.t() + b)


@pytest.mark.parametrize("added", [False, True])
def test_no_activation_is_kept_for_a_bias(added: bool) -> None:
    """Only a bias trains: nothing with a row a token is saved, in bf16 with an fp32 bias."""
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(48, 32, dtype=torch.bfloat16), torch.zeros(48, requires_grad=True)
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = added_bias_linear(x, weight, bias, base=Dense()) if added else cast_linear(x, weight, bias, x.dtype)
    assert kept and all(shape[0] != 64 for shape in kept)
    y.float().sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((48,), 64.0))
    assert x.grad is not None
