"""Checkpoints on disk for the tests: a start, and an end that differs from it by a known update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from models_for_tests import MODELS, train
from torch import nn

import trimtab
from trimtab.export.merge import Merged, merge_checkpoint

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


def trained_adapter(family: str, base: Path, out: Path, config: trimtab.Method | None = None) -> None:
    """Train an adapter for three steps on the checkpoint at `base` and save it."""
    model = type(MODELS[family]()).from_pretrained(base, dtype="auto")
    adapter = trimtab.attach(model, config or trimtab.LoRA(rank=4))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    adapter.save(out)


def merged(folder: Path, **how: object) -> Merged:
    """Merge folder/adapter into folder/base as folder/out."""
    return merge_checkpoint(str(folder / "base"), folder / "adapter", folder / "out", **how)  # type: ignore[arg-type]
