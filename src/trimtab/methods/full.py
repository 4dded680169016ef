"""Full training: every parameter trains. The baseline of all others, and the warm start of some."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from trimtab.methods.base import Adapter, Method


class Full(Method):
    """Train every parameter."""

    abstract = False
    name: Literal["full"] = "full"

    def attach(self, model: nn.Module, *, dtype: torch.dtype | None = None, pure: bool = False) -> Adapter:
        raise RuntimeError("being written")
