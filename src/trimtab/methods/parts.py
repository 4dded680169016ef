"""The plain data of the contract: what trains, what a step did, and what is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: What a trained tensor is, in the order in which `parameter_groups` returns the groups.
GROUPS = ("adapter", "embedding", "norm", "head", "base")


def group_of(roles: frozenset[str]) -> str:
    """The group of a tensor with these roles; a tied embedding and head counts as embedding."""
    return next(group for group in GROUPS if group in roles)


@dataclass(frozen=True)
class Trainable:
    """One trained tensor: its qualified name in the model, the parameter, and its group."""

    name: str
    parameter: nn.Parameter
    group: str


@dataclass(frozen=True)
class StepReport:
    """What `after_step` did.

    `trainable_changed` tells a loop that the set of trained tensors is another one now (the end of a
    warm start): the optimizer's groups are already rewritten in place, and anything that was derived
    from the old set (a printed table, a wrapper) is stale. `events` are plain dictionaries with an
    `event` key, to be logged as they are; `{"event": "restart", ...}` is the one that plots mark.
    """

    trainable_changed: bool = False
    events: tuple[dict[str, Any], ...] = ()


@dataclass
class AdapterState:
    """What a method stores beyond the frozen base: tensors by name, and plain JSON values."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
