"""Forgetting the optimizer's state of some parameters, and of no other.

A restart gives A and B new meanings, so their Adam moments point nowhere. How to forget matters: zeroed
moments with a kept step count multiply the next updates by up to 1/sqrt(1 - beta2), and pruning the two
moments with separate masks leaves entries with a first moment and no second, thousands of times the rate.
The default is therefore to drop the state, step included; the pruning modes use one mask for both moments
and set step to 1 with the survivors rescaled, so that the bias-corrected moments stay what they were.

8-bit states (bitsandbytes) hold codes into a map, times a scale a block. The code for zero is not 0: it is
looked up in each state's own map.

Paged states lie in CUDA's unified memory, which bitsandbytes (0.50.2) takes and has no call to give back: a state
that is dropped and made anew would leak at every restart. So they are set to what a new state is, in place. To
torch they are tensors of the host, while their scales are on the GPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError, TrimtabError

ResetMode = Literal["drop", "magnitude", "random", "none"]

#: The keys of the two Adam moments: torch's, and those of bitsandbytes.
MOMENTS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))


def reset_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    mode: ResetMode,
    ratio: float = 0.9,
    seed: Sequence[int] = (0,),
    reference: bool = False,
) -> int:
    """Forget the state of `parameters`; every other parameter's state stays as it is, byte for byte.

    Args:
        optimizer: AdamW of torch (plain, foreach, fused) or of bitsandbytes (32 or 8 bits).
        parameters: by name; the name decides a parameter's random mask.
        mode: "drop" pops the state. "magnitude" keeps the 1 - ratio entries with the largest first moment,
            "random" as many random ones. "none" does nothing.
        ratio: share of the entries to forget.
        seed: what the masks are drawn from, together with the name.
        reference: in the pruning modes, a mask for each moment and an untouched step count, as in the
            ReLoRA authors' code.

    Returns:
        The number of moment entries that were forgotten.

    Raises:
        TrimtabError: the optimizer has state, but none of it was touched.
        ConfigError: the optimizer's state has no two moments to prune.
    """
    touched = 0
    for name, parameter in _checked(optimizer, parameters, mode, ratio).items():
        state = optimizer.state[parameter]
        if mode == "drop":
            touched += sum(state[key].numel() for key in _moment_keys(state, optimizer))
            if any(getattr(value, "is_paged", False) for value in state.values()):
                _renew(state)
            else:
                del optimizer.state[parameter]
        else:
            betas = _betas(optimizer, parameter)
            touched += _prune(state, optimizer, name, mode, ratio, seed, betas, reference)
    return touched


def check_reset(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, mode: ResetMode, ratio: float = 0.9
) -> None:
    """Raise what `reset_state` would raise, and change nothing: whoever edits weights with it asks first."""
    _checked(optimizer, parameters, mode, ratio)


def _checked(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], mode: ResetMode, ratio: float
) -> dict[str, nn.Parameter]:
    """The parameters that there is something to forget of, by name; empty where nothing is to be done."""
    if mode == "none" or not optimizer.state:
        return {}
    found = {name: parameter for name, parameter in parameters.items() if optimizer.state.get(parameter)}
    if not found:
        raise TrimtabError(
            f"the optimizer reset ({mode}) touched no element: the optimizer has no state for "
            f"{next(iter(parameters), 'any adapter')}; build it from adapter.parameter_groups()"
        )
    touched = 0
    for parameter in found.values():
        state = optimizer.state[parameter]
        entries = [state[key].numel() for key in _moment_keys(state, optimizer)]
        if mode != "drop":
            _betas(optimizer, parameter)
            entries = [n - _kept_of(n, ratio) for n in entries]
        touched += sum(entries)
    if not touched:
        raise TrimtabError(f"the optimizer reset ({mode}) touched no element: reset_ratio = {ratio} rounds to none")
    return found


def _kept_of(entries: int, ratio: float) -> int:
    """How many of so many entries a pruning mode keeps."""
    return round((1.0 - ratio) * entries)


def _moment_keys(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    for keys in MOMENTS:
        if all(isinstance(state.get(key), Tensor) for key in keys):
            return keys
    raise ConfigError(
        f"the optimizer reset knows Adam's two moments; {type(optimizer).__name__} holds {sorted(state)}: "
        "use AdamW, or reset='none'"
    )


def _betas(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[float, float]:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return float(group["betas"][0]), float(group["betas"][1])
    raise ConfigError(
        "an adapter's parameter is in no group of the optimizer; build it from adapter.parameter_groups()"
    )


def _renew(state: dict[str, Any]) -> None:
    """Make a state of bitsandbytes what it is before the first step, in its own memory: no step, moments and scales 0.

    With a scale of 0 every code stands for 0; bitsandbytes begins with code 0.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and not key.startswith("qmap"):
            value.zero_()
    state["step"] = 0


def _prune(
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    name: str,
    mode: ResetMode,
    ratio: float,
    seed: Sequence[int],
    betas: tuple[float, float],
    reference: bool,
) -> int:
    first, second = _moment_keys(state, optimizer)
    forgotten = 0
    mask: Tensor | None = None
    for key in (first, second):
        if mask is None or reference:
            score = _magnitude(state, key) if mode == "magnitude" else None
            mask = _keep_mask(state[key], score, ratio, (*seed, name, key if reference else ""))
        _zero(state, key, ~mask)
        forgotten += int(mask.numel() - mask.sum())
    if not reference:
        step = float(state["step"])
        for key, beta in ((first, betas[0]), (second, betas[1])):
            _scale(state, key, (1.0 - beta) / (1.0 - beta**step))
        if isinstance(state["step"], Tensor):
            state["step"].fill_(1.0)
        else:
            state["step"] = 1
    return forgotten


def _keep_mask(like: Tensor, score: Tensor | None, ratio: float, key: Sequence[object]) -> Tensor:
    """True for exactly round((1 - ratio) n) entries, whichever of equal scores; any size."""
    n = like.numel()
    kept = _kept_of(n, ratio)
    if score is None:
        digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        score = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu").to(like.device)
    mask = torch.zeros(n, dtype=torch.bool, device=like.device)
    mask[score.flatten().topk(kept, sorted=False).indices.to(like.device)] = True
    return mask.view(like.shape)


def _index(key: str) -> str:
    """Bitsandbytes numbers a state's maps and scales like the state: state1, qmap1, absmax1."""
    return key[-1]


def _is_coded(state: Mapping[str, Any], key: str) -> bool:
    return bool(state[key].dtype == torch.uint8)


def _magnitude(state: Mapping[str, Any], key: str) -> Tensor:
    value: Tensor = state[key]
    if not _is_coded(state, key):
        return value.abs()
    levels = state[f"qmap{_index(key)}"].abs()
    levels = levels[value.flatten().to(levels.device).int()]
    scales: Tensor = state[f"absmax{_index(key)}"]
    block = -(-value.numel() // scales.numel())
    # Blocks have a power of two of entries; only the last one may be shorter.
    block = 1 << (block - 1).bit_length()
    scores: Tensor = levels * scales.repeat_interleave(block)[: value.numel()]
    return scores


def _zero(state: Mapping[str, Any], key: str, where: Tensor) -> None:
    value: Tensor = state[key]
    zero = int(state[f"qmap{_index(key)}"].abs().argmin()) if _is_coded(state, key) else 0
    value.masked_fill_(where, zero)


def _scale(state: Mapping[str, Any], key: str, factor: float) -> None:
    (state[f"absmax{_index(key)}"] if _is_coded(state, key) else state[key]).mul_(factor)
