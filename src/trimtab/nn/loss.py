"""Linear cross entropy in chunks of tokens: the logits never exist whole.

Legend: N scored tokens, V words, d hidden width, c tokens a chunk. With z = h W' + b (c, V) the logits are

    l = cap(scale * z),   cap(x) = softcap * tanh(x / softcap), or x without a softcap
    loss_i = logsumexp(l_i) - l_i[y_i]
    dloss_i / dz_i = scale * (1 - (l_i / softcap)^2) * (softmax(l_i) - onehot(y_i))

which is the order of Hugging Face models: a scale acts on the head's output (Cohere multiplies by
`logit_scale`, Granite divides by `logits_scaling`), a cap comes last (Gemma 2).

Gradients of "mean" and "sum" are formed in the forward, chunk by chunk, so that logits are computed
once; the backward multiplies them by the incoming gradient. What is notable:

* One buffer of c x V in hidden's dtype holds a chunk's logits and then, in place, their gradient.
* Softmax runs in fp32 over blocks of rows that fit a CPU's cache: at 4096 tokens x 32,000 words x 768 in
  bf16 on 2 cores (AMD EPYC, AVX512-BF16) a call takes 1.65 s, over whole chunks 1.78 s, and the matrix
  products alone 1.5 s. The scratch is two such blocks, 8 MiB.
* W's gradient is accumulated in fp32 over blocks of words: a mixed-dtype `add_` on the whole (V, d)
  matrix makes a hidden fp32 copy of it and takes as long as the matrix product itself.
* The matrix product rounds its result to hidden's dtype, as the model's own head does; all that
  follows is fp32 (fp64 for fp64 input).
* One device synchronisation a call, whatever the number of chunks: the range check of the labels and
  the count of scored tokens travel together.

Timings: `python benchmarks/loss.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]

# Elements of one fp32 block of logits rows: 4 MiB stays in a CPU's L2/L3; an accelerator wants few, large launches.
_BLOCK_CPU = 2**20
_BLOCK_ACCELERATOR = 2**24
# Elements of one block of W's gradient.
_BLOCK_WEIGHT = 3 * 2**20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Cross entropy of `softcap_fn(scale * (hidden @ weight.T + bias))`, without ever holding all logits.

    Args:
        hidden: (..., d), of a floating dtype, which is the compute dtype. Autocast is not consulted.
        weight: (V, d). It may be of another dtype (fp32 beside bf16 hidden states): it is cast once a
            call, and its gradient is accumulated in fp32 and returned in the weight's dtype.
        labels: (...), integers in [0, V), already shifted; or `ignore_index`.
        bias: (V,), added before the scale.
        ignore_index: tokens with this label cost no work and get no gradient.
        reduction: "mean" over scored tokens, "sum", or "none": (...), with 0 where ignored. "none"
            keeps no gradient and computes the logits again in the backward.
        softcap: logits become `softcap * tanh(logits / softcap)`, after the scale.
        scale: factor of the head's output.
        chunk: tokens whose logits exist at once.

    Returns:
        fp32 (fp64 for fp64 hidden states): a scalar, or (...) for "none". Without any scored token the
        sum is 0 and the mean is nan, as torch's; gradients are then zero. Only first derivatives exist.

    Raises:
        ValueError: shapes or dtypes that do not fit, labels out of range, or an option out of range.
    """
    _check(hidden, weight, labels, bias, reduction, softcap, scale, chunk)
    flat_labels = labels.reshape(-1)  # (T,)
    scored = _scored_rows(flat_labels, ignore_index, weight.shape[0])
    head = _Head(softcap, float(scale), chunk)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])  # (T, d)
    inputs = (flat_hidden, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            *inputs, flat_labels, scored, head, reduction
        )
    else:
        losses = _run(*inputs, flat_labels, scored, head, None, (False, False, False)).losses
        result = _reduce(losses, flat_labels, scored, reduction)
    return result.reshape(labels.shape) if reduction == "none" else result


@dataclass(frozen=True)
class _Head:
    """What happens between the matrix product and the softmax, and how many tokens at once."""

    softcap: float | None
    scale: float
    chunk: int


@dataclass
class _Outcome:
    losses: Tensor  # (N,) of scored tokens
    hidden: Tensor | None = None  # gradients
    weight: Tensor | None = None
    bias: Tensor | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward ("mean", "sum"), or on demand ("none")."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scored: Tensor | None,
        head: _Head,
        reduction: Reduction,
    ) -> Tensor:
        wanted = tuple(ctx.needs_input_grad[:3])
        # Inputs, not intermediates: they live as long as the model does, or as the hidden states' own graph.
        ctx.save_for_backward(hidden, weight, bias, labels, scored)
        ctx.head, ctx.reduction = head, reduction
        ctx.ready = None
        if reduction == "none":
            outcome = _run(hidden, weight, bias, labels, scored, head, None, (False, False, False))
        else:
            count = labels.numel() if scored is None else scored.numel()
            ctx.share = 1.0 / max(count, 1) if reduction == "mean" else 1.0
            outcome = _run(hidden, weight, bias, labels, scored, head, ctx.share, wanted)
            ctx.ready = (outcome.hidden, outcome.weight, outcome.bias)
        return _reduce(outcome.losses, labels, scored, reduction)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a gradient penalty would silently be constant
            raise RuntimeError("linear_cross_entropy has first derivatives only; backward with create_graph=False")
        wanted = tuple(ctx.needs_input_grad[:3])
        if ctx.ready is not None:
            # The buffers are given away (autograd takes them as .grad without a copy), so they serve once.
            ready, ctx.ready = ctx.ready, None
            for gradient in ready:
                if gradient is not None:
                    gradient.mul_(incoming)
            return (*ready, None, None, None, None)
        hidden, weight, bias, labels, scored = ctx.saved_tensors
        if ctx.reduction == "none":
            upstream = incoming if scored is None else incoming.index_select(0, scored)
        else:  # a second backward through a retained graph
            upstream = (incoming * ctx.share).expand(labels.numel() if scored is None else scored.numel())
        outcome = _run(hidden, weight, bias, labels, scored, ctx.head, upstream, wanted)
        return (outcome.hidden, outcome.weight, outcome.bias, None, None, None, None)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored: Tensor | None,
    head: _Head,
    upstream: float | Tensor | None,
    wanted: tuple[bool, ...],
) -> _Outcome:
    """Losses of the scored tokens and the wanted gradients (of hidden, weight, bias) of sum(upstream * losses).

    `scored` holds the rows that count, or is None when all do; `upstream` is one factor for all tokens, or (N,).
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return _run_chunks(hidden, weight, bias, labels, scored, head, upstream, wanted)


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored: Tensor | None,
    head: _Head,
    upstream: float | Tensor | None,
    wanted: tuple[bool, ...],
) -> _Outcome:
    words, width = weight.shape
    exact = _exact_dtype(hidden.dtype)
    targets = labels if scored is None else labels.index_select(0, scored)  # (N,)
    count = targets.numel()
    size = min(head.chunk, count)
    outcome = _Outcome(torch.empty(count, dtype=exact, device=hidden.device))
    if wanted[0]:
        make = torch.empty_like if scored is None else torch.zeros_like
        outcome.hidden = make(hidden, memory_format=torch.contiguous_format)
    if wanted[1]:
        make_sum = torch.empty if count else torch.zeros
        outcome.weight = make_sum(words, width, dtype=exact, device=hidden.device)
    if wanted[2]:
        outcome.bias = torch.zeros(words, dtype=exact, device=hidden.device)
    if count:
        compute = weight.to(hidden.dtype)  # (V, d), the one cast of the call
        buffer = torch.empty(size, words, dtype=hidden.dtype, device=hidden.device)
        rows = _Rows(min(size, _block_rows(words, hidden.device)), words, exact, hidden, bias, head)
    for start in range(0, count, max(size, 1)):
        stop = min(start + size, count)
        here = slice(start, stop)
        x = hidden[here] if scored is None else hidden.index_select(0, scored[here])  # (c, d)
        logits = buffer[: stop - start]  # (c, V); their gradient after the next two lines
        torch.mm(x, compute.t(), out=logits)
        factor = upstream[here] if isinstance(upstream, Tensor) else upstream
        rows.apply(logits, targets[here], outcome.losses[here], factor if any(wanted) else None, outcome.bias)
        if outcome.hidden is not None:
            if scored is None:
                torch.mm(logits, compute, out=outcome.hidden[here])
            else:
                outcome.hidden.index_copy_(0, scored[here], torch.mm(logits, compute))
        if outcome.weight is not None:
            _accumulate(outcome.weight, logits, x, first=start == 0)
    if outcome.weight is not None:
        outcome.weight = outcome.weight.to(weight.dtype)
    if outcome.bias is not None and bias is not None:
        outcome.bias = outcome.bias.to(bias.dtype)
    return outcome


class _Rows:
    """Turns logits into their gradient in place, and writes the losses, a block of rows at a time."""

    def __init__(
        self, block: int, words: int, exact: torch.dtype, like: Tensor, bias: Tensor | None, head: _Head
    ) -> None:
        self.block = block
        self.head = head
        self.bias = None if bias is None else bias.to(exact)
        shape = (block, words)
        self.work = None if like.dtype == exact else torch.empty(shape, dtype=exact, device=like.device)
        self.share = torch.empty(shape, dtype=exact, device=like.device)
        self.index = torch.arange(block, device=like.device)

    def apply(
        self, logits: Tensor, targets: Tensor, losses: Tensor, factor: float | Tensor | None, bias_sum: Tensor | None
    ) -> None:
        """`factor` times the gradient replaces `logits` (c, V), unless it is None; `losses` (c,) is written."""
        cap, scale = self.head.softcap, self.head.scale
        for start in range(0, logits.shape[0], self.block):
            stop = min(start + self.block, logits.shape[0])
            n = stop - start
            z = logits[start:stop] if self.work is None else self.work[:n].copy_(logits[start:stop])  # (n, V)
            y = targets[start:stop]  # (n,)
            if self.bias is not None:
                z.add_(self.bias)
            if scale != 1.0:
                z.mul_(scale)
            if cap is not None:
                z.div_(cap).tanh_().mul_(cap)
            own = z[self.index[:n], y]  # (n,)
            share = torch.softmax(z, dim=-1, out=self.share[:n])  # (n, V)
            # The largest share is exp(0) / sum, at least 1/V: its logarithm is exact where that of y's may be -inf.
            losses[start:stop] = z.amax(dim=-1) - share.amax(dim=-1).log() - own
            if factor is None:
                continue
            share[self.index[:n], y] -= 1.0
            if cap is not None:
                share.mul_(z.div_(cap).square_().neg_().add_(1.0))
            if isinstance(factor, Tensor):
                share.mul_((factor[start:stop] * scale)[:, None])
            elif factor * scale != 1.0:
                share.mul_(factor * scale)
            logits[start:stop].copy_(share)
            if bias_sum is not None:
                bias_sum.add_(share.sum(dim=0))


def _accumulate(total: Tensor, gradient: Tensor, x: Tensor, *, first: bool) -> None:
    """`total` (V, d) += gradient' x, in total's dtype; the first time it is written, not added to."""
    if total.dtype == x.dtype:
        if first:
            torch.mm(gradient.t(), x, out=total)
        else:
            total.addmm_(gradient.t(), x)
        return
    block = max(1, _BLOCK_WEIGHT // total.shape[1])
    for start in range(0, total.shape[0], block):
        part = torch.mm(gradient[:, start : start + block].t(), x)  # (block, d)
        if first:
            total[start : start + block].copy_(part)
        else:
            total[start : start + block].add_(part)


def _reduce(losses: Tensor, labels: Tensor, scored: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean()  # nan without a scored token
    if scored is None:
        return losses
    return losses.new_zeros(labels.numel()).index_copy_(0, scored, losses)


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _block_rows(words: int, device: torch.device) -> int:
    # A few rows at least: the softmax splits its work by rows.
    return max(16, (_BLOCK_CPU if device.type == "cpu" else _BLOCK_ACCELERATOR) // words)


def _scored_rows(labels: Tensor, ignore_index: int, words: int) -> Tensor | None:
    """The rows that are scored, or None when all are. Raises ValueError for a label out of range."""
    if not labels.numel():
        return None
    kept = labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= words))
    count, bad = torch.stack((kept.sum(), wrong.sum())).tolist()  # the one synchronisation
    if bad:
        example = int(labels[wrong][0])
        raise ValueError(
            f"labels: {bad} of {labels.numel()} are outside [0, {words}) and not ignore_index = {ignore_index}, "
            f"for instance {example}; the tokenizer's vocabulary must fit the head's {words} rows"
        )
    if count == labels.numel():
        return None
    return torch.nonzero_static(kept, size=int(count)).squeeze(1)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    scale: float,
    chunk: int,
) -> None:
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., d) and weight (V, d) must share d, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must have hidden's shape without its last dimension, got labels {tuple(labels.shape)} for "
            f"hidden {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have one element a row of weight, got {tuple(bias.shape)} for {tuple(weight.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale must be finite, got {scale}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
