"""What a folder of hidden states is of, and whether that is what a model computes now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.config import Storage
from trimtab.errors import CheckpointError, ConfigError
from trimtab.methods.base import Adapter
from trimtab.nn.replay import Reading, Reads
from trimtab.nn.split import refuse_split
from trimtab.nn.stacks import is_encoder_decoder, part
from trimtab.train.hidden.backbone import Backbone, differences
from trimtab.train.hidden.codes import Plane
from trimtab.train.hidden.examples import Side
from trimtab.train.hidden.visit import Calls

#: 2: other settings are part of meta.json, other arguments of a call are part of a key.
FORMAT = 2
_WAY_OUT = "give another folder, or delete this one"


class Identity:
    """The backbone, the stacks and the stored form.

    Args:
        adapter: at work on the model.
        reading: what it reads.
        storage: the stored form.

    Attributes:
        facts: what a folder's meta.json must say.
        sides: what each stack is.

    Raises:
        ConfigError: the model is split over processes.
    """

    def __init__(self, adapter: Adapter, reading: Reading, storage: Storage) -> None:
        self._model = adapter.model
        self._refuse_split()
        trained = [entry.parameter for entry in adapter.trainable()]
        self._trained = [entry.name for entry in adapter.trainable()]
        self._backbone = Backbone(adapter.model, trained, reading.networks)
        self._state = self._backbone.state()
        self.sides = _sides(adapter.model, reading)
        self.facts: dict[str, Any] = {
            **_outline(reading, storage),
            "config": self._backbone.settings(),
            "tensors": self._backbone.digests(),
        }

    @property
    def pair(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return "only" not in self.sides

    def check_unchanged(self, folder: Path) -> None:
        """Whether the backbone still is what it was.

        Raises:
            CheckpointError: it is not.
            ConfigError: the model was split over processes since.
        """
        self._refuse_split()
        if (state := self._backbone.state()) == self._state:
            return
        if odd := differences(self._backbone.digests(), self.facts["tensors"]):
            raise CheckpointError(
                f"{folder}: the backbone has changed since the cache was opened: {odd}; open a cache in another folder "
                "for it"
            )
        self._state = state  # it moved, say

    def _refuse_split(self) -> None:
        refuse_split(self._model, "hidden states cannot be kept", "use DDP, with a folder for each rank")

    def check_meta(self, folder: Path, meta: Mapping[str, Any]) -> Calls:
        """Whether a folder's meta.json is of this; gives how the model called what is stored.

        Raises:
            CheckpointError: it is not, or is damaged.
        """
        there = meta.get("tensors")
        if isinstance(there, dict) and (names := [name for name in self._trained if name in there]):
            # With the other facts first, which say it if this is another model altogether.
            _compare(folder, {name: fact for name, fact in self.facts.items() if name != "tensors"}, meta)
            raise CheckpointError(
                f"{folder}: {names[0]} trains here (train_also, say), and was frozen where the cached hidden states "
                f"were stored; train the same, or {_WAY_OUT}"
            )
        _compare(folder, self.facts, meta)
        try:
            calls = meta["calls"]
            lists = {name: tuple(calls[name]) for name in ("forms", "dtypes", "attention", "heads", "kwargs")}
            return Calls(**lists, autocast=str(calls["autocast"]))
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: meta.json is damaged ({error}); delete the folder, and it is filled anew"
            ) from error


def check_outline(adapter: Adapter, storage: Storage, folder: Path, meta: Mapping[str, Any]) -> None:
    """Whether a folder's meta.json could be of an adapter's model, as far as that shows without weights.

    Raises:
        ConfigError: as `readable`.
        CheckpointError: it is of other stacks, or stored in another form.
    """
    _compare(folder, _outline(readable(adapter), storage), meta)


def _outline(reading: Reading, storage: Storage) -> dict[str, Any]:
    """The facts that a model on the meta device tells, too."""
    stacks = [
        {"name": hooks.stack.name, "calls": hooks.stack.calls, "width": width}
        for hooks, width in zip(reading.hooks, reading.widths, strict=True)
    ]
    return {"format": FORMAT, "storage": storage, "stacks": stacks, "crossing": reading.crossing is not None}


def _compare(folder: Path, facts: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a folder's meta.json says something else than the facts."""
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: cached hidden states of format {meta.get('format')}, and this version has format {FORMAT}; "
            f"{_WAY_OUT}"
        )
    for key, what in (
        ("storage", "stored in another form"),
        ("stacks", "of other stacks of blocks"),
        ("crossing", "read in another way"),
        ("config", "of a backbone with other settings"),
        ("tensors", "of another backbone"),
    ):
        here, there = facts.get(key, {}), meta.get(key)
        if key in facts and here != there:
            nested = isinstance(there, dict) and isinstance(here, dict)
            odd = differences(here, there or {}) if nested else f"{key} {there!r} there, {here!r} here"
            raise CheckpointError(f"{folder}: the cached hidden states are {what}: {odd}; {_WAY_OUT}")


def readable(adapter: Adapter) -> Reading:
    """What an adapter reads, where that can be kept.

    Raises:
        ConfigError: it reads something else, or another thing each time; or something trains that the hidden states
            depend on.
    """
    if why := adapter.config.no_hidden_cache:
        raise ConfigError(
            f"method {adapter.config.name}: hidden states cannot be kept for it: {why}; train it without a cache"
        )
    assert isinstance(adapter, Reads), adapter
    reading = adapter.reading()
    _refuse_trained(adapter, reading)
    return reading


def _refuse_trained(adapter: Adapter, reading: Reading) -> None:
    """What trains must lie behind the blocks."""
    inside = {id(p) for hooks in reading.hooks for block in hooks.stack.blocks for p in block.parameters()}
    getter = getattr(adapter.model, "get_input_embeddings", None)
    words = getter() if callable(getter) else None
    inside |= {id(p) for p in words.parameters()} if isinstance(words, nn.Module) else set()
    for entry in adapter.trainable():
        if id(entry.parameter) in inside:
            raise ConfigError(f"{entry.name} trains, and the hidden states change with it; they cannot be kept")


def _sides(model: nn.Module, reading: Reading) -> tuple[Side, ...]:
    sides: list[Side] = ["only"] * len(reading.hooks)
    if is_encoder_decoder(model):
        decoder = set(map(id, part(model, "decoder").modules()))
        sides = ["decoder" if id(hooks.stack.blocks[0]) in decoder else "encoder" for hooks in reading.hooks]
    return tuple(sides)


def bytes_of_tokens(adapter: Adapter, storage: Storage) -> tuple[int, ...]:
    """What a token will take, of each stack; no folder is needed, and the model may be on the meta device.

    Raises:
        ConfigError: as `readable`.
    """
    return token_bytes(planes_of(readable(adapter), None), storage)


def token_bytes(planes: Sequence[Plane], storage: Storage) -> tuple[int, ...]:
    """Bytes of a token, of each stack."""
    stacks = 1 + max(plane.stack for plane in planes)
    return tuple(sum(p.token_bytes(storage) for p in planes if p.stack == number) for number in range(stacks))


def planes_of(reading: Reading, calls: Calls | None) -> list[Plane]:
    """What a record holds, in its order.

    Args:
        reading: what is read.
        calls: tells the dtypes; None takes those of the blocks' parameters.
    """
    planes: list[Plane] = []
    for number, (hooks, width) in enumerate(zip(reading.hooks, reading.widths, strict=True)):
        dtype = next((p.dtype for b in hooks.stack.blocks for p in b.parameters() if p.is_floating_point()), None)
        dtype = dtype or torch.get_default_dtype()
        planes.append(Plane("hidden states", number, hooks.stack.calls, width, dtype))
        if reading.crossing is not None:
            wide = reading.crossing.result_width if number else reading.crossing.width
            planes.append(Plane("queries" if number else "keys", number, reading.hooks[-1].stack.calls, wide, dtype))
    if calls is None:
        return planes
    return [replace(plane, dtype=getattr(torch, name)) for plane, name in zip(planes, calls.dtypes, strict=True)]
