"""Optimizers by name.

What was found in bitsandbytes 0.50.2 (how it is imported, and when not, is in `trimtab.bnb`):

* Its 8-bit AdamW runs on a CPU, in plain torch: moments are decoded, updated in fp32 and encoded again.
  Tensors below 4,096 elements keep fp32 moments.
* Its paged optimizers hold the moments of tensors from 100,000 elements on in CUDA's unified memory, which the
  driver moves to the host when the GPU is full. On a CPU they warn and do nothing of the kind; here that is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.bnb import FetchesBinaries, import_bitsandbytes
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.config import OptimConfig

Groups = Sequence[dict[str, Any]]

# Large enough for bitsandbytes to hold its moments in 8 bits.
_PROBE_ELEMENTS = 8192

# Large enough for bitsandbytes to page them.
_PAGED_PROBE_ELEMENTS = 1 << 17

#: bitsandbytes' class of each optimizer that is its own.
_FROM_BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "paged_adamw32bit": "PagedAdamW32bit",
}


def build_optimizer(config: OptimConfig, groups: Groups, device: torch.device | str) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names, over the groups of `Adapter.parameter_groups`.

    Groups keep their own `lr` and `weight_decay`, and every other key they carry; a group may be empty.

    Args:
        config: names the optimizer and gives betas, eps, and the rates of groups that have none.
        groups: dictionaries with `params`.
        device: where the parameters are.

    Raises:
        ConfigError: this device cannot run the optimizer (or only pretends to page), its package is missing, or
            it would fetch a binary from a hub. The message names `optim.name`.
    """
    device = torch.device(device)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]} or {torch.float32}
    if config.name in _FROM_BITSANDBYTES:
        make = _bitsandbytes(config.name)
        for dtype in dtypes:
            _probe(make, dtype, device, config.name)
        return make(groups, **options)
    try:
        for dtype in dtypes:
            _probe(_fused_adamw, dtype, device, "adamw")
    except ConfigError:  # no fused kernel here: the other implementations are the same optimizer
        return torch.optim.AdamW(groups, **options)
    return _fused_adamw(groups, **options)


def _fused_adamw(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def _probe(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Take one real step on a small tensor; what a package claims to support is no evidence."""
    paged = name.startswith("paged_")
    elements = _PAGED_PROBE_ELEMENTS if paged else _PROBE_ELEMENTS
    parameter = nn.Parameter(torch.zeros(elements, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it does not page is said below, as an error
            optimizer = make([{"params": [parameter]}], lr=0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
            optimizer.step()
        moved = bool((parameter.detach().float() + 0.5).abs().max() < 0.05)  # a first Adam step is -lr * sign(grad)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"optim.name = {name} cannot run on {device.type} with {dtype} parameters here: {reason[0][:200]}; "
            "use optim.name=adamw"
        ) from error
    if not moved:
        raise ConfigError(
            f"optim.name = {name} makes a wrong first step on {device.type} with {dtype} parameters here; "
            "use optim.name=adamw"
        )
    if paged and not getattr(optimizer.state[parameter].get("state1"), "is_paged", False):
        plain = "adamw8bit" if name == "paged_adamw8bit" else "adamw"
        raise ConfigError(
            f"optim.name = {name} only pretends to page on {device.type}: its state would lie in plain memory; "
            f"use optim.name={plain}"
        )


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        optimizers = import_bitsandbytes().optim
    except FetchesBinaries as error:
        raise ConfigError(f"optim.name = {name}: {error}, or use optim.name=adamw") from None
    except ImportError as error:
        raise ConfigError(
            f"optim.name = {name} needs the package bitsandbytes: pip install 'trimtab[bnb]', or use optim.name=adamw"
        ) from error
    make: Callable[..., torch.optim.Optimizer] = getattr(optimizers, _FROM_BITSANDBYTES[name])
    return make
