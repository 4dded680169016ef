"""Trimtab's pure schedule as a torch learning-rate scheduler, and in place of the one that a Trainer made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from trimtab.errors import CheckpointError, ConfigError
from trimtab.optim.schedule import Schedule, Shape

#: What `TrainingArguments.lr_scheduler_type` may be where the callback makes the schedule, and its shape.
SHAPES: dict[str, Shape] = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}


def lr_scheduler(optimizer: Optimizer, schedule: Schedule) -> LambdaLR:
    """A torch scheduler that follows `schedule`: for `Trainer(optimizers=(optimizer, scheduler))`, or any loop.

    Call its `step()` once after every `optimizer.step()`. Its state holds the step alone, never the schedule.
    """
    return LambdaLR(optimizer, _function(schedule))


def schedule_of(scheduler: Any) -> Schedule | None:
    """The schedule behind a scheduler of `lr_scheduler`; None for any other."""
    functions = getattr(scheduler, "lr_lambdas", None) or [None]
    found = getattr(functions[0], "trimtab_schedule", None)
    return found if isinstance(found, Schedule) else None


def check_resumed(scheduler: Any, taken: int) -> None:
    """The scheduler must have come as far as the method.

    Raises:
        CheckpointError: it has not: the checkpoint held no state of it, and none of the optimizer.
    """
    at = getattr(scheduler, "last_epoch", taken)
    if at < taken and not isinstance(scheduler, ReduceLROnPlateau):  # which counts evaluations
        raise CheckpointError(
            f"the Trainer resumes after {taken} steps of the optimizer, and its scheduler begins at step {at}: the "
            "checkpoint holds neither the scheduler nor the optimizer (save_only_model=True); resume from one that was "
            "written with save_only_model=False"
        )


def take_over(scheduler: Any, schedule: Schedule) -> None:
    """Let a LambdaLR follow `schedule` from the step that it is at.

    Raises:
        ConfigError: it is no LambdaLR.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(
            f"the run's scheduler is a {type(scheduler).__name__}, which cannot follow the restarts: set "
            f"lr_scheduler_type to one of {', '.join(SHAPES)}, or pass schedule=trimtab.Schedule(...) with one of them"
        )
    scheduler.lr_lambdas = [_function(schedule) for _ in scheduler.base_lrs]
    rates = [base * schedule(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def schedule_from(args: Any, total: int, restarts: tuple[int, ...], rewarm_steps: int, warm_start: int) -> Schedule:
    """The schedule that `TrainingArguments` describe, with the restarts in it.

    Raises:
        ConfigError: the kind of schedule is none that trimtab has, or the lengths do not fit together.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    options = dict(args.lr_scheduler_kwargs or {})
    floor = 0.0
    if kind == "cosine_with_min_lr":
        lowest, share = options.pop("min_lr", None), options.pop("min_lr_rate", None)
        floor = float(share) if share is not None else float(lowest or 0.0) / args.learning_rate
    if kind not in SHAPES or options:
        what = f"lr_scheduler_type={kind!r}" + (f" with lr_scheduler_kwargs {sorted(options)}" if options else "")
        raise ConfigError(
            f"{what} has no form with restarts: use one of {', '.join(SHAPES)}, or pass "
            "TrimtabCallback(schedule=trimtab.Schedule(...))"
        )
    return Schedule(
        total,
        shape=SHAPES[kind],
        warmup_steps=0 if kind == "constant" else args.get_warmup_steps(total),
        floor=floor,
        warm_start_steps=warm_start,
        restarts=restarts,
        rewarm_steps=rewarm_steps,
    )


def _function(schedule: Schedule) -> Callable[[int], float]:
    """A plain function, since LambdaLR would store the fields of any other callable, and restore stale ones."""

    def multiplier(step: int) -> float:
        return schedule(step)

    multiplier.trimtab_schedule = schedule  # type: ignore[attr-defined]
    return multiplier
