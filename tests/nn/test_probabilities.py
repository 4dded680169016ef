"""Constant probabilities on values that train: against plain autograd, over masks, groups, block sizes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab.bench.meters import count_flops, saved_bytes
from trimtab.nn.probabilities import attend, values_grad

B, H, Q, K, E, D = 3, 4, 7, 11, 6, 5


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def padding() -> Tensor:
    """(B, 1, 1, K) of bool; one sequence sees a single key."""
    lengths = torch.tensor([K, 4, 1])
    return (torch.arange(K) < lengths[:, None])[:, None, None]


def bias() -> Tensor:
    return drawn(1, H, Q, K, seed=9)


MASKS: dict[str, Any] = {
    "none": lambda: None,
    "padding": padding,
    "padding of all queries": lambda: padding().expand(B, 1, Q, K),
    "2-d": lambda: torch.ones(Q, K, dtype=torch.bool).tril_(2),
    "bias": bias,
    "bias and padding": lambda: torch.where(padding(), bias(), torch.finfo(torch.float64).min),
    "minus infinity": lambda: torch.where(padding(), 0.0, -torch.inf).double(),
}


@pytest.mark.parametrize("block", [1, 50, 300, 700, None])
@pytest.mark.parametrize("groups", [H, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_values_grad(mask: str, groups: int, block: int | None) -> None:
    """dv equals that of torch's attention, however many scores are held at a time."""
    query, key, grad = drawn(B, H, Q, E), drawn(B, groups, K, E, seed=1), drawn(B, H, Q, D, seed=3)
    value = drawn(B, groups, K, D, seed=2).requires_grad_()
    hidden = MASKS[mask]()
    c = F.scaled_dot_product_attention(query, key, value, hidden, scale=0.7, enable_gqa=groups != H)
    (theirs,) = torch.autograd.grad(c, value, grad)
    ours = values_grad(grad, query, key, hidden, scale=0.7, block=block)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("block", [50, None])
def test_values_grad_of_causal_attention(block: int | None) -> None:
    """Causal, and scaled by E^-0.5 where no scale is given."""
    query, key, grad = drawn(B, H, Q, E), drawn(B, H, K, E, seed=1), drawn(B, H, Q, D, seed=3)
    value = drawn(B, H, K, D, seed=2).requires_grad_()
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, is_causal=True), value, grad)
    assert torch.allclose(values_grad(grad, query, key, None, causal=True, block=block), theirs, rtol=1e-11, atol=1e-13)


def test_a_query_that_sees_no_key_gives_nothing() -> None:
    """As torch's attention gives 0 for it, its gradient is 0 and not NaN."""
    query, key, grad = drawn(1, H, Q, E), drawn(1, H, K, E, seed=1), drawn(1, H, Q, D, seed=3)
    blind = torch.ones(1, 1, Q, K, dtype=torch.bool)
    blind[:, :, 2] = False
    value = drawn(1, H, K, D, seed=2).requires_grad_()
    c = F.scaled_dot_product_attention(query, key, value, blind)
    (theirs,) = torch.autograd.grad(c, value, grad)
    assert (c[:, :, 2] == 0).all()
    assert torch.allclose(values_grad(grad, query, key, blind), theirs, rtol=1e-11, atol=1e-13)


def test_bf16_is_near_float64() -> None:
    """bf16 queries and keys are multiplied in fp32: the gradient is off by its inputs' rounding alone."""
    query, key, grad = drawn(B, H, 64, 32), drawn(B, H, 80, 32, seed=1), drawn(B, H, 64, 32, seed=3)
    narrow = [t.bfloat16() for t in (grad, query, key)]
    exact = values_grad(*(t.double() for t in narrow), None)
    ours = values_grad(narrow[0].float(), *narrow[1:], None, block=3000)
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    rounded = values_grad(*narrow, None)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 2**-8 * exact.abs().max()


class Grouped(nn.Module):
    """What an implementation reads off a module."""

    def __init__(self, groups: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal


def eager(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Attention by plain operations, which keeps its probabilities; its mask must be whole."""
    assert mask is None or mask.shape == (B, 1, Q, K)
    scores = query @ key.transpose(-2, -1) * kwargs["scaling"]
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    P = scores.softmax(-1)
    return (P @ value).transpose(1, 2).contiguous(), P


@pytest.mark.parametrize("implementation", [sdpa_attention_forward, eager])
@pytest.mark.parametrize("mask", ["none", "padding of all queries", "one for each query"])
@pytest.mark.parametrize("biased", ["", "zero", "by key", "whole"])
def test_attend_is_the_implementation(implementation: Any, mask: str, biased: str) -> None:
    """Value and gradient are those of a plain call, for masks and biases that say the same for all queries or not."""
    query, key = drawn(B, H, Q, E), drawn(B, H, K, E, seed=1)
    value = drawn(B, H, K, D, seed=2).requires_grad_()
    hidden = None
    if mask != "none":
        hidden = padding().repeat(1, 1, Q, 1)
    if mask == "one for each query":
        hidden = hidden & (torch.arange(K) <= torch.arange(Q)[:, None])
    biases = {"zero": torch.zeros(1, H, Q, K).double(), "by key": bias()[:, :, :1].repeat(1, 1, Q, 1), "whole": bias()}
    kwargs = {"scaling": 0.7, "position_bias": biases.get(biased)}
    plain = implementation(Grouped(), query, key, value, hidden, **kwargs)[0]
    sdpa = implementation is sdpa_attention_forward
    c = attend(implementation, Grouped(), query, key, value, hidden, kwargs, broadcasts=sdpa)
    assert c.shape == (B, Q, H, D) and torch.allclose(c, plain, rtol=1e-12, atol=1e-14)
    pull = drawn(*c.shape, seed=4)
    (theirs,) = torch.autograd.grad(plain, value, pull)
    (ours,) = torch.autograd.grad(c, value, pull)
    assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("queries", [1, Q])
def test_grouped_queries(queries: int) -> None:
    """Heads of keys and values that several heads of queries share, as "sdpa" repeats or packs them."""
    query, key = drawn(B, H, queries, E), drawn(B, 2, K, E, seed=1)
    value = drawn(B, 2, K, D, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: attend(
            sdpa_attention_forward, Grouped(2), query, key, v, padding(), {"scaling": 0.7}, broadcasts=True
        ),
        value,
    )


def test_a_mask_changed_in_place_is_looked_at_again() -> None:
    """What was found out about a mask holds for its contents, not for the tensor."""
    query, key = drawn(B, H, Q, E), drawn(B, H, K, E, seed=1)
    value, mask = drawn(B, H, K, D, seed=2), torch.zeros(B, 1, Q, K).double()

    def both() -> list[Tensor]:
        ours = attend(sdpa_attention_forward, Grouped(), query, key, value, mask, {"scaling": 1.0}, broadcasts=True)
        return [ours, sdpa_attention_forward(Grouped(), query, key, value, mask, scaling=1.0)[0]]

    assert torch.allclose(*both(), rtol=1e-12, atol=1e-14)
    mask[:, :, 3, 4:] = -torch.inf
    assert torch.allclose(*both(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", [sdpa_attention_forward, eager])
def test_what_is_kept_and_what_it_costs(implementation: Any) -> None:
    """Queries, keys and a row of mask are kept; torch's attention is not run again for its gradient."""
    query, key = drawn(B, H, Q, E), drawn(B, H, K, E, seed=1)
    value = drawn(B, H, K, D, seed=2).requires_grad_()
    hidden, zero = padding().repeat(1, 1, Q, 1), torch.zeros(1, H, Q, K).double()
    sdpa = implementation is sdpa_attention_forward

    def run() -> Tensor:
        kwargs = {"scaling": 0.7, "position_bias": zero}
        return attend(implementation, Grouped(), query, key, value, hidden, kwargs, broadcasts=sdpa)

    # The eager one is given its bias, of zeros, as one row.
    assert saved_bytes(run) == B * H * (Q + K) * E * 8 + B * K + (0 if sdpa else H * K * 8)
    c = run()
    # 2 products of the scores' size and one of each of the two widths; the eager one makes P and c once more.
    flops = 2 * B * H * Q * K * (E + D) + (0 if sdpa else 2 * B * H * Q * K * D)
    assert count_flops(lambda: c.sum().backward()) == flops


def test_on_the_meta_device() -> None:
    """A plan runs without numbers, and keeps what a run keeps of padded batches."""
    with torch.device("meta"):
        query, key, value = torch.empty(B, H, Q, E), torch.empty(B, H, K, E), torch.empty(B, H, K, D)
        mask, zero = torch.empty(B, 1, Q, K, dtype=torch.bool), torch.empty(1, H, Q, K)
    value.requires_grad_()
    kwargs = {"scaling": 0.7, "position_bias": zero}
    c = attend(sdpa_attention_forward, Grouped(), query, key, value, mask, kwargs, broadcasts=True)
    c.sum().backward()
    assert value.grad is not None and value.grad.shape == value.shape
