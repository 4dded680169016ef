"""An attention's probabilities, held constant, applied to values that train.

Legend: B sequences, H heads of queries, G heads of keys and values (n = H / G share one), Q queries, K keys,
E width of a head of queries and keys, D of values.

    P_BHQK = softmax over K of (scale q_BHQE k_BGKE' + mask)    c_BHQD = P v_BGKD
    dv_BGKD = sum over the n heads of a group of P_BHQK' dc_BHQD

Queries, keys and mask are constants, so that dv is all the backward forms. The forward is whatever implementation
of attention a model runs. The backward runs it once more on values that stand in for the true ones (c is linear in
v, so that dv does not depend on it) and differentiates that; queries and keys alone are kept in between, and no
probabilities. Where the implementation ends in torch's `scaled_dot_product_attention`, that one is not computed
again: its P' dc is formed here over a few queries at a time, which leaves out the gradients of queries and keys that
torch's fused backward computes with it, and any tensor of Q x K.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.nn.sdpa import Asked

Context = Any

#: An implementation of attention as transformers calls it: (module, query, key, value, mask, **kwargs), whose
#: result's first part is (B, Q, H, D).
Implementation = Callable[..., Any]

#: Scores that the backward holds at a time: on a CPU they shall stay in its cache, elsewhere fill the device.
CPU_BLOCK, BLOCK = 2**19, 2**24


def attend(
    implementation: Implementation,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    values: Tensor,
    mask: Any,
    kwargs: Mapping[str, Any],
    *,
    broadcasts: bool = False,
) -> Tensor:
    """c = P V, of shape (B, Q, H, D), with a gradient to the values alone.

    Args:
        implementation: what the model runs, under the autocast that is on here, now and in the backward.
        module: its first argument.
        query: (B, H, Q, E).
        key: (B, G, K, E).
        values: V (B, G, K, D).
        mask: what the implementation takes as one.
        kwargs: its further arguments. Those that draw at random must be off.
        broadcasts: it takes masks that broadcast, and adds `position_bias` to the scores, as transformers' own
            "sdpa" does.
    """
    mask, kwargs = _compact(mask, kwargs, query.shape[-2], broadcasts)
    leaves, spec = tree_flatten((query, key, mask, dict(kwargs)))
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    autocast = _autocast_now(query.device.type)

    def run(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        filled = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        query, key, mask, kwargs = tree_unflatten(filled, spec)
        with autocast():
            out: Tensor = implementation(module, query, key, values, mask, **kwargs)[0]
        return out

    if not (torch.is_grad_enabled() and values.requires_grad):
        return run(values, tensors)
    attended: Tensor = _Attend.apply(values, run, *tensors)  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    """`run(values, tensors)` with a gradient to the values alone; keeps the tensors."""

    @staticmethod
    def forward(ctx: Context, values: Tensor, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.run, ctx.shape, ctx.dtype = run, values.shape, values.dtype
        ctx.save_for_backward(*tensors)
        return run(values, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        stand_in = grads[0].new_zeros((), dtype=ctx.dtype).expand(ctx.shape).requires_grad_()
        with torch.enable_grad(), _InBlocks():
            again = ctx.run(stand_in, tensors)
        (dv,) = torch.autograd.grad(again, stand_in, grads[0].to(again.dtype))
        return dv, None, *(None for _ in tensors)


class _InBlocks(TorchFunctionMode):
    """Lets torch's attention return nothing of use, and have the gradient of its values alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _product(func, Asked(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _product(func: Callable[..., Tensor], asked: Asked) -> Tensor:
    """`scaled_dot_product_attention` as a source of gradients only."""
    query, key, value, mask, dropout, causal, scale, _ = asked
    if dropout or query.dim() != 4 or not query.shape[0] == key.shape[0] == value.shape[0]:
        return func(**asked._asdict())
    out: Tensor = _GradientOnly.apply(value, query, key, mask, causal, scale)  # type: ignore[no-untyped-call]
    return out


class _GradientOnly(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        value: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(query, key, mask)
        return value.new_zeros(()).expand(*query.shape[:-1], value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, *grads: Tensor) -> tuple[Any, ...]:
        query, key, mask = ctx.saved_tensors
        dv = values_grad(grads[0], query, key, mask, causal=ctx.causal, scale=ctx.scale)
        return dv, None, None, None, None, None


def values_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    block: int | None = None,
) -> Tensor:
    """dv = P' dc, of shape (B, G, K, D) and dc's dtype; sums are in fp32 or wider.

    Args:
        grad: dc (B, H, Q, D).
        query: (B, H, Q, E).
        key: (B, G, K, E).
        mask: None, or of a shape that broadcasts to (B, H, Q, K): bool, true where a query sees a key, or added to
            the scores. A query that sees no key gives nothing.
        causal: query i sees the keys up to i.
        scale: of the scores; None is E^-0.5.
        block: scores to hold at a time.
    """
    (B, H, Q, E), (_, G, K, _) = query.shape, key.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    # CUDA multiplies 16-bit factors into fp32; elsewhere the factors are widened.
    narrow = query.is_cuda and torch.version.cuda is not None and query.dtype in (torch.bfloat16, torch.float16)
    multiply = functools.partial(torch.bmm, out_dtype=torch.float32) if narrow else torch.bmm
    held = query.dtype if narrow else wide
    block = block or (CPU_BLOCK if query.device.type == "cpu" else BLOCK)
    some = max(1, block // max(1, H * Q * K))  # sequences at a time, and queries of them
    step = max(1, block // max(1, min(some, B) * H * K))
    dv = grad.new_empty(B, G, K, grad.shape[-1])
    for first in range(0, B, some):
        of = slice(first, min(first + some, B))
        keys = key[of].to(held).flatten(0, 1).transpose(1, 2)  # (b G, E, K)
        total: Tensor | None = None  # (b G, K, D)
        for start in range(0, Q, step):
            rows = slice(start, min(start + step, Q))
            scores = multiply(_by_group(query[of, :, rows].to(held), G), keys)  # (b G, n rows, K)
            scores.mul_(E**-0.5 if scale is None else scale)
            _hide(scores.view(-1, H, rows.stop - rows.start, K), mask, of, rows, causal)
            # exp(s - max) stands for P, and 1 / sum goes to dc, which is smaller.
            highest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(wide).min)
            weights = scores.sub_(highest).exp_()
            sums = weights.sum(-1, keepdim=True).clamp_min_(torch.finfo(wide).tiny)
            dc = _by_group(grad[of, :, rows].to(wide), G) / sums
            part = multiply(weights.to(held).transpose(1, 2), dc.to(held))
            total = part if total is None else total.add_(part)
        assert total is not None
        dv[of] = total.view(-1, G, K, total.shape[-1])
    return dv


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(b, H, rows, width) as (b G, n rows, width)."""
    return x.reshape(x.shape[0] * groups, -1, x.shape[-1])


def _hide(scores: Tensor, mask: Tensor | None, of: slice, rows: slice, causal: bool) -> None:
    """Mask the scores (b, H, rows, K) of some queries of some sequences in place."""
    if causal:
        index = torch.arange(rows.start, rows.stop, device=scores.device)
        ahead = torch.arange(scores.shape[-1], device=scores.device) > index[:, None]
        scores.masked_fill_(ahead, -torch.inf)
    if mask is None:
        return
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask[of if mask.shape[0] > 1 else slice(None), :, rows if mask.shape[2] > 1 else slice(None)]
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)


def _autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What puts a device's autocast as it is now."""
    if device == "meta":
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


# -- masks that say the same for all queries ---------------------------------------------------------

#: What was found about a tensor, with its version: the blocks of a model are handed the same mask.
_ROWS: Any = WeakTensorKeyDictionary()
_EVEN: Any = WeakTensorKeyDictionary()


def _compact(mask: Any, kwargs: Mapping[str, Any], queries: int, broadcasts: bool) -> tuple[Any, Mapping[str, Any]]:
    """The mask and what is among kwargs of (.., Q, K), with one row of memory where all queries have the same.

    A mask of padding says the same for all queries, and T5's position bias of a cross-attention is of zeros, yet the
    models make them whole, and to keep them for a backward would be to keep a tensor of Q x K.
    """

    def compact(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[-2] != queries or queries == 1:
            return value
        row = _once(_ROWS, value, _one_row)
        return value if row is None else row if broadcasts else row.expand(value.shape)

    kwargs = {name: compact(value) for name, value in kwargs.items()}
    bias = kwargs.get("position_bias")
    if broadcasts and isinstance(bias, Tensor) and is_even(bias):
        kwargs["position_bias"] = None
    return compact(mask), kwargs


def _one_row(tensor: Tensor) -> Tensor | None:
    """A copy (.., 1, K) of the first row of a tensor (.., Q, K) whose rows are all alike, else None."""
    first = tensor[..., :1, :]
    # On the meta device there is nothing to look at; a plan counts on what masks are for.
    alike = tensor.is_meta or tensor.stride(-2) == 0 or bool((tensor == first).all())
    return first.detach().clone() if alike else None


def is_even(bias: Tensor) -> bool:
    """Whether what is added to the scores (.., Q, K) is the same for all keys, so that the softmax does not see it."""
    return bias.is_meta or bool(_once(_EVEN, bias, lambda tensor: bool((tensor == tensor[..., :1]).all())))


def _once(cache: Any, tensor: Tensor, look: Callable[[Tensor], Any]) -> Any:
    """`look(tensor)`, at most once for each of its versions."""
    if tensor.is_inference():  # such tensors do not count their versions
        return look(tensor)
    version, found = cache.get(tensor, (None, None))
    if version != tensor._version:
        found = look(tensor)
        cache[tensor] = (tensor._version, found)
    return found
