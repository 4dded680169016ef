"""`train.cache_hidden`: a run that keeps the hidden states of its backbone, and the loss that reads them.

The batches of a run are a pure function of the step. So it is known before the start which sequences will come, and in
which micro-batch each is first seen. A run that goes on and does not find all that its completed steps stored computes
it anew in these very micro-batches: in another company a sequence might differ in its last bits.

Evaluations go past the cache. They tell of the model as it is saved, with nothing rounded that it will not round.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from trimtab.config import PretrainConfig, TrainConfig
from trimtab.data.batches import Batch, TrainBatches
from trimtab.errors import CheckpointError, ConfigError
from trimtab.finetuneconfig import FinetuneConfig, TaskTrainConfig
from trimtab.methods.base import Adapter
from trimtab.train.checkpoint import Checkpoint
from trimtab.train.hidden import HiddenCache
from trimtab.train.hidden.identity import bytes_of_tokens, check_outline
from trimtab.train.hidden.store import DATA, RESERVE, look_into
from trimtab.train.memory import size_text

Config = TypeVar("Config", bound=PretrainConfig | FinetuneConfig)
Batches = TypeVar("Batches")


class Loss(Protocol):
    """A loss that tells what it calls the model with (`train.objective.Objective`)."""

    def __call__(self, batch: Any) -> Tensor: ...
    def arguments(self, batch: Any) -> Mapping[str, Any]: ...


class LossFromCache(Generic[Config, Batches]):
    """The loss of a run's training batches, with hidden states that are stored when they are first computed.

    Args:
        cache: of the run's adapter.
        objective: the loss without it.
        batches: of the run.
        config: of the run, which asks for a cache.
        device: where the model is.
    """

    def __init__(
        self, cache: HiddenCache, objective: Loss, batches: Batches, config: Config, device: torch.device
    ) -> None:
        self.cache = cache
        self._objective, self._batches, self._config, self._device = objective, batches, config, device

    def __call__(self, batch: Any) -> Tensor:
        with self.cache.batch(self._objective.arguments(batch)):
            return self._objective(batch)

    @property
    def place(self) -> dict[str, str]:
        """What a checkpoint notes, so that a run that goes on finds the folder again."""
        return {"given": str(self._config.train.cache_hidden), "folder": str(self.cache.folder.resolve())}


class CachedLoss(LossFromCache[PretrainConfig, TrainBatches]):
    """Of pre-training, where each sequence that will come is known."""

    _goal = 0  # tokens in the cache when it has all that the run will see

    def prepare(self, start: int, console: Console) -> None:
        """Say what the run will store, and store what its `start` completed steps have seen and is not there.

        Raises:
            ConfigError: the disk has no room, or another process writes to the folder.
            CheckpointError: what is stored is damaged.
        """
        config, cache = self._config, self.cache
        steps, seq_len = config.train.steps, config.data.seq_len
        sequences = self._batches.distinct(steps)
        missing = self._missing(steps, console) if len(cache) else sequences
        self._goal = sum(cache.tokens) + missing * seq_len
        for line in told(config, cache.folder, cache.bytes_per_token, self._batches.n_chunks, sequences - missing):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if missing:
            with naming_the_setting():
                cache.prepare(missing * seq_len)
                self._compute_anew(start, console)

    def _compute_anew(self, start: int, console: Console) -> None:
        """Store what the completed steps have seen and is not there, in the order and the company of that time."""
        lacking = [
            part for part in self._first_seen(start, console) if self.cache.missing(self._objective.arguments(part))
        ]
        if not lacking:
            return
        text = f"hidden states: computing {len(lacking):,} micro-batches of the {start:,} completed steps anew"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        for part in track(lacking, "hidden states", console=console, disable=not console.is_terminal):
            self.cache.add(self._objective.arguments(part.to(self._device)))

    def growth(self) -> str:
        """How far the cache is, in words; nothing once all is stored."""
        stored = sum(self.cache.tokens)
        if stored >= self._goal:
            return ""
        done, goal = (size_text(tokens * self.cache.bytes_per_token) for tokens in (stored, self._goal))
        return f"hidden states {done} of {goal}"

    def _first_seen(self, steps: int, console: Console) -> Iterator[Batch]:
        """The micro-batches of the first `steps` steps in which a sequence is seen for the first time, with a bar."""
        position = 0  # in the endless sequence of epochs
        train = self._config.train
        due = -(-self._batches.distinct(steps) * self._config.data.seq_len // train.batch_tokens)
        hidden = not (due and console.is_terminal)
        for step in track(range(due), "looking for them", console=console, disable=hidden):
            batch = self._batches.batch(step)
            for part in batch.split(train.micro_batch or len(batch)):
                if position >= self._batches.n_chunks:
                    break
                yield part
                position += len(part)

    def _missing(self, steps: int, console: Console) -> int:
        """How many of the sequences of the first `steps` steps are not stored; each is read for it."""
        keys: set[str] = set()
        text = f"hidden states: looking for {self._batches.distinct(steps):,} sequences in {self.cache.folder}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        for part in self._first_seen(steps, console):
            keys |= self.cache.missing(self._objective.arguments(part))
        return len(keys)


class RunCache(HiddenCache):
    """A cache of a run, whose configuration says how it rounds."""

    def _tell_rounding(self, text: str) -> None:
        """The configuration's cautions have said it."""


def open_cache(
    train: TrainConfig | TaskTrainConfig, adapter: Adapter, checkpoint: Checkpoint | None, stack: ExitStack
) -> RunCache | None:
    """The cache that a run asks for, open until its end; None if it asks for none.

    Args:
        train: of the run's configuration.
        adapter: on its model.
        checkpoint: of a run that goes on, which notes the path that was given, and the folder that it was.
        stack: closes it.

    Raises:
        ConfigError: the adapter has no hidden states that could be kept.
        CheckpointError: the folder holds those of another backbone, or is damaged.
    """
    given = train.cache_hidden
    if given is None:
        return None
    folder = given.expanduser()
    before = checkpoint.extra.get("cache_hidden") if checkpoint else None
    if before is not None and before["given"] == str(given) and (known := Path(before["folder"])).is_dir():
        folder = known  # resumed from another working directory, a relative path may be another place
    with naming_the_setting():
        cache = RunCache(adapter, folder, train.cache_storage)
    stack.callback(cache.close)
    return cache


@contextmanager
def naming_the_setting() -> Iterator[None]:
    """Errors that a cache raises by itself say which setting is meant."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"train.cache_hidden: {error}") from error


def check_place(folder: Path | None) -> None:
    """Refuse a path that can hold no cache, before anything is made (the run's folder, say).

    Raises:
        ConfigError: it holds something else.
        CheckpointError: it cannot be made or read, or is damaged.
    """
    if folder is not None:
        with naming_the_setting():
            look_into(folder.expanduser())


def check_cache(config: PretrainConfig, adapter: Adapter) -> int:
    """Bytes of a token in the cache that a run asks for, from its adapter on a model of any kind.

    Raises:
        ConfigError: the adapter has no hidden states that could be kept.
    """
    with naming_the_setting():
        return sum(bytes_of_tokens(adapter, config.train.cache_storage))


def look_ahead(config: PretrainConfig, adapter: Adapter, folder: Path) -> int:
    """Bytes that a run's folder holds already, which is looked into without weights; nothing is made or written.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it cannot be made or read, is damaged, or is of other stacks or stored in another form.
    """
    with naming_the_setting():
        meta, size = look_into(folder)
        if meta is not None:
            check_outline(adapter, config.train.cache_storage, folder, meta)
    return size


def told(config: PretrainConfig, folder: Path, each: int, chunks: int | None, stored: int = 0) -> Iterator[str]:
    """What a cache will take, and whether it pays, in lines.

    Args:
        config: of the run, which asks for a cache.
        folder: of the cache.
        each: bytes of a token.
        chunks: sequences of the training text; None where that is not known yet.
        stored: how many of those that the run will see are there already.
    """
    train, seq_len = config.train, config.data.seq_len
    drawn = train.steps * train.batch_tokens // seq_len
    tokens = min(drawn, chunks or drawn) * seq_len
    there = f", of which {size_text(stored * seq_len * each)} are there" if stored else ""
    yield (
        f"hidden states: {'at most ' if chunks is None else ''}{size_text(tokens * each)} for {tokens:,} tokens "
        f"({each:,} bytes each, {train.cache_storage}){there}, in {folder}; "
        f"the disk has {size_text(free_bytes(folder))} free"
    )
    if chunks is not None and stored < drawn <= chunks:
        yield "warning: train.cache_hidden: the run sees each sequence once, so what it writes pays in other runs alone"


def room_is_short(config: PretrainConfig, folder: Path, each: int, chunks: int) -> bool:
    """Whether the disk will not do, as far as that shows without opening the folder; arguments as of `told`."""
    data = folder / DATA
    there = data.stat().st_size if data.is_file() else 0
    tokens = min(config.train.steps * config.train.batch_tokens, chunks * config.data.seq_len)
    return tokens * each - there > free_bytes(folder) - RESERVE


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
