"""The hand-written AdaLoRA function, its orthogonality term, and importance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.nn.adalora import Importance, adalora_linear, orthogonality
from trimtab.nn.weights import Dense


def parts(dtype: torch.dtype = torch.float64, transposed: bool = False) -> list[Tensor]:
    """x, weight, bias, Q, Lambda, P."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    weight = draw(5, 7)
    stored = (weight.t() if transposed else weight).detach()
    return [draw(6, 7), stored, draw(5), draw(3, 7), draw(3, 1), draw(5, 3)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(transposed: bool, bias: bool, train_base: bool, dropout: float) -> None:
    """Every gradient of the function, Lambda's among them, equals finite differences in float64."""
    x, weight, b, q, lam, p = parts(transposed=transposed)
    weight = weight.clone().requires_grad_(train_base)

    def run(x: Tensor, weight: Tensor, b: Tensor, q: Tensor, lam: Tensor, p: Tensor) -> Tensor:
        torch.manual_seed(3)
        base = Dense(transposed=transposed)
        return adalora_linear(x, weight, b if bias else None, q, lam, p, base=base, scale=0.7, dropout=dropout)

    assert torch.autograd.gradcheck(run, (x, weight, b, q, lam, p))


def test_it_computes_the_papers_formula() -> None:
    """y = x W' + b + s x Q' diag(Lambda) P', over any leading dimensions."""
    x, weight, b, q, lam, p = parts()
    truth = x @ weight.t() + b + 0.7 * x @ q.t() @ torch.diag(lam[:, 0]) @ p.t()
    y = adalora_linear(x.view(2, 3, 7), weight, b, q, lam, p, base=Dense(), scale=0.7)
    assert torch.allclose(y.view(6, 5), truth, atol=1e-12)


def test_a_qkv_group_saves_its_input_alone() -> None:
    """2,048 bytes a token at d = 1024 in bf16, as LoRA: x once, nothing of rank or output width."""
    tokens, width = 64, 1024
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    shapes = ((16, width), (16, 1), (width, 16))
    layers = [
        (torch.randn(width, width, dtype=torch.bfloat16), *(torch.randn(s).requires_grad_() for s in shapes))
        for _ in range(3)
    ]
    known = {t.untyped_storage().data_ptr() for layer in layers for t in layer}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = [adalora_linear(x, w, None, q, lam, p, base=Dense(), scale=1.0) for w, q, lam, p in layers]
    assert all(out.requires_grad for out in outs)
    assert sum(saved.values()) / tokens == 2048


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_near_float64(dtype: torch.dtype) -> None:
    """With 16-bit activations and fp32 triplets, output and gradients are within rounding of a float64 oracle."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (50, 256), "w": (192, 256), "q": (8, 256), "l": (8, 1), "p": (192, 8)}
    draws = {key: torch.randn(shape, generator=generator) / 16 for key, shape in shapes.items()}
    x, w = draws["x"].to(dtype).requires_grad_(), draws["w"].to(dtype)
    q, lam, p = (draws[key].requires_grad_() for key in "qlp")
    y = adalora_linear(x, w, None, q, lam, p, base=Dense(), scale=40.0)
    y.float().pow(2).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, q, lam, p)]
    truth = F.linear(wide[0], w.double()) + 40.0 * wide[0] @ wide[1].t() * wide[2].t() @ wide[3].t()
    truth.pow(2).sum().backward()
    pairs = zip((y, x.grad, q.grad, lam.grad, p.grad), (truth, *(t.grad for t in wide)), strict=True)
    for ours, exact in pairs:
        assert ours is not None and exact is not None
        assert (ours.double() - exact).norm() < 0.02 * exact.norm()
    assert y.dtype == x.grad.dtype == dtype  # type: ignore[union-attr]
    assert q.grad.dtype == lam.grad.dtype == p.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_lambda_learns_from_zero() -> None:
    """At Lambda = 0 only Lambda has a gradient, so the first step is not lost."""
    x, weight, b, q, lam, p = parts()
    lam = torch.zeros_like(lam).requires_grad_()
    adalora_linear(x, weight, b, q, lam, p, base=Dense(), scale=1.0).pow(2).sum().backward()
    assert lam.grad is not None and bool(lam.grad.ne(0).all())
    assert q.grad is not None and p.grad is not None and not q.grad.any() and not p.grad.any()


def plain_orthogonality(rows: list[Tensor]) -> Tensor:
    norms = [torch.linalg.matrix_norm(v @ v.t() - torch.eye(len(v), dtype=v.dtype)) for v in rows]
    return torch.stack(norms).mean()


def test_orthogonality_and_its_gradient() -> None:
    """The mean of unsquared Frobenius norms over matrices of several shapes; gradcheck; transposed views are fine."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 7), (3, 7), (2, 5), (3, 7)]
    rows = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    rows.append(torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_())

    def run(*given: Tensor) -> Tensor:
        return orthogonality([*given[:-1], given[-1].t()])

    assert torch.allclose(run(*rows), plain_orthogonality([*rows[:-1], rows[-1].t()]))
    assert torch.autograd.gradcheck(run, rows)


def test_orthogonality_rests_at_its_minimum() -> None:
    """Orthonormal rows have the value 0 and a gradient of 0, not NaN."""
    rows = [torch.eye(3, 5).requires_grad_()]
    value = orthogonality(rows)
    value.backward()
    assert value.item() == 0.0
    assert rows[0].grad is not None and not rows[0].grad.any()


def test_importance_is_the_papers() -> None:
    """After two steps the averages are those of the equations, the second made with the new first."""
    part = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    importance = Importance(0.8, 0.6)
    mean, spread = torch.zeros(1, 2), torch.zeros(1, 2)
    for gradient in ([[3.0, 0.5]], [[-1.0, 4.0]]):
        part.grad = torch.tensor(gradient)
        importance.update({"a": part})
        now = (part.detach() * part.grad).abs()
        mean = 0.8 * mean + 0.2 * now
        spread = 0.6 * spread + 0.4 * (now - mean).abs()
    assert torch.allclose(importance.averages["a"][0], mean)
    assert torch.allclose(importance.averages["a"][1], spread)
    part.grad = None
    importance.update({"a": part})
    assert torch.allclose(importance.averages["a"][0], 0.8 * mean)
