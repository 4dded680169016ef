"""What a run costs by deterministic measures: peak live bytes of a step, and the FLOPs of the training.

A few steps of the run's own loop are counted, on its own batches, in a process that is none of the runs: a counted
step is slow, and it must not leave a trace in what is trained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from trimtab.bench.meters import count_flops, live_bytes
from trimtab.errors import TrimtabError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.methods.base import Adapter, StepReport
from trimtab.optim.schedule import Schedule
from trimtab.tasks.batches import ExampleBatches, StepBatch
from trimtab.train.folder import replace_text
from trimtab.train.loop import Training, train
from trimtab.train.material import Material, prepare
from trimtab.train.session import Session
from trimtab.train.signals import StopSignals

#: Steps whose FLOPs are counted; one before them makes the optimizer's state, one after them is weighed.
_COUNTED = 2
#: Steps whose positions are counted; those of later ones are taken to be alike.
_LOOKED_AT = 1000


def costs(config: FinetuneConfig) -> dict[str, Any]:
    """Build the run of `config`, and count a few of its steps. Nothing is written.

    FLOPs are those of the first steps by the positions (padding included) that they have, times the positions of all
    steps; so attention, which grows faster than the positions, is that of the counted steps' lengths. Live bytes are
    those of the step with the most positions in a micro-batch, the largest of the run.

    Returns:
        peak_live: bytes of all tensors at the peak of a step.
        flops: of `steps` steps of training: products, convolutions and attentions, without evaluations.
        steps: of the whole run, as it is planned.

    Raises:
        TrimtabError: what is wrong with the run, in one line.
    """
    material = prepare(config)
    return _Counting(material.config, Path(), Console(quiet=True), frozenset(), material=material).count()


@dataclass
class _Counting(Session[FinetuneConfig]):
    """A run that is counted; it has no folder."""

    material: Material = field(kw_only=True)

    def count(self) -> dict[str, Any]:
        material, steps = self.material, self.config.total_steps
        model = material.model()
        adapter, optimizer = self.attach(model, material.method, None)
        positions, widest = self._positions(min(steps, _LOOKED_AT))
        mean = sum(positions) / len(positions)
        batches = _Chosen(material.batches, widest)
        run = Training(
            model=model,
            adapter=adapter,
            optimizer=optimizer,
            schedule=Schedule(total_steps=sys.maxsize, shape="constant"),
            objective=material.objective(model),
            batches=batches,
            saver=_Nothing(),
            log=_Nothing(),
            signals=StopSignals(),
            lr=0.0,  # nothing is learned, so nothing can diverge
            micro_batch=self.config.train.micro_batch,
            clip=self.config.clip,
            device=self.device,
            selective_recompute=self.config.model.recomputes,
        )
        switch, peak, flops = material.method.switch_step, 0, 0.0
        if switch:  # a phase in which everything trains comes first
            peak, each = batches.measure(replace(run, adapter=cast(Adapter, _Still(adapter))), 0)
            flops = each * mean * switch
            adapter.after_step(switch, optimizer)
        later, each = batches.measure(run, switch)
        flops += each * mean * (steps - switch)
        return {"peak_live": max(peak, later), "flops": round(flops), "steps": steps}

    def _positions(self, steps: int) -> tuple[list[int], int]:
        """How many positions each of the first steps has, and which step has the largest micro-batch."""
        micro, totals, widest = self.config.train.micro_batch, [], (0, 0)
        for step in range(steps):
            sizes = _positions(self.material.batches.batch(step), micro)
            totals.append(sum(sizes))
            widest = max(widest, (max(sizes), -step))
        return totals, -widest[1]


def _positions(batch: StepBatch, micro: int | None) -> list[int]:
    """Of each micro-batch."""
    return [part.positions for part in batch.split(micro or len(batch))]


@dataclass
class _Chosen:
    """Batches of which some steps are taken, whatever number the loop gives them."""

    all: ExampleBatches
    widest: int
    given: Sequence[int] = ()
    first: int = 0

    def measure(self, run: Training, done: int) -> tuple[int, float]:
        """Peak live bytes of the widest step, and FLOPs a position of the first ones, after `done` steps of the run."""
        last = done + 1 + _COUNTED
        self.first, self.given = done, [0, *range(_COUNTED), self.widest]
        train(replace(run, stop_at=done + 1), done)
        flops = count_flops(lambda: train(replace(run, stop_at=last), done + 1))
        peak = live_bytes(lambda: train(replace(run, stop_at=last + 1), last)).peak
        counted = sum(sum(_positions(self.all.batch(step), run.micro_batch)) for step in range(_COUNTED))
        return peak, flops / counted

    def batch(self, step: int) -> StepBatch:
        return self.all.batch(self.given[step - self.first])

    def epoch(self, step: int) -> float:
        return 0.0

    def tokens(self, step: int) -> int:
        return 0


class _Still:
    """An adapter that does nothing between two steps."""

    def __init__(self, adapter: Adapter) -> None:
        self.extra_loss = adapter.extra_loss

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> StepReport:
        return StepReport()


class _Nothing:
    """Keeps no checkpoint and no log."""

    last: Path | None = None

    def save(self, step: int) -> Path:
        return Path()

    def step(self, record: dict[str, Any]) -> None:
        pass

    def event(self, record: dict[str, Any]) -> None:
        pass


def main() -> None:
    """Write the costs of the run in a config file (the first word) as JSON to a file (the second)."""
    config, target = map(Path, sys.argv[1:3])
    try:
        replace_text(target, json.dumps(costs(load_tree(FinetuneConfig, config)), indent=1))
    except TrimtabError as error:
        print(f"trimtab: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
