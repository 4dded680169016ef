"""A small Trainer on a tiny model and random tokens, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models_for_tests import tiny_llama, token_ids
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import trimtab
from trimtab.interop.transformers import TrimtabCallback

ROWS = 40


class Tokens(Dataset):  # type: ignore[type-arg]
    """Rows of random tokens, each its own label."""

    def __init__(self, rows: int = ROWS) -> None:
        self.ids = token_ids(seed=3, rows=rows, length=12)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(out: Path, steps: int = 12, **changes: Any) -> TrainingArguments:
    """Two rows a micro-batch, logging each step, nothing saved, no progress bar."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }
    return TrainingArguments(**(settings | changes))


def relora(**changes: Any) -> trimtab.ReLoRA:
    return trimtab.ReLoRA(**({"rank": 3, "alpha": 12, "restart_every": 4} | changes))


def build(
    args: TrainingArguments,
    callback: TrimtabCallback,
    model: nn.Module | None = None,
    *,
    own_groups: bool = False,
    **parts: Any,
) -> Trainer:
    model = tiny_llama() if model is None else model
    if own_groups:
        parts["optimizers"] = callback.optimizers(model, args)
    return Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[callback], **parts)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def rates(trainer: Trainer) -> list[float]:
    """The learning rate of each step, as the Trainer logged it."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
