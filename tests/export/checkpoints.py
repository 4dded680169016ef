"""Checkpoints on disk for the tests: a start, and an end that differs from it by a known update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

Changes = Callable[[str, torch.Tensor], bool]


def save(model: nn.Module, folder: Path, **how: object) -> Path:
    """A Hugging Face folder of `model`."""
    model.save_pretrained(folder, **how)
    return folder


def move(model: nn.Module, changes: Changes, *, rank: int | None = None, size: float = 0.05, seed: int = 7) -> None:
    """Add a random update to every parameter that `changes` takes; matrices get one of rank `rank`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not changes(name, parameter):
                continue
            if parameter.dim() == 2 and rank is not None:
                rows, columns = parameter.shape
                left = torch.randn(rows, rank, generator=generator)
                delta = left @ torch.randn(rank, columns, generator=generator) / rank**0.5
            else:
                delta = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * delta)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix inside the blocks."""
    inside = any(part in name for part in ("layers.", "layer.", ".h.", "block."))
    return parameter.dim() == 2 and inside and "relative" not in name


def everything(name: str, parameter: torch.Tensor) -> bool:
    """Every parameter changes."""
    return True
