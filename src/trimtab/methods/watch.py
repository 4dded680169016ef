"""Whether an optimizer trains what the model has: everything at the first step, and then a parameter of each group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.errors import ConfigError
from trimtab.nn.present import parameter_at

if TYPE_CHECKING:
    from trimtab.methods.base import Adapter, Trainable


class Watch:
    """What is known of an adapter's parameters, and of their places in the optimizer by group."""

    def __init__(self) -> None:
        self._known: dict[str, nn.Parameter] = {}
        self._places: dict[str, list[tuple[str, int, int]]] = {}

    def remember(self, entries: Iterable[Trainable]) -> None:
        """Know these parameters, of which an optimizer may be made; those known already stay until they are checked."""
        self._known = {**{entry.name: entry.parameter for entry in entries}, **self._known}

    def check(self, adapter: Adapter, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would train nothing, or what the model does not have any more.

        A step looks at one parameter of each group (adapter, embedding, ...), the next step at the next one, whatever
        their number; at all of them only when one is not where it was, as in the first step of an optimizer.

        Raises:
            ConfigError: as said.
        """
        groups: Any = getattr(optimizer, "param_groups", None)
        if self._places and groups is not None:
            looked_at = [places[step % len(places)] for places in self._places.values()]
            if all(_at(groups, *where) is parameter_at(adapter.model, name) for name, *where in looked_at):
                return
        adapter._check_model(f"after_step({step})")
        entries = adapter.trainable()
        if not entries:
            return
        if groups is None:
            raise ConfigError(f"after_step({step}): optimizer={optimizer!r} is no torch optimizer")
        held = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
        places: dict[str, list[tuple[str, int, int]]] = {}
        for entry in entries:
            if id(entry.parameter) in held:
                places.setdefault(entry.group, []).append((entry.name, *held[id(entry.parameter)]))
            elif id(self._known.get(entry.name)) in held:
                raise ConfigError(
                    f"after_step({step}): {entry.name} was replaced in the model (by fully_shard, "
                    "load_state_dict(assign=True), to_empty or resize_token_embeddings, say), and the optimizer trains "
                    "the one that the model has no more; build it anew from adapter.parameter_groups()"
                )
        if not places:
            raise ConfigError(
                f"after_step({step}): the optimizer has none of the parameters that train; build it from "
                "adapter.parameter_groups(), after attach"
            )
        self._places, self._known = places, {entry.name: entry.parameter for entry in entries}


def _at(groups: list[dict[str, Any]], group: int, place: int) -> nn.Parameter | None:
    """The parameter at a place in an optimizer, if it has such a place."""
    if group >= len(groups) or place >= len(groups[group]["params"]):
        return None
    parameter: nn.Parameter = groups[group]["params"][place]
    return parameter
