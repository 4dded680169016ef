"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', with W frozen."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from trimtab.methods.base import Adapter, Method

Role = Literal["embeddings", "norms", "head"]
ROLES: tuple[Role, ...] = ("embeddings", "norms", "head")


class LoRA(Method):
    """Low-rank adapters on linear layers.

    Args:
        rank: r, at least 1.
        alpha: the scale is s = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
        dropout: on the adapter branch's input.
        targets: "all-linear" (every linear of the blocks, not the head), a list of name endings, or a
            regular expression that matches a whole qualified name.
        exclude: name endings that are left out.
        train_also: what trains in full beside the adapter; None means nothing in `attach`, and
            embeddings, norms and head in `pretrain`.
        warm_start_steps: steps of full-rank training before the adapter comes into being.
        seed: of the initial A; None is 0 in `attach`, and the run's seed in `pretrain`.
    """

    abstract = False
    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    exclude: tuple[str, ...] = ()
    train_also: tuple[Role, ...] | None = None
    warm_start_steps: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def switch_step(self) -> int:
        return self.warm_start_steps

    def for_pretraining(self, seed: int) -> LoRA:
        return self.model_copy(
            update={
                "train_also": ROLES if self.train_also is None else self.train_also,
                "seed": seed if self.seed is None else self.seed,
            }
        )

    def attach(self, model: nn.Module, *, dtype: torch.dtype | None = None, pure: bool = False) -> Adapter:
        raise RuntimeError("being written")
