"""The training loop: the only one, and it never asks which method runs.

A step, from top to bottom: rate, loss and gradient over the micro-batches, finite check, clipping,
optimizer, `adapter.after_step`; then what is due: a log line, an evaluation, a checkpoint. Everything
that varies is built elsewhere and handed in. State on disk changes between two steps only, and signals
are read there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from trimtab.errors import NonFiniteError
from trimtab.methods.base import Adapter
from trimtab.nn.recompute import recomputing
from trimtab.optim.schedule import Schedule
from trimtab.train.signals import StopSignals

if TYPE_CHECKING:
    from pathlib import Path


class PartOf(Protocol):
    """A micro-batch; what else the loss reads of it is between the two."""

    def __len__(self) -> int: ...
    def to(self, device: torch.device | str) -> PartOf: ...


class StepOf(Protocol):
    """The batch of a step: how many examples, scored items and tokens (without padding) it has, and its parts."""

    @property
    def n_valid(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    def __len__(self) -> int: ...
    def split(self, micro: int) -> Iterator[PartOf]: ...


class Evaluation(Protocol):
    """Figures of an evaluation, as a record of the log."""

    def record(self) -> dict[str, Any]: ...


class Batches(Protocol):
    """The global batch as a pure function of the step."""

    def batch(self, step: int) -> StepOf:
        """The batch of the step with 0-based index `step`."""

    def epoch(self, step: int) -> float:
        """How often the training part was seen before that step."""

    def tokens(self, step: int) -> int:
        """How many tokens, without padding, the steps before that one have."""


class Saver(Protocol):
    """Writes checkpoints; `last` is the newest one that stands."""

    last: Path | None

    def save(self, step: int) -> Path:
        """Write the state after `step` completed steps."""


class Log(Protocol):
    """Takes what happens."""

    def step(self, record: dict[str, Any]) -> None:
        """A completed step, each of them."""

    def event(self, record: dict[str, Any]) -> None:
        """Anything else, with the keys `event` and `step`."""


@dataclass
class Training:
    """All that one run of the loop needs.

    Args:
        objective: the sum of a batch's token losses, an fp32 scalar.
        lr: the peak rate after the schedule's warm start; `warm_start_lr` is the one before.
        micro_batch: sequences a forward and backward pass; None takes the whole batch.
        clip: bound of the gradient's norm over all trained tensors, or None.
        stop_at: completed steps after which to stop, without any effect on the schedule; None for the end.
        eval_every, checkpoint_every: steps between two; 0 for none before the end.
        evaluate: the figures after so many completed steps, or None when there is nothing to take them of.
        evaluated: called with what `evaluate` gave, after it is in the log.
        enough: asked between two steps; True ends the training there.
        trainable_changed: called with the completed steps after the set of trained tensors changed.
        selective_recompute: keep no activations that cheap operations can give again (`nn.recompute`).
    """

    model: nn.Module
    adapter: Adapter
    optimizer: Optimizer
    schedule: Schedule
    objective: Callable[[Any], Tensor]
    batches: Batches
    saver: Saver
    log: Log
    signals: StopSignals
    lr: float
    warm_start_lr: float | None = None
    micro_batch: int | None = None
    clip: float | None = None
    stop_at: int | None = None
    eval_every: int = 0
    checkpoint_every: int = 0
    evaluate: Callable[[int], Evaluation] | None = None
    evaluated: Callable[[int, Any], None] = lambda step, found: None
    enough: Callable[[], bool] = lambda: False
    trainable_changed: Callable[[int], None] = lambda step: None
    selective_recompute: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def rate(self, step: int) -> float:
        """The learning rate of the step with 0-based index `step`."""
        peak = self.lr if self.warm_start_lr is None or step >= self.schedule.warm_start_steps else self.warm_start_lr
        return peak * self.schedule(step)


def train(run: Training, start: int = 0) -> int:
    """Train from `start` completed steps on; return the completed steps, all of them in a checkpoint.

    It ends at the schedule's last step, at `stop_at`, or, between two steps, on a signal.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; the optimizer did not take that step.
        CheckpointError: a checkpoint could not be written; older ones stand.
    """
    total = run.schedule.total_steps
    end = total if run.stop_at is None else min(run.stop_at, total)
    step, saved = start, start if run.saver.last is not None else None
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    while step < end and run.signals.name is None and not run.enough():
        began = time.perf_counter()
        rate = run.rate(step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        batch = run.batches.batch(step)
        nats = forward_backward(run, batch)
        loss, norm = check_and_clip(run, step, nats / max(batch.n_valid, 1))
        run.optimizer.step()
        step += 1
        report = run.adapter.after_step(step, run.optimizer)  # it may look at the gradients, so they go after it
        run.optimizer.zero_grad(set_to_none=True)
        run.log.step(
            {
                "event": "step",
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "batch_tokens": batch.tokens,
                "tokens": run.batches.tokens(step),
                "seconds": time.perf_counter() - began,
                "epoch": run.batches.epoch(step),
            }
        )
        for event in report.events:
            run.log.event({"step": step, **event})
        if report.trainable_changed:
            run.trainable_changed(step)
        if due(step, run.eval_every) and step < total and run.evaluate is not None:
            found = run.evaluate(step)
            run.log.event({"event": "eval", "step": step, **found.record()})
            run.evaluated(step, found)
        if due(step, run.checkpoint_every):
            saved = save(run, step)
    if saved != step:
        save(run, step)
    return step


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def save(run: Training, step: int) -> int:
    """Write a checkpoint and say so; the step it holds."""
    run.saver.save(step)
    run.log.event({"event": "checkpoint", "step": step})
    return step


def forward_backward(run: Training, batch: StepOf) -> Tensor:
    """Add the gradient of the mean token loss of `batch` to the parameters; return the loss's sum in nats.

    Each micro-batch's sum is divided by the number of valid tokens of the whole batch, so neither the size
    of a micro-batch nor an uneven spread of valid tokens changes the result. A method's extra term has the
    weight of the micro-batch's share of the sequences: together one, however many there are.
    """
    sequences = len(batch)
    valid = max(batch.n_valid, 1)
    nats = torch.zeros((), device=run.device)
    for part in batch.split(run.micro_batch or sequences):
        with recomputing(run.model) if run.selective_recompute else nullcontext():
            part_nats = run.objective(part.to(run.device))
        loss = part_nats / valid
        extra = run.adapter.extra_loss()
        if extra is not None:
            loss = loss + extra * (len(part) / sequences)
        torch.autograd.backward(loss)
        nats += part_nats.detach()
    return nats


def check_and_clip(run: Training, step: int, loss: Tensor) -> tuple[float, float]:
    """The loss and the gradient's norm as numbers, after clipping; both are known to be finite.

    The two come to the host in one transfer, the only one of a step: a step on a loss or a gradient that is
    not finite must not be taken, so the host has to know.

    Raises:
        NonFiniteError: one of them is not finite.
    """
    gradients = list(trained_gradients(run.optimizer))
    norm = get_total_norm([parameter.grad for parameter in gradients if parameter.grad is not None])
    values = torch.stack([loss.detach().float(), norm.float().to(loss.device)]).tolist()
    for name, value in zip(("loss", "gradient norm"), values, strict=True):
        if not math.isfinite(value):
            good = f"the last good checkpoint is {run.saver.last}" if run.saver.last else "there is no checkpoint yet"
            run.log.event({"event": "stop", "step": step, "reason": f"{name} is not finite"})
            raise NonFiniteError(
                f"step {step + 1}: the {name} is {value}; the optimizer did not take this step and {good}. "
                "Try a lower optim.lr, a longer warm-up or a smaller train.clip"
            )
    if run.clip is not None and values[1] > run.clip:
        clip_grads_with_norm_(gradients, run.clip, norm)
    return values[0], values[1]


def trained_gradients(optimizer: Optimizer) -> Iterable[Tensor]:
    """The parameters with a gradient in the optimizer's groups as they are now (a method may rewrite them)."""
    groups: Sequence[dict[str, Any]] = optimizer.param_groups
    return (parameter for group in groups for parameter in group["params"] if parameter.grad is not None)
