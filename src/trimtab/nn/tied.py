"""Tied weights: an output head that reads the table of the input embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trimtab.errors import ConfigError

_FLAG = "tie_word_embeddings"


def owners_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """All names under which a model holds this parameter."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter]


def untie(model: nn.Module) -> Callable[[], None]:
    """Give a tied output head a weight of its own, equal to the one it shared, and rewrite the model's config.

    The function stays as it is, bit for bit; what is saved afterwards holds both weights. Nothing happens to a
    model that is not tied.

    Returns:
        A function that ties the two again; the head's own weight is forgotten then.

    Raises:
        ConfigError: more than the head shares the embedding's weight, or the model reads its config's
            `tie_word_embeddings` when it computes, so that rewriting it would change the function.
    """
    source, head = (_module(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    if source is None or head is None or source is head or head.weight is not source.weight:
        return lambda: None
    shared: Any = source.weight
    names = owners_of(model, shared)
    if len(names) > 2:
        raise ConfigError(
            f"untie: {' = '.join(names)} is one weight, of which only a head and an embedding can be parted; "
            "leave it out of the targets"
        )
    kinds = {type(module) for module in model.modules()}
    reader = next((kind for kind in kinds if _FLAG in _source(kind)), None)
    if reader is not None:
        raise ConfigError(
            f"untie: {reader.__name__}.forward reads config.{_FLAG}, so a model with parted weights would compute "
            "something else; leave the tied weight out of the targets"
        )
    configs = [config for config in _configs(model) if getattr(config, _FLAG, False)]
    listed: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for config in configs:
        setattr(config, _FLAG, False)
    if listed:
        model.all_tied_weights_keys = {k: v for k, v in listed.items() if k not in names}  # type: ignore[assignment]

    def tie_again() -> None:
        head.weight = shared
        for config in configs:
            setattr(config, _FLAG, True)
        if listed:
            model.all_tied_weights_keys = listed  # type: ignore[assignment]

    return tie_again


def _module(model: nn.Module, getter: str) -> Any:
    get = getattr(model, getter, None)
    return get() if callable(get) else None


def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _configs(model: nn.Module) -> list[Any]:
    """The model's config, and the one of its text part where that is another."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    found = [config, text() if callable(text) else None]
    return [c for i, c in enumerate(found) if c is not None and not any(c is other for other in found[:i])]
