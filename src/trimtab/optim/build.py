"""Optimizers by name.

bitsandbytes is imported here and nowhere else at first use. What was found in its 0.50.2:

* Importing it imports its CPU backend, which on a processor with AVX512-BF16 calls
  `kernels.get_kernel("kernels-community/quantization-bitsandbytes")` at module level: where the package
  `kernels` is importable, that downloads a compiled library from a hub and loads it. On Apple devices
  the MPS backend does the same at the first call. A training run must not fetch binaries behind its
  user's back, so 8-bit AdamW is refused while `kernels` is importable.
* Its 8-bit AdamW runs on a CPU, in plain torch: moments are decoded, updated in fp32 and encoded again.
  Tensors below 4,096 elements keep fp32 moments.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.config import OptimConfig

Groups = Sequence[dict[str, Any]]

# Large enough for bitsandbytes to hold its moments in 8 bits.
_PROBE_ELEMENTS = 8192


def build_optimizer(config: OptimConfig, groups: Groups, device: torch.device | str) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names, over the groups of `Adapter.parameter_groups`.

    Groups keep their own `lr` and `weight_decay`, and every other key they carry; a group may be empty.

    Args:
        config: names the optimizer and gives betas, eps, and the rates of groups that have none.
        groups: dictionaries with `params`.
        device: where the parameters are.

    Raises:
        ConfigError: this device cannot run the optimizer, its package is missing, or it would fetch a
            binary from a hub. The message names `optim.name`.
    """
    device = torch.device(device)
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]} or {torch.float32}
    if config.name == "adamw8bit":
        make = _adamw8bit()
        for dtype in dtypes:
            _probe(make, dtype, device, "adamw8bit")
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
    parameter = nn.Parameter(torch.zeros(_PROBE_ELEMENTS, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        make([{"params": [parameter]}], lr=0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).step()
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


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    if "kernels" in sys.modules or importlib.util.find_spec("kernels") is not None:
        raise ConfigError(
            "optim.name = adamw8bit: the package `kernels` is installed, and with it bitsandbytes fetches a compiled "
            "library from a hub when it is imported; uninstall `kernels`, or use optim.name=adamw"
        )
    try:
        with _quiet("bitsandbytes.backends.cpu.ops"):
            import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            "optim.name = adamw8bit needs the package bitsandbytes: pip install 'trimtab[bnb]', or use optim.name=adamw"
        ) from error
    make: Callable[..., torch.optim.Optimizer] = bitsandbytes.optim.AdamW8bit
    return make


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Hold back the advice to install `kernels`, which this module refuses."""
    speaker = logging.getLogger(logger)
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        speaker.setLevel(level)
