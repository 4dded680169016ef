"""A small run of the loop, from parts that need no data on disk; also what the child processes of tests run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from models_for_tests import VOCAB, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import trimtab
from trimtab.train import randomstate
from trimtab.train.checkpoint import Checkpoint, Checkpointer
from trimtab.train.loop import Training, train
from trimtab.train.signals import StopSignals

LENGTH = 12


@dataclass
class Tokens:
    """A batch, as the data package makes them."""

    input_ids: Tensor
    labels: Tensor

    @property
    def n_valid(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def __len__(self) -> int:
        return len(self.input_ids)

    def split(self, micro: int) -> Iterator[Tokens]:
        for ids, labels in zip(self.input_ids.split(micro), self.labels.split(micro), strict=True):
            yield Tokens(ids, labels)

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.input_ids.to(device), self.labels.to(device))


class RandomTokens:
    """Batches as a pure function of the step, with unevenly many scored tokens in a row."""

    def batch(self, step: int) -> Tokens:
        generator = torch.Generator().manual_seed(1000 + step)
        ids = torch.randint(0, VOCAB, (4, LENGTH + 1), generator=generator)
        labels = ids[:, 1:].clone()
        for row in range(4):
            labels[row, LENGTH - 3 * row :] = -100
        return Tokens(ids[:, :-1], labels)

    def epoch(self, step: int) -> float:
        return step / 10

    def tokens(self, step: int) -> int:
        return step * 4 * LENGTH


def objective(model: nn.Module) -> Callable[[Any], Tensor]:
    def loss(batch: Tokens) -> Tensor:
        logits = model(input_ids=batch.input_ids).logits.float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")

    return loss


class Record:
    """A log that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def event(self, record: dict[str, Any]) -> None:
        self.events.append(record)

    def losses(self) -> list[tuple[int, float, float]]:
        return [(r["step"], r["loss"], r["lr"]) for r in self.steps]


def adamw(**settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: torch.optim.AdamW(groups, lr=1.0, **settings)


def adamw8bit(groups: Any) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=1.0)


METHOD = trimtab.ReLoRA(
    rank=4, alpha=4.0, warm_start_steps=3, restart_every=3, dropout=0.1, train_also=("embeddings", "norms", "head")
)


def build(
    folder: Path,
    *,
    checkpoint: Checkpoint | None = None,
    total: int = 12,
    method: trimtab.Method = METHOD,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    quantized: bool = False,
    **changes: Any,
) -> Training:
    """All parts of a run, fresh or from a checkpoint, put together in the order that `run.py` does it."""
    randomstate.seed_all(7)
    # 128 wide, so that bitsandbytes holds some of the moments in 8 bits
    model = tiny_gpt2() if tied else tiny_llama(hidden_size=128, intermediate_size=64, num_hidden_layers=1)
    if quantized:
        trimtab.quantize(model, master="host")
    adapter = trimtab.attach(model, method, dtype=dtype)
    restarts = adapter.restarts(total, 1)
    if checkpoint:
        checkpoint.load_model(model, adapter)
    optimizer = (make_optimizer or adamw())(adapter.parameter_groups(lr=1.0))
    if checkpoint:
        checkpoint.load_optimizer(optimizer)
    schedule = trimtab.Schedule(
        total, warmup_steps=2, warm_start_steps=method.switch_step, restarts=restarts, rewarm_steps=1
    )
    last = checkpoint.path if checkpoint else None
    saver = Checkpointer(folder / "checkpoints", model, adapter, optimizer, {"total": total}, last=last)
    run = Training(
        model, adapter, optimizer, schedule, objective(model), RandomTokens(), saver, Record(), StopSignals(),
        lr=1e-2, warm_start_lr=5e-3, micro_batch=2, clip=1.0,
    )  # fmt: skip
    if checkpoint:
        checkpoint.load_random()
    return replace(run, **changes)


def go(run: Training, start: int = 0) -> int:
    with run.signals:
        return train(run, start)


def everything(run: Training) -> dict[str, Any]:
    """All state that decides the continuation, as comparable values."""
    state = run.adapter.state_dict()
    found: dict[str, Any] = {f"model.{k}": v.clone() for k, v in run.model.state_dict().items()}
    found |= {f"adapter.{k}": v.clone() for k, v in state.tensors.items()}
    found["meta"] = json.dumps(state.meta)
    for group in run.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in run.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    found["random"] = json.dumps(randomstate.capture())
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys under which two states are not the same, bit for bit and in type."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        return type(a) is type(b) and bool(a == b)

    return [key for key in {**one, **other} if key not in one or key not in other or not same(one[key], other[key])]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
