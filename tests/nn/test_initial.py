"""What A and B start from, and factors of sums."""

from __future__ import annotations

import pytest
import torch

from trimtab.nn.initial import draw_factors, principal_factors, stacked


def factors(init: str, seed: int = 0, rank: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.full((rank, 400), torch.nan), torch.full((300, rank), torch.nan)
    draw_factors(init, a, b, seed, 0, "layer")  # type: ignore[arg-type]
    return a, b


def test_kaiming_and_gaussian_have_their_spread_and_a_zero_b() -> None:
    """U(-1/sqrt(in), 1/sqrt(in)) and N(0, 1/r), and B = 0."""
    a, b = factors("kaiming")
    assert a.abs().max() <= 0.05 and a.abs().max() > 0.049 and not b.any()
    a, b = factors("gaussian")
    assert a.std().item() == pytest.approx(1 / 8, rel=0.05) and not b.any()
    assert a.abs().max() > 3 / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonal_factors_cancel_in_every_dtype(dtype: torch.dtype) -> None:
    """B A = 0 exactly, also after a cast to 16 bits, while each factor has rank r / 2 and PEFT's spread."""
    a, b = (t.to(dtype).double() for t in factors("orthogonal"))
    assert not (b @ a).any()
    assert torch.linalg.matrix_rank(a) == torch.linalg.matrix_rank(b) == 4
    for t in (a, b):
        assert t.std().item() == pytest.approx(0.1 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_draw_depends_on_its_key_alone(init: str) -> None:
    """The same key gives the same factors whatever the global generator holds, and another key others."""
    first = factors(init)
    torch.manual_seed(7)
    assert all(torch.equal(x, y) for x, y in zip(first, factors(init), strict=True))
    assert not torch.equal(first[0], factors(init, seed=1)[0])


def test_principal_factors_are_the_largest_components() -> None:
    """S B A is the best approximation of the rank, and A and B share the singular values evenly."""
    w = torch.randn(40, 30, dtype=torch.float64)
    a, b = principal_factors(w, 5, 0.5)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    assert torch.allclose(0.5 * b @ a, (u[:, :5] * s[:5]) @ v[:5])
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
@pytest.mark.parametrize("ranks", [(2, 3), (9, 7)])
def test_stacked_factors_make_the_sum(ranks: tuple[int, int], shape: tuple[int, int]) -> None:
    """Their product is the weighted sum, and their rank never above the matrix's size."""
    terms = [(c, torch.randn(r, shape[1]), torch.randn(shape[0], r)) for c, r in zip((0.7, -0.3), ranks, strict=True)]
    a, b = stacked(terms)
    assert a.shape[0] == b.shape[1] == min(sum(ranks), 12)
    assert torch.allclose(b @ a, sum(c * y @ x for c, x, y in terms), atol=1e-5)  # type: ignore[arg-type]
