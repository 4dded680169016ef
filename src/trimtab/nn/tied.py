"""Tied weights: an output head that reads the table of the input embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from trimtab.errors import ConfigError

_FLAG = "tie_word_embeddings"


def owners_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """All names under which a model holds this parameter."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter]


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """Of each name of a weight that a model holds under several, all of them, the first one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


@dataclass(frozen=True)
class Parted:
    """What tying a head again takes: names and numbers alone, which are as true of a copy of the model.

    Attributes:
        source, head: names of the embedding and of the head.
        configs: which of the model's configs said that they were tied.
        listed: the tied weights that the model listed.
    """

    source: str
    head: str
    configs: tuple[int, ...]
    listed: tuple[tuple[str, str], ...]

    def tie(self, model: nn.Module) -> None:
        """Tie the two in `model`; the head's own weight is forgotten."""
        source, head = model.get_submodule(self.source), model.get_submodule(self.head)
        head.weight = source.weight
        configs = _configs(model)
        for at in self.configs:
            setattr(configs[at], _FLAG, True)
        if self.listed:
            model.all_tied_weights_keys = dict(self.listed)  # type: ignore[assignment]


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
    parted = part(model)
    return _nothing if parted is None else partial(parted.tie, model)


def part(model: nn.Module) -> Parted | None:
    """As `untie`; what tying again takes is told as plain data, and None where nothing was tied."""
    if (pair := _pair(model)) is None:
        return None
    source, head = pair
    shared: Any = source.weight
    names = owners_of(model, shared)
    if fault := _fault(model, names):
        raise ConfigError(f"untie: {fault}")
    configs = _configs(model)
    tied = tuple(at for at, config in enumerate(configs) if getattr(config, _FLAG, False))
    listed: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for at in tied:
        setattr(configs[at], _FLAG, False)
    if listed:
        model.all_tied_weights_keys = {k: v for k, v in listed.items() if k not in names}  # type: ignore[assignment]
    called = {id(module): name for name, module in model.named_modules()}
    return Parted(called[id(source)], called[id(head)], tied, tuple(listed.items()))


def can_part(model: nn.Module, names: list[str]) -> bool:
    """Whether `untie` gives the users of the weight with these names a weight each."""
    pair = _pair(model)
    return pair is not None and owners_of(model, pair[0].weight) == names and not _fault(model, names)


def _pair(model: nn.Module) -> tuple[Any, Any] | None:
    """The input embedding and the head, where the head reads the embedding's table."""
    source, head = (_module(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings"))
    if source is None or head is None or source is head or head.weight is not source.weight:
        return None
    return source, head


def _fault(model: nn.Module, names: list[str]) -> str:
    """Why the weight with these names cannot be parted; empty where it can."""
    if len(names) > 2:
        return (
            f"{' = '.join(names)} is one weight, of which only a head and an embedding can be parted; "
            "leave it out of the targets"
        )
    kinds = {type(module) for module in model.modules()}
    reader = next((kind for kind in kinds if _FLAG in _source(kind)), None)
    if reader is None:
        return ""
    return (
        f"{reader.__name__}.forward reads config.{_FLAG}, so a model with parted weights would compute "
        "something else; leave the tied weight out of the targets"
    )


def _nothing() -> None:
    """Tie a model again that was not tied."""


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
