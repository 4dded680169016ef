"""`train.cache_hidden` in fine-tuning: hidden states of each example, stored when it is first seen.

In the first epoch each example is seen once, in a micro-batch that the seed decides. So a run that goes on and does not
find all that its completed steps stored computes it anew in these very micro-batches (see `train.cached`). Evaluations
go past the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor

from trimtab.finetuneconfig import FinetuneConfig
from trimtab.methods.base import Adapter
from trimtab.tasks.batches import ExampleBatches, Part
from trimtab.train.cached import RunCache, free_bytes, naming_the_setting
from trimtab.train.memory import size_text


class Loss(Protocol):
    """A loss that tells what it calls the model with."""

    def __call__(self, batch: Any) -> Tensor: ...
    def arguments(self, batch: Any) -> Mapping[str, Any]: ...


class CachedExamples:
    """The loss of a run's training batches, with hidden states that are stored when an example is first seen.

    Args:
        config: of the run, which asks for a cache.
        adapter: of the run.
        objective: the loss without it.
        batches: of the run.
        device: where the model is.
        before: of a run that goes on, the path that was given (`given`), and the folder that it was (`folder`).

    Raises:
        ConfigError: the adapter has no hidden states that could be kept.
        CheckpointError: the folder holds those of another backbone, or is damaged.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        adapter: Adapter,
        objective: Loss,
        batches: ExampleBatches,
        device: torch.device,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        given = config.train.cache_hidden
        assert given is not None
        folder = given.expanduser()
        if before is not None and before["given"] == str(given) and (known := Path(before["folder"])).is_dir():
            folder = known  # resumed from another working directory, a relative path may be another place
        with naming_the_setting():
            self.cache = RunCache(adapter, folder, config.train.cache_storage)
        self._config, self._objective, self._batches, self._device = config, objective, batches, device

    def __call__(self, batch: Part) -> Tensor:
        with self.cache.batch(self._objective.arguments(batch)):
            return self._objective(batch)

    @property
    def place(self) -> dict[str, str]:
        """What a checkpoint notes, so that a run that goes on finds the folder again."""
        return {"given": str(self._config.train.cache_hidden), "folder": str(self.cache.folder.resolve())}

    def prepare(self, start: int, console: Console) -> None:
        """Say what the run will store, and store what its `start` completed steps have seen and is not there.

        Raises:
            ConfigError: the disk has no room, or another process writes to the folder.
            CheckpointError: what is stored is damaged.
        """
        config, batches, cache = self._config, self._batches, self.cache
        steps = min(config.total_steps, batches.per_epoch)
        tokens = sum(batches.batch(step).tokens for step in range(steps))
        lacking = sum(p.tokens for p in self._parts(steps) if cache.missing(self._objective.arguments(p)))
        lines = [
            f"hidden states: at most {size_text(tokens * cache.bytes_per_token)} for {tokens:,} tokens "
            f"({cache.bytes_per_token:,} bytes each, {config.train.cache_storage}), of which "
            f"{size_text((tokens - lacking) * cache.bytes_per_token)} are there, in {cache.folder}; the disk has "
            f"{size_text(free_bytes(cache.folder))} free"
        ]
        if config.total_steps <= batches.per_epoch and lacking:
            lines.append(
                "warning: train.cache_hidden: each example is seen once, so what is written pays in other runs alone"
            )
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not lacking:
            return
        with naming_the_setting():
            cache.prepare(lacking)
            for part in self._parts(min(start, steps)):
                if cache.missing(self._objective.arguments(part)):
                    cache.add(self._objective.arguments(part.to(self._device)))

    def _parts(self, steps: int) -> Iterator[Part]:
        """The micro-batches of the first steps."""
        micro = self._config.train.micro_batch or self._config.train.batch
        return (part for step in range(steps) for part in self._batches.batch(step).split(micro))
