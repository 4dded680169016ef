"""A weighted sum of LoRA adapters, as an adapter of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.methods.attached import adapters
from trimtab.methods.base import Adapter
from trimtab.methods.lora import LoRA, LoRAAdapter
from trimtab.nn.initial import stacked


def combine(model: nn.Module, weights: Mapping[str, float], *, name: str) -> Adapter:
    """Attach the weighted sum of LoRA adapters of a model under a new name, and let it be active.

    The sum is exact, of updates and not of factors: the factors stand one beside the other, so the rank of a layer is
    the sum of its ranks (or the layer's size, where that is smaller). A layer that only some adapters have gets the
    update of those. The result is a plain LoRA, trains as one, and is saved as one.

    Args:
        model: the model with the adapters, of which any or none may be active.
        weights: factor of each adapter, by name; negative ones subtract.
        name: of the new adapter.

    Raises:
        ConfigError: an adapter is unknown, is no LoRA, is a DoRA or in its warm start, or the name is taken.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(w, int | float) for w in weights.values()):
        raise ConfigError(f"weights={weights!r}: give the factor of each adapter, such as {{'a': 0.7, 'b': 0.3}}")
    terms: dict[str, list[tuple[float, Tensor, Tensor]]] = {}
    for given, weight in weights.items():
        adapter = _plain(model, given, weight)
        for target in adapter._targets:
            a, b = (part.detach() for part in adapter._parts[target].values())
            terms.setdefault(target, []).append((weight * adapter.config.scale_of(target), a, b))
    if not terms:
        raise ConfigError("weights: name at least one adapter")
    factors = {target: stacked(parts) for target, parts in terms.items()}
    ranks = {target: len(a) for target, (a, _) in factors.items()}
    rank = max(ranks.values())
    other = {f"^{re.escape(target)}": r for target, r in ranks.items() if r != rank}
    config = LoRA(
        rank=rank,
        alpha=rank,
        rank_pattern=other,
        alpha_pattern=other,
        targets="|".join(re.escape(target) for target in factors),
    )
    mixed = config.attach(model, name=name)
    assert isinstance(mixed, LoRAAdapter)
    with torch.no_grad():
        for target, (a, b) in factors.items():
            layer = mixed.layers[target]
            first, second = layer.parts
            getattr(layer, first).copy_(a)
            getattr(layer, second).copy_(b)
    return mixed


def _plain(model: nn.Module, name: str, weight: float) -> LoRAAdapter:
    """The adapter called `name`, if its update is s B A and nothing else."""
    known = adapters(model)
    if name not in known:
        raise ConfigError(f"weights: the model has no adapter {name!r}; it has {', '.join(map(repr, known)) or 'none'}")
    adapter = known[name]
    if not isinstance(adapter, LoRAAdapter):
        raise ConfigError(f"weights: {name!r} is of the method {adapter.config.name}; only LoRAs can be added up")
    if adapter.config.dora:
        raise ConfigError(f"weights: {name!r} is a DoRA, whose update is no product of two factors")
    if not adapter.adapted:
        raise ConfigError(f"weights: {name!r} is in its warm start, and has no factors yet")
    if not math.isfinite(weight):
        raise ConfigError(f"weights: {name!r} has the weight {weight}, which is not finite")
    return adapter
