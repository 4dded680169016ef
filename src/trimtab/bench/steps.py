"""A training step as the benchmarks run it, and what it costs, measured in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from trimtab.bench.meters import count_flops, live_bytes, peak_resident
from trimtab.bench.synthetic import Batch
from trimtab.config import OptimConfig
from trimtab.optim.build import build_optimizer
from trimtab.train.objective import Objective

RATE = 1e-4

#: A loss to differentiate, computed anew at each call.
Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Costs:
    """What one step holds and does; the same on every run."""

    peak_live: int
    flops: int
    trainable: int


class Stepper:
    """A loss and an optimizer, ready to step.

    Args:
        loss: what each step brings down.
        groups: what trains, as `Adapter.parameter_groups` gives it.
        device: where it is.
        extra: what is added to the loss for its gradient alone, as `Adapter.extra_loss`.
        after: called after each update with the number of the step, from 1, and the optimizer.
    """

    def __init__(
        self,
        loss: Loss,
        groups: Sequence[dict[str, Any]],
        *,
        device: torch.device | str = "cpu",
        extra: Callable[[], torch.Tensor | None] | None = None,
        after: Callable[[int, torch.optim.Optimizer], object] | None = None,
    ) -> None:
        self.loss = loss
        self.extra = extra
        self.after = after
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(OptimConfig(lr=RATE), groups, device)
        self.steps = 0

    def step(self) -> float:
        """Zero, forward, backward, update, and what the method does between two steps."""
        self.optimizer.zero_grad()
        loss = self.loss()
        extra = None if self.extra is None else self.extra()
        (loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1
        if self.after is not None:
            self.after(self.steps, self.optimizer)
        return loss.item()

    def costs(self) -> Costs:
        """Measured after two steps at least, so that the optimizer's state exists."""
        for _ in range(2 - self.steps):
            self.step()
        flops, peak = count_flops(self.step), live_bytes(self.step).peak
        return Costs(peak, flops, sum(parameter.numel() for parameter in self.parameters))


def trained(model: torch.nn.Module) -> list[dict[str, Any]]:
    """One group of all parameters of a model that require a gradient."""
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def chunked_loss(model: torch.nn.Module, batch: Batch) -> Loss:
    """The mean of a batch's token losses without all logits at once, checked against the model's own logits."""
    objective = Objective(model)
    objective.check(batch)
    tokens = int((batch.labels >= 0).sum())
    return lambda: objective(batch) / tokens


def own_loss(model: torch.nn.Module, **arguments: Any) -> Loss:
    """The loss that a model itself computes of its arguments."""

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(**arguments).loss
        return value

    return loss


def apart(script: Path, arguments: Sequence[str], known: Path | None = None) -> dict[str, Any]:
    """What a Python script prints as its last line, a JSON object, from a process of its own.

    Args:
        script: the file.
        arguments: its arguments.
        known: a JSON file of earlier answers by arguments, where this one is looked up and else put. Those of another
            torch are not used; whoever changes the code measures into another file.
    """
    answers: dict[str, Any] = json.loads(known.read_text()) if known is not None and known.exists() else {}
    key = " ".join(arguments)
    if answers.get(key, {}).get("torch") != torch.__version__:
        print(f"measuring {script.name} {key}", file=sys.stderr)
        _, printed = peak_resident([script, *arguments])
        told = json.loads(printed.splitlines()[-1])
        answers[key] = {"date": date.today().isoformat(), "torch": torch.__version__, "costs": told}
        if known is not None:
            known.write_text(json.dumps(answers, indent=1))
    answer: dict[str, Any] = answers[key]["costs"]
    return answer


def kept_from(known: Path | None) -> str:
    """From which days the answers of a file of `apart` are, as a line, or nothing where there is none."""
    if known is None or not known.exists():
        return ""
    days = sorted({answer["date"] for answer in json.loads(known.read_text()).values()})
    return f"costs kept in {known.name} are from {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") + "\n"
