"""The chunked cross entropy equals the plain one, in value and gradient, and holds a fraction of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.bench.meters import count_flops, live_bytes
from trimtab.nn import loss as loss_module
from trimtab.nn.loss import linear_cross_entropy

REDUCTIONS = ["mean", "sum", "none"]


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """The same by torch's own parts, with all logits."""
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.flatten(0, -2), labels.long().flatten(), reduction=reduction, ignore_index=ignore_index
    )
    return loss.reshape(labels.shape) if reduction == "none" else loss


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0, words: int = 11, width: int = 6) -> tuple[Tensor, ...]:
    """hidden (3, 7, d), weight (V, d), bias (V,), all trained, and labels (3, 7) with some ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(words, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, words, (3, 7), generator=generator)
    labels[0, 2] = labels[2, 5] = -100
    return hidden, weight, bias, labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_gradients_pass_gradcheck(
    reduction: Any, softcap: float | None, scale: float, with_bias: bool, ignored: bool
) -> None:
    """Numerical and analytic gradients agree in float64 for every combination of options."""
    hidden, weight, bias, labels = inputs(words=5, width=3)
    hidden, labels = hidden[:2, :3].detach().requires_grad_(), labels[:2, :3].clone()
    if not ignored:
        labels[labels < 0] = 1

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, labels, bias=b if with_bias else None, reduction=reduction, softcap=softcap, scale=scale, chunk=4
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@given(
    chunk=st.integers(1, 30),
    seed=st.integers(0, 1000),
    reduction=st.sampled_from(REDUCTIONS),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, -1.5]),
    with_bias=st.booleans(),
    ignore=st.sampled_from([-100, 3]),
)
@settings(max_examples=40, deadline=None)
def test_value_and_gradients_equal_the_plain_loss(
    chunk: int, seed: int, reduction: Any, softcap: float | None, scale: float, with_bias: bool, ignore: int
) -> None:
    """For any chunk and option one backward gives what torch's own loss gives, with any incoming gradient."""
    hidden, weight, bias, labels = inputs(seed=seed)
    labels = torch.where(labels < 0, ignore, labels)
    options = {"softcap": softcap, "scale": scale, "reduction": reduction, "ignore_index": ignore}
    options["bias"] = bias if with_bias else None
    expected = plain(hidden, weight, labels, **options)
    incoming = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wanted = [hidden, weight, bias] if with_bias else [hidden, weight]
    expected_gradients = torch.autograd.grad(expected, wanted, incoming)
    actual = linear_cross_entropy(hidden, weight, labels, chunk=chunk, **options)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(torch.autograd.grad(actual, wanted, incoming), expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward_through_a_retained_graph_is_right(reduction: Any) -> None:
    """The gradient buffers are given away once; a second backward computes them anew."""
    hidden, weight, bias, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, softcap=3.0, chunk=5)
    incoming = torch.ones_like(loss)
    first = torch.autograd.grad(loss, (hidden, weight, bias), 0.0 * incoming, retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight, bias), 2.0 * incoming)
    expected = plain(hidden, weight, labels, bias, softcap=3.0, reduction=reduction)
    for zero, ours, theirs in zip(
        first, second, torch.autograd.grad(expected, (hidden, weight, bias), 2.0 * incoming), strict=True
    ):
        assert not zero.any()
        torch.testing.assert_close(ours, theirs)


def test_second_derivative_is_refused() -> None:
    """A gradient of the gradient is an error, not a wrong number."""
    hidden, weight, _, labels = inputs()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_is_near_fp32(weight_dtype: torch.dtype) -> None:
    """In bf16 the value is within 1e-3 of fp32's, and gradients are as near as rounding allows."""
    torch.manual_seed(0)
    hidden = torch.randn(256, 64).bfloat16().requires_grad_()
    weight = (torch.randn(2000, 64) * 0.3).bfloat16().to(weight_dtype).requires_grad_()
    labels = torch.randint(0, 2000, (256,))
    loss = linear_cross_entropy(hidden, weight, labels, chunk=50)
    loss.backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = plain(exact_hidden, exact_weight, labels)
    exact.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1.0) < 1e-3
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == weight_dtype
    for ours, theirs in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert theirs is not None
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-2


def test_very_unlikely_words_have_a_finite_loss() -> None:
    """A word whose probability underflows fp32 still has the right loss and gradient."""
    hidden = torch.tensor([[300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 600.0
    assert hidden.grad is not None
    assert hidden.grad.item() == 2.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [0, 4])
def test_without_a_scored_token(reduction: Any, tokens: int) -> None:
    """Sum 0, mean nan and zeros, as torch's; the gradients are zero."""
    hidden = torch.randn(tokens, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    labels = torch.full((tokens,), -100)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(loss, plain(hidden, weight, labels, reduction=reduction), equal_nan=True)
    loss.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_ignored_tokens_cost_no_matrix_product() -> None:
    """Half the labels ignored is half the work; frozen inputs and no_grad each save a product."""
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(32, 8, requires_grad=True)
    labels = torch.randint(0, 32, (64,))
    half = torch.where(torch.arange(64) % 2 == 0, -100, labels)
    product = 2 * 64 * 32 * 8

    def flops(h: Tensor, w: Tensor, y: Tensor, **options: Any) -> int:
        def run() -> None:
            loss = linear_cross_entropy(h, w, y, chunk=16, **options)
            if loss.requires_grad:
                loss.sum().backward()

        return count_flops(run)

    assert flops(hidden, weight, labels) == 3 * product
    assert flops(hidden, weight, half) == 3 * product // 2
    assert flops(hidden, weight.detach(), labels) == 2 * product
    assert flops(hidden.detach(), weight, labels) == 2 * product
    assert flops(hidden.detach(), weight.detach(), labels) == product
    assert flops(hidden, weight, labels, reduction="none") == 4 * product
    with torch.no_grad():
        assert flops(hidden, weight, labels) == product


def peak(weight: Tensor, hidden: Tensor, labels: Tensor, **options: Any) -> int:
    """Live bytes above the inputs during one forward and backward of the chunked loss."""

    def run() -> None:
        loss = linear_cross_entropy(hidden, weight, labels, **options)
        if loss.requires_grad:
            loss.backward()
        hidden.grad = weight.grad = None

    return live_bytes(run, existing=[hidden, weight, labels]).above


def test_peak_is_at_most_a_quarter_of_the_plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """At an eighth of 4096 tokens x 32,000 words x 768 in each size, the peak is a quarter at most."""
    tokens, words, width = 512, 4000, 96
    for block in ("_BLOCK_CPU", "_BLOCK_WEIGHT"):  # the scratch shrinks with what it is a block of
        monkeypatch.setattr(loss_module, block, getattr(loss_module, block) // 64)
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = torch.randn(words, width).bfloat16().requires_grad_()
    labels = torch.randint(0, words, (tokens,))

    def plain_step() -> None:
        F.cross_entropy(F.linear(hidden, weight).float(), labels).backward()
        hidden.grad = weight.grad = None

    reference = live_bytes(plain_step, existing=[hidden, weight, labels]).above
    assert peak(weight, hidden, labels, chunk=128) <= reference / 4


def test_frozen_head_has_no_gradient_buffer() -> None:
    """With a frozen head nothing of the head's size is made, and the other way round for hidden states."""
    tokens, words, width, chunk = 64, 500, 400, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(words, width)
    labels = torch.randint(0, words, (tokens,))
    head_bytes, logits_bytes = weight.nbytes, chunk * words * 4
    assert peak(weight, hidden, labels, chunk=chunk) < hidden.nbytes + 3 * logits_bytes + 4096
    assert hidden.nbytes + 3 * logits_bytes + 4096 < head_bytes
    trained = weight.clone().requires_grad_()
    assert peak(trained, hidden.detach(), labels, chunk=chunk) < head_bytes + 3 * logits_bytes + 4096


def test_no_gradient_work_under_no_grad() -> None:
    """Evaluation holds one chunk of logits and its scratch, whatever requires a gradient."""
    tokens, words, width, chunk = 256, 1000, 16, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(words, width, requires_grad=True)
    labels = torch.randint(0, words, (tokens,))
    with torch.no_grad():
        used = peak(weight, hidden, labels, chunk=chunk)
    assert used < 2 * chunk * words * 4 + 8 * tokens * 8


def test_gradient_becomes_grad_without_a_copy() -> None:
    """The fp32 gradient of the head is handed to autograd, not copied."""
    hidden, weight, _, labels = inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    buffer = loss.grad_fn.ready[1]  # type: ignore[union-attr]
    address = buffer.data_ptr()
    del buffer
    (loss / 19).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == address


def test_autocast_does_not_change_the_compute_dtype() -> None:
    """The hidden states' dtype decides, inside autocast as outside."""
    hidden, weight, _, labels = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(inside, linear_cross_entropy(hidden, weight, labels))


def test_int32_labels() -> None:
    """Labels of either integer width are taken."""
    hidden, weight, _, labels = inputs()
    expected = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden, weight, labels.int()), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.ones(11, 5)}, r"share d, got \(3, 7, 6\) and \(11, 5\)"),
        ({"labels": torch.zeros(3, 6, dtype=torch.long)}, r"labels \(3, 6\) for hidden \(3, 7, 6\)"),
        ({"labels": torch.zeros(3, 7)}, "int64 or int32, got torch.float32"),
        ({"labels": torch.full((3, 7), 11)}, r"21 of 21 are outside \[0, 11\).*for instance 11"),
        ({"labels": torch.full((3, 7), -1)}, "for instance -1"),
        ({"bias": torch.ones(10)}, r"one element a row of weight, got \(10,\)"),
        ({"hidden": torch.ones(3, 7, 6, dtype=torch.long)}, "floating point, got torch.int64"),
        ({"reduction": "average"}, "mean, sum or none, got 'average'"),
        ({"softcap": 0.0}, "softcap must be positive or None, got 0.0"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"chunk": 0}, "chunk must be at least 1 token, got 0"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(change: dict[str, Any], says: str) -> None:
    """Each kind of mistake gives one line with the offending value."""
    hidden, weight, _, labels = inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=says):
        linear_cross_entropy(**arguments)
