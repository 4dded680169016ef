"""The hand-written bottleneck function: gradients, what it saves, and its precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.nn.bottleneck import ACTIVATIONS, Activation, bottleneck_linear
from trimtab.nn.weights import Dense

OUT, IN, SIZE = 6, 7, 3


def parts(dtype: torch.dtype = torch.float64, tokens: int = 5) -> list[Tensor]:
    """x, weight, bias, down, down_bias, up, up_bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, IN), (OUT, IN), (OUT,), (SIZE, OUT), (SIZE,), (OUT, SIZE), (OUT,))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def plain(parts: list[Tensor], activation: Activation) -> Tensor:
    """The same by torch's own operations."""
    x, weight, bias, down, down_bias, up, up_bias = parts
    y = F.linear(x, weight, bias)
    return y + F.linear(getattr(F, activation)(F.linear(y, down, down_bias)), up, up_bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(activation: Activation, transposed: bool, frozen: bool) -> None:
    """Every gradient equals finite differences in float64, with the base frozen and with the base trained."""
    x, weight, *rest = parts()
    weight = (weight.t() if transposed else weight).detach().clone().requires_grad_(not frozen)

    def run(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return bottleneck_linear(x, weight, *rest, base=Dense(transposed=transposed), activation=activation)

    assert torch.autograd.gradcheck(run, (x, weight, *rest))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_composition(activation: Activation) -> None:
    """Value and gradients equal those of torch's operations, for an input of three dimensions."""
    x, *rest = parts()
    out = bottleneck_linear(x.view(5, 1, IN), *rest, base=Dense(), activation=activation)
    expected = plain([x, *rest], activation)
    assert torch.allclose(out[:, 0], expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out.square().sum(), rest)
    theirs = torch.autograd.grad(expected.square().sum(), rest)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(ours, theirs, strict=True))


def test_bf16_is_near_float64() -> None:
    """fp32 adapters on bf16 activations: outputs are bf16, gradients fp32, both near the float64 ones."""
    x, weight, bias, *own = parts(torch.float32, tokens=64)
    narrow = [x.detach().bfloat16(), weight.detach().bfloat16(), bias.detach().bfloat16()]
    out = bottleneck_linear(*narrow, *own, base=Dense(), activation="gelu")
    wide = [t.detach().double().requires_grad_() for t in (*narrow, *own)]
    expected = plain(wide, "gelu")
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()
    ours = torch.autograd.grad(out.sum(), own)
    theirs = torch.autograd.grad(expected.sum(), wide[3:])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and (a.double() - b).norm() < 2e-2 * b.norm()


def saved_bytes(run: object, known: list[Tensor]) -> int:
    """Bytes kept for the backward, parameters left out, tensors shared counted once."""
    ignored = {t.untyped_storage().data_ptr() for t in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # type: ignore[operator]
    assert out.requires_grad
    return sum(saved.values())


def test_it_saves_the_output_of_the_base_alone() -> None:
    """O entries a token, whatever the size of the bottleneck; autograd's composition saves 2 m more and casts."""
    tokens, width, size = 64, 256, 32
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(width, width, dtype=torch.bfloat16)
    own = [torch.randn(shape, requires_grad=True) for shape in ((size, width), (size,), (width, size), (width,))]
    ours = saved_bytes(
        lambda: bottleneck_linear(x, weight, None, *own, base=Dense(), activation="gelu"), [weight, *own]
    )
    assert ours == 2 * width * tokens
    narrow = lambda: [p.bfloat16() for p in own]  # noqa: E731
    theirs = saved_bytes(
        lambda: (lambda y, d, b, u, c: y + F.linear(F.gelu(F.linear(y, d, b)), u, c))(F.linear(x, weight), *narrow()),
        [weight, *own],
    )
    assert theirs >= ours + 2 * 2 * size * tokens


def test_autocast_decides_the_dtype() -> None:
    """Under autocast an fp32 input is computed in bf16."""
    x, weight, bias, *own = parts(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bottleneck_linear(x, weight.detach(), bias.detach(), *own, base=Dense(), activation="relu")
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in own)
