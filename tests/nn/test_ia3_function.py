"""The hand-written (IA)3 functions: gradients, what they keep, and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.nn.ia3 import ia3_linear
from trimtab.nn.weights import Dense


def parts(out: int, feedforward: bool, transposed: bool = False) -> list[Tensor]:
    """x (6, 7), weight, bias (out), scales."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    weight = draw(out, 7)
    return [draw(6, 7), (weight.t() if transposed else weight).detach(), draw(out), draw(7 if feedforward else out)]


@pytest.mark.parametrize("out", [4, 7, 9])
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
def test_gradcheck(out: int, feedforward: bool, transposed: bool, bias: bool, train_base: bool) -> None:
    """Every gradient equals finite differences in float64, whichever of input and output is kept."""
    x, weight, b, scales = parts(out, feedforward, transposed)
    weight = weight.clone().requires_grad_(train_base)

    def run(x: Tensor, weight: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        base = Dense(transposed=transposed)
        return ia3_linear(x, weight, b if bias else None, scales, base=base, feedforward=feedforward)

    assert torch.autograd.gradcheck(run, (x, weight, b, scales))


def test_they_compute_the_papers_formulas() -> None:
    """l * (x W' + b), and (x * l) W' + b, over any leading dimensions."""
    x, weight, b, scales = parts(5, False)
    y = ia3_linear(x.view(2, 3, 7), weight, b, scales, base=Dense(), feedforward=False)
    assert torch.allclose(y.view(6, 5), scales * (x @ weight.t() + b))
    x, weight, b, scales = parts(5, True)
    y = ia3_linear(x.view(2, 3, 7), weight, b, scales, base=Dense(), feedforward=True)
    assert torch.allclose(y.view(6, 5), (x * scales) @ weight.t() + b)


def saved_bytes_per_token(widths: list[int], *, feedforward: bool, width: int = 1024, tokens: int = 64) -> float:
    """Bytes that layers of these output widths keep, which all read one bf16 x; parameters left out."""
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    layers = [
        (torch.randn(out, width, dtype=torch.bfloat16), torch.ones(width if feedforward else out).requires_grad_())
        for out in widths
    ]
    known = {t.untyped_storage().data_ptr() for layer in layers for t in layer}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [ia3_linear(x, w, None, scales, base=Dense(), feedforward=feedforward) for w, scales in layers]
    assert all(out.requires_grad for out in outs)
    return sum(saved.values()) / tokens


def test_the_narrower_side_is_kept() -> None:
    """Keys and values of full width keep one x between them; grouped ones keep themselves; inputs keep x."""
    assert saved_bytes_per_token([1024, 1024], feedforward=False) == 2 * 1024
    assert saved_bytes_per_token([256, 256], feedforward=False) == 2 * 2 * 256
    assert saved_bytes_per_token([256], feedforward=True) == 2 * 1024


def test_nothing_is_kept_for_frozen_scales() -> None:
    """A layer whose scales do not train keeps no activation."""
    x, weight, _, scales = parts(5, False)
    for feedforward, vector in ((False, scales), (True, torch.ones(7, dtype=torch.float64))):
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.shape[0] if tensor.dim() == 2 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = ia3_linear(x, weight, None, vector.detach(), base=Dense(), feedforward=feedforward)
        y.sum().backward()
        assert 6 not in kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feedforward", [False, True])
def test_16_bit_results_are_near_float64(feedforward: bool, dtype: torch.dtype) -> None:
    """Output and gradients are within the dtype's rounding of a float64 oracle."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 256, generator=generator) / 4).to(dtype).requires_grad_()
    w = (torch.randn(192, 256, generator=generator) / 16).to(dtype)
    scales = (1 + torch.randn(256 if feedforward else 192, generator=generator) / 4).requires_grad_()
    y = ia3_linear(x, w, None, scales, base=Dense(), feedforward=feedforward)
    y.float().pow(2).sum().backward()
    wide_x, wide_l = x.detach().double().requires_grad_(), scales.detach().double().requires_grad_()
    truth = (wide_x * wide_l) @ w.double().t() if feedforward else (wide_x @ w.double().t()) * wide_l
    truth.pow(2).sum().backward()
    for ours, exact in ((y, truth), (x.grad, wide_x.grad), (scales.grad, wide_l.grad)):
        assert ours is not None and exact is not None
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()
    assert y.dtype == dtype and scales.grad is not None and scales.grad.dtype == torch.float32


@pytest.mark.parametrize("feedforward", [False, True])
def test_a_scale_is_not_rounded_to_the_activations_dtype(feedforward: bool) -> None:
    """1.02 would be 1.0234 in bf16; the outputs are scaled by 1.02, in the mean."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 64, generator=generator).bfloat16()
    y = ia3_linear(x, torch.eye(64).bfloat16(), None, torch.full((64,), 1.02), base=Dense(), feedforward=feedforward)
    ratio = (y.double() * x.double()).sum() / x.double().pow(2).sum()
    assert ratio.item() == pytest.approx(1.02, abs=5e-4)


def test_autocast_decides_the_dtype() -> None:
    """Under autocast an fp32 input is computed in bf16."""
    x, weight, b, scales = (t.detach().float().requires_grad_() for t in parts(5, False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ia3_linear(x, weight.detach(), b, scales, base=Dense(), feedforward=False)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
