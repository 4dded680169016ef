"""`train.cache_hidden` in fine-tuning: hidden states of each example, stored when it is first seen.

In the first epoch each example is seen once, in a micro-batch that the seed decides. So a run that goes on and does not
find all that its completed steps stored computes it anew in these very micro-batches (see `train.cached`). Evaluations
go past the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from trimtab.finetuneconfig import FinetuneConfig
from trimtab.tasks.batches import ExampleBatches, Part
from trimtab.train.cached import LossFromCache, free_bytes, naming_the_setting
from trimtab.train.memory import size_text


class CachedExamples(LossFromCache[FinetuneConfig, ExampleBatches]):
    """Of fine-tuning, where each example is seen once an epoch."""

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
