"""Attention with dropout that keeps its inputs and a seed: against torch's, and against gradients by differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bench.meters import live_bytes
from trimtab.nn import dropattention
from trimtab.nn.dropping import gain
from trimtab.nn.sdpa import Asked


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def inputs(rows: int = 3, heads: int = 2, length: int = 5, width: int = 7, **how: torch.dtype) -> tuple[Tensor, ...]:
    shapes = ((rows, heads, length, 4), (rows, heads, width, 4), (rows, heads, width, 6))
    return tuple(drawn(*shape, seed=n, **how) for n, shape in enumerate(shapes))


def ragged(rows: int, width: int) -> Tensor:
    """A mask (rows, 1, 1, width) of rows with 1, 2, ... positions to see."""
    return (torch.arange(width) <= torch.arange(rows)[:, None])[:, None, None]


MASKS: dict[str, Tensor | None] = {
    "none": None,
    "rows of their own lengths": ragged(3, 7),
    "a position that sees nothing": torch.ones(3, 1, 5, 7, dtype=torch.bool).index_fill(2, torch.tensor([1]), False),
    "added": drawn(1, 2, 5, 7, seed=5).detach(),
    "of two dimensions": torch.ones(5, 7, dtype=torch.bool).tril(2),
}


def attention(*args: Any, **settings: Any) -> Tensor | None:
    return dropattention.attention(Asked(*args, **settings))


def called(q: Tensor, k: Tensor, v: Tensor, seed: int = 3, **settings: Any) -> Tensor:
    torch.manual_seed(seed)
    found = attention(q, k, v, **{"dropout_p": 0.4, **settings})
    assert found is not None
    return found


@pytest.mark.parametrize("at_a_time", [1, 2**20])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_by_differences(mask: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropattention, "_AT_A_TIME", at_a_time)
    assert torch.autograd.gradcheck(lambda q, k, v: called(q, k, v, attn_mask=MASKS[mask]), inputs())


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_alone(which: tuple[int, ...]) -> None:
    parts = [part if n in which else part.detach() for n, part in enumerate(inputs())]
    assert torch.autograd.gradcheck(lambda q, k, v: called(q, k, v), parts)


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_torchs_attention_with_some_probabilities_dropped(mask: str) -> None:
    """With V the identity the output shows the probabilities: torch's, times 1 / (1 - p), or zero."""
    q, k, _ = inputs(length=5, width=7)
    v = torch.eye(7, dtype=torch.float64).expand(3, 2, 7, 7).contiguous().requires_grad_()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[mask])
    found = called(q, k, v, attn_mask=MASKS[mask])
    fell = (found == 0.0) & (expected != 0.0)
    assert fell.any() and not fell.all()
    torch.testing.assert_close(found, torch.where(fell, 0.0, expected * gain(0.4)))


@pytest.mark.parametrize(
    ("settings", "heads"),
    [({"is_causal": True}, 2), ({"scale": 0.3}, 2), ({"enable_gqa": True}, 1), ({"enable_gqa": True, "scale": 2.0}, 1)],
)
def test_the_other_settings_mean_what_they_do_in_torch(settings: dict[str, object], heads: int) -> None:
    q, k, v = drawn(3, 2, 5, 4), drawn(3, heads, 5, 4, seed=1), drawn(3, heads, 5, 6, seed=2)
    nearly_none = {**settings, "dropout_p": 1.6e-5}  # one entry in 62,500 falls; there are 150
    torch.testing.assert_close(
        called(q, k, v, **nearly_none),
        F.scaled_dot_product_attention(q, k, v, **settings),
        rtol=1e-4,
        atol=1e-5,  # type: ignore[arg-type]
    )
    assert torch.autograd.gradcheck(lambda q, k, v: called(q, k, v, **settings), (q, k, v))


@pytest.mark.parametrize("at_a_time", [1, 2**20])
def test_the_share_that_falls_and_its_randomness(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropattention, "_AT_A_TIME", at_a_time)
    q, k = drawn(8, 4, 32, 8, dtype=torch.float32), drawn(8, 4, 32, 8, seed=1, dtype=torch.float32)
    v = torch.eye(32).expand(8, 4, 32, 32).contiguous()
    first, again, other = (called(q, k, v, seed, dropout_p=0.1) == 0.0 for seed in (1, 1, 2))
    assert abs(first.float().mean().item() - 0.1) < 0.008  # 32,768 draws: five standard deviations
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_examples_at_a_time_change_the_seed_alone() -> None:
    """In bf16, as near to fp64 as torch's own is."""
    parts = inputs(rows=4, length=16, width=16, dtype=torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in parts]
    found, expected = called(*parts), called(*exact)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((found.float() * weights).sum(), parts)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    for a, b in zip((found, *grads), (expected, *wanted), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.01 * b.norm()


def test_it_keeps_no_probabilities() -> None:
    q, k, v = (drawn(8, 4, 64, 8, seed=n, dtype=torch.float32) for n in range(3))
    held: list[Tensor] = []
    kept = live_bytes(lambda: held.append(called(q, k, v)))
    assert kept.after - kept.before < held[0].untyped_storage().nbytes() + 64
    theirs = live_bytes(lambda: held.append(F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)))
    assert theirs.after - theirs.before > 8 * 4 * 64 * 64 * 4  # the control: torch keeps them


def test_what_torch_is_left_with() -> None:
    q, k, v = inputs()
    bare = [part.detach() for part in (q, k, v)]
    assert attention(q, k, v) is None
    assert attention(*bare, dropout_p=0.5) is None
    assert attention(q, k, v, drawn(5, 7), 0.5) is None
    assert attention(q[0], k[0], v[0], dropout_p=0.5) is None
    assert attention(q, k, v, torch.ones(5, 7, dtype=torch.long), 0.5) is None
    assert attention(q, k, v, torch.ones(5, 7, dtype=torch.float32), 0.5) is None
    assert attention(q.float(), k, v, dropout_p=0.5) is None
    assert attention(q, k[:, :, :0], v[:, :, :0], dropout_p=0.5) is None
    assert attention(q, k, v, dropout_p=1e-6) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, dropout_p=0.5) is None
