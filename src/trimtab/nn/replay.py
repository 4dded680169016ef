"""Letting a stack give stored hidden states instead of running its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from trimtab.nn.crossing import Crossing
from trimtab.nn.stacks import DepthHooks, Stack


@dataclass(frozen=True)
class Reading:
    """What a network beside a frozen backbone reads of it, and nothing else.

    Attributes:
        hooks: of each stack, the encoder's first.
        widths: d of each stack's hidden states.
        crossing: the taps on the decoder's cross-attention, if it reads that, too.
        networks: what stands in the model beside the backbone.
    """

    hooks: tuple[DepthHooks, ...]
    widths: tuple[int, ...]
    crossing: Crossing | None
    networks: tuple[nn.Module, ...]


@runtime_checkable
class Reads(Protocol):
    """An adapter whose network stands beside a frozen backbone, so that what it reads can be stored."""

    def reading(self) -> Reading:
        """What it reads."""


#: Stands for a block's forward: takes the block and its arguments.
Forward = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

_ABSENT = object()
#: Attributes of an instance by which a call of a module finds its forward; None for the second means the first.
_FORWARD, _COMPILED = "forward", "_compiled_call_impl"


@contextmanager
def stand_ins(stack: Stack, forward: Forward) -> Iterator[None]:
    """Within this context the blocks of a stack run another forward; their hooks, and those around them, stay.

    Args:
        stack: whose blocks.
        forward: in the place of each block's own.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []

    def put(block: nn.Module, name: str, value: Any) -> None:
        before.append((block.__dict__, name, block.__dict__.get(name, _ABSENT)))
        block.__dict__[name] = value

    try:
        for block in stack.blocks:
            put(block, _FORWARD, _bound(block, forward))
            put(block, _COMPILED, None)
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is _ABSENT:
                del attributes[name]
            else:
                attributes[name] = value


def _bound(block: nn.Module, forward: Forward) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(block, args, kwargs)

    return call


def called_with(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names that the forward of the module's class gives them."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}
