"""Keeping torch.compile out of a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable` at the first call: it imports the compiler, which is there once a model is."""
    made: list[Callable[..., Any]] = []
    disable: Any = torch.compiler.disable

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(disable(function))
        return made[0](*args, **kwargs)

    return call
