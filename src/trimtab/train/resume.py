"""Which settings a run may be continued with: those that leave what was computed so far right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from trimtab.config import RunConfig
from trimtab.configerrors import shown
from trimtab.errors import CheckpointError, ConfigError
from trimtab.train.checkpoint import Checkpoint

Config = TypeVar("Config", bound=RunConfig)

#: Settings (or whole sections) that may change: they touch the future alone, or nothing that is computed.
FREE = (
    "optim.lr", "optim.warm_start_lr", "schedule.floor", "train.steps", "train.stop_at",
    "eval.every", "eval.batch", "eval.tokens", "eval.final_tokens", "eval.patience",
    "checkpoint", "log", "save", "data.workers", "data.store",
)  # fmt: skip

#: Settings that change how the same numbers are computed: the continuation is right, but no longer bit for bit.
INEXACT = (
    "device", "train.micro_batch", "train.cache_hidden", "train.cache_storage", "loss.chunked", "loss.chunk",
    "model.gradient_checkpointing", "model.selective_recompute",
)  # fmt: skip

#: Of those, settings that came later and by default do something else than was done before there was one.
_BEFORE = {"model.selective_recompute": False}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _in_effect(config: RunConfig) -> dict[str, Any]:
    """The settings as dotted keys; of those of `_BEFORE`, what their value comes to, whether it was given or not."""
    return flatten(config.model_dump(mode="json")) | {"model.selective_recompute": config.model.recomputes}


def _under(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def continued(config: Config, checkpoint: Checkpoint) -> tuple[Config, list[str]]:
    """The configuration to continue with, and notes on it for the user.

    Args:
        config: as read from the run folder, with what the user changed.
        checkpoint: what the run continues from; it knows the configuration it was computed under.

    Raises:
        ConfigError: a setting changed that would make the continuation wrong; the message names it with
            both values.
        CheckpointError: another version, whose settings are not known here, wrote the checkpoint.
    """
    try:
        old = type(config).model_validate(checkpoint.config)
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint.path} was written under settings that this version does not know "
            f"({'.'.join(map(str, error.errors()[0]['loc']))}); continue with the version that wrote it"
        ) from error
    before, after = _in_effect(old), _in_effect(config)
    before |= {key: value for key, value in _BEFORE.items() if key not in flatten(checkpoint.config)}
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    notes = []
    for key in changed:
        was, now = shown(before.get(key)), shown(after.get(key))
        if _under(key, config.places()) and None not in (before.get(key), after.get(key)):
            continue
        if _under(key, INEXACT):
            notes.append(f"{key} was {was} and is {now}: the run continues, but not bit for bit")
        elif key in ("name", "out"):
            raise ConfigError(f"{key} = {after.get(key)}: a resumed run stays in its folder; leave it out")
        elif not _under(key, FREE):
            raise ConfigError(
                f"{key}: the run was computed with {was}, and going on with {now} would make it wrong; leave it, or "
                "start a new run under another name"
            )
    _restarts_agree(old, config, checkpoint.step)
    stop = config.stop_at
    if stop is not None and stop <= checkpoint.step and config.total_steps > checkpoint.step:
        if "train.stop_at" in changed:
            raise ConfigError(f"train.stop_at = {stop} is not after step {checkpoint.step}, where the run stands")
        config = config.without_stop()
        notes.append(f"train.stop_at = {stop} was reached; the run goes on to step {config.total_steps}")
    return config, notes


def _restarts_agree(old: RunConfig, new: RunConfig, step: int) -> None:
    """The completed steps must hold the same restarts under both configurations."""
    if new.total_steps < step:
        raise ConfigError(f"train.steps = {new.total_steps} is less than the {step} steps that the run has completed")
    lists = [c.method.restarts(c.total_steps, c.schedule.rewarm_steps) for c in (old, new)]
    done, wanted = ([n for n in restarts if n <= step] for restarts in lists)
    if done != wanted and wanted != [*done, step]:  # one at the step where the run stands is made up for
        at = sorted(set(done) ^ set(wanted))[0]
        what = "happened in this run" if at in done else "did not happen in this run"
        raise ConfigError(
            f"train.steps: {old.total_steps} became {new.total_steps}, which moves the list of restarts: the one after "
            f"step {at} {what}, so its {step} completed steps do not belong to the new list; choose another train.steps"
        )
