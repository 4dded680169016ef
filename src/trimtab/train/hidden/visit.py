"""One batch on its way through a model: hidden states are stored, or stored ones stand for the blocks.

What the network beside the backbone reads always goes through the stored form, `unpack(pack(x))`, with zeros where
there is no token: the first visit and every later one therefore read the same bits. Of an example that was stored
before, the stored ones are read, even where its batch runs through the backbone for the sake of another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.config import Storage
from trimtab.errors import ConfigError, NonFiniteError
from trimtab.nn.crossing import WAY_OUT, Call
from trimtab.nn.probabilities import is_even
from trimtab.nn.replay import Reading, called_with, stand_ins
from trimtab.nn.untraced import untraced
from trimtab.train.hidden.codes import Plane, pack, unpack
from trimtab.train.hidden.examples import Examples

#: Arguments by which a decoder's block is handed the encoder's outputs, and their mask.
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"

Record = NDArray[np.uint8]


@dataclass(frozen=True)
class Calls:
    """How a model calls what is stored, as far as it is not told by a batch.

    Attributes:
        forms: of the outputs of each stack's blocks (see `DepthHooks.form`).
        dtypes: of each plane, by name.
        autocast: the dtype that it computes in under autocast; empty without.
        attention: names of the implementations of attention in each stack's blocks.
        heads: of queries and keys of the cross-attention, where it is stored.
        kwargs: what each block's cross-attention is called with beside tensors.
    """

    forms: tuple[int, ...]
    dtypes: tuple[str, ...]
    autocast: str
    attention: tuple[str, ...]
    heads: tuple[int, ...]
    kwargs: tuple[dict[str, Any], ...]


class Recorder:
    """Lets a forward run, and keeps what it gives to the network beside it.

    Args:
        reading: what is read.
        planes: in the order of a record; their dtypes are those that are found.
        storage: the stored form.
        examples: of the batch.
        records: of the rows that are stored already.
        finish: called after the last block with the records of the other rows, the counts of their tokens, and how
            the model called what is stored.
    """

    def __init__(
        self,
        reading: Reading,
        planes: Sequence[Plane],
        storage: Storage,
        examples: Examples,
        records: Mapping[int, tuple[Record, tuple[int, ...]]],
        finish: Callable[[dict[int, tuple[tuple[int, ...], bytes]], Calls], None],
    ) -> None:
        self._reading, self._planes, self._storage = reading, planes, storage
        self._examples, self._finish = examples, finish
        self._old = {row: split_record(record, planes, storage, counts) for row, (record, counts) in records.items()}
        first = {key: row for row, key in reversed(list(enumerate(examples.keys)))}
        self._twins = {row: first[key] for row, key in enumerate(examples.keys) if first[key] != row}
        self._rows: list[list[list[Record]]] = [[] for _ in planes]  # of each plane and call, by row
        self._counts: list[list[int]] = [[] for _ in reading.hooks]
        self._dtypes: list[str] = [""] * len(planes)
        self._call: dict[str, Any] = {}
        self._heads: tuple[int, ...] = ()
        self._kwargs: list[dict[str, Any]] = []

    def put_on(self, on: ExitStack) -> None:
        """Be at work until `on` is closed."""
        for number, hooks in enumerate(self._reading.hooks):
            hooks.through = partial(self._hear, number)
            on.callback(setattr, hooks, "through", None)
        crossing = self._reading.crossing
        if crossing is not None:
            crossing.pass_through(self._cross)
            on.callback(crossing.pass_through, None)
            for block in self._reading.hooks[-1].stack.blocks:
                on.callback(block.register_forward_pre_hook(self._note_call, with_kwargs=True).remove)

    @untraced
    def _note_call(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = called_with(block, args, kwargs)

    @torch.no_grad()
    def _hear(self, number: int, call: int, phi: Tensor) -> Tensor:
        heard = self._through(index_of(self._planes, "hidden states", number), call, phi)
        last = self._reading.hooks[-1]
        if number == len(self._reading.hooks) - 1 and call == last.stack.calls - 1:
            self._end()
        return heard

    @torch.no_grad()
    def _cross(self, j: int, states: Tensor, call: Call) -> Call:
        """The call of block j's cross-attention with queries and keys in their stored form."""
        if self._call.get(STATES) is not states or self._call.get(MASK) is not call.mask:
            raise ConfigError(
                f"decoder block {j} does not hand {STATES} and {MASK} to its cross-attention as they are, so that it "
                f"cannot be formed again; {WAY_OUT}"
            )
        self._heads = (call.query.shape[1], call.key.shape[1])
        self._kwargs.append(constants(call.kwargs, j))
        query, key = (
            split_heads(self._through(index_of(self._planes, kind), j, x.transpose(1, 2).flatten(2)), x.shape[1])
            for kind, x in (("queries", call.query), ("keys", call.key))
        )
        return Call(query, key, call.mask, self._kwargs[-1])

    def _through(self, index: int, call: int, x: Tensor) -> Tensor:
        """x (B, S, D) as it is stored."""
        plane = self._planes[index]
        tokens = self._examples.tokens[plane.stack]
        if x.shape[2] != plane.width or len(self._rows[index]) != call:
            raise ConfigError(
                f"{plane.kind}: call {call} gives {tuple(x.shape)}, where {plane.width} numbers a token of call "
                f"{len(self._rows[index])} were due"
            )
        if x.is_meta:
            raise ConfigError(f"{plane.kind}: there is nothing to store of a model on the meta device")
        x_TD = tokens.gather(x, plane.kind)
        if not bool(torch.isfinite(x_TD).all()):
            raise NonFiniteError(
                f"{plane.kind}: call {call} gives numbers that are not finite, and they are not stored; look for the "
                "cause in the backbone's dtype"
            )
        self._dtypes[index] = str(x.dtype).removeprefix("torch.")
        counts = tokens.counts(x)
        self._counts[plane.stack] = counts
        packed = pack(x_TD, self._storage)
        # A copy: what the block gave may be written into before its record is.
        own = torch.empty_like(packed, device="cpu").copy_(packed)
        rows = list(np.split(own.numpy(), np.cumsum(counts)[:-1]))
        for row, parts in self._old.items():
            rows[row] = parts[index][call]
        for row, twin in self._twins.items():
            rows[row] = rows[twin]
        self._rows[index].append(rows)
        if self._old or self._twins:
            packed = torch.from_numpy(np.concatenate(rows)).to(x.device)
        return tokens.spread(unpack(packed, self._storage, x.dtype), len(x))

    def _end(self) -> None:
        """All is there: hand on the records of the rows that are new."""
        new = {}
        for row in range(len(self._examples.keys)):
            if row not in self._old and row not in self._twins:
                record = b"".join(rows[row].tobytes() for plane in self._rows for rows in plane)
                new[row] = (tuple(counts[row] for counts in self._counts), record)
        forms = tuple(hooks.form for hooks in self._reading.hooks)
        autocast = autocast_of(self._reading)
        attention = attention_of(self._reading)
        self._finish(new, Calls(forms, tuple(self._dtypes), autocast, attention, self._heads, tuple(self._kwargs)))


class Replayer:
    """Lets stored hidden states stand for the blocks of a forward.

    Args:
        reading: what is read.
        planes: in the order of a record.
        storage: the stored form.
        examples: of the batch.
        records: of each row, and the counts of its tokens.
        calls: how the model called what is stored.
    """

    def __init__(
        self,
        reading: Reading,
        planes: Sequence[Plane],
        storage: Storage,
        examples: Examples,
        records: Sequence[tuple[Record, tuple[int, ...]]],
        calls: Calls,
    ) -> None:
        self._reading, self._planes, self._storage = reading, planes, storage
        self._examples, self._calls = examples, calls
        self._split = [split_record(record, planes, storage, counts) for record, counts in records]
        for number, tokens in enumerate(examples.tokens):
            found = [counts[number] for _, counts in records]
            assert found == tokens.expected(found), (found, tokens.mask)

    def put_on(self, on: ExitStack) -> None:
        """Be at work until `on` is closed."""
        for number, hooks in enumerate(self._reading.hooks):
            on.enter_context(stand_ins(hooks.stack, partial(self._forward, number)))

    def _forward(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for a block; gradients are off here, as in the block."""
        hooks, crossing = self._reading.hooks[number], self._reading.crossing
        at = next(block.parameters()).device
        if crossing is not None and number == len(self._reading.hooks) - 1:
            given = called_with(block, args, kwargs)
            query, key = (
                split_heads(self._stored(index_of(self._planes, kind), hooks.current, at), heads)
                for kind, heads in zip(("queries", "keys"), self._calls.heads, strict=True)
            )
            constant = self._calls.kwargs[hooks.current]
            crossing.again(hooks.current, given[STATES], Call(query, key, given.get(MASK), constant))
        phi = self._stored(index_of(self._planes, "hidden states", number), hooks.current, at)
        form = self._calls.forms[number]
        return (phi, *(None,) * (form - 1)) if form else phi

    def _stored(self, index: int, call: int, device: torch.device) -> Tensor:
        """(B, S, D) of a call."""
        plane = self._planes[index]
        packed = torch.from_numpy(np.concatenate([planes[index][call] for planes in self._split])).to(device)
        x_TD = unpack(packed, self._storage, plane.dtype)
        return self._examples.tokens[plane.stack].spread(x_TD, len(self._split))


def index_of(planes: Sequence[Plane], kind: str, stack: int | None = None) -> int:
    """The number of the plane of a kind, and of a stack where there are several."""
    return next(i for i, plane in enumerate(planes) if plane.kind == kind and stack in (None, plane.stack))


def split_record(
    record: Record, planes: Sequence[Plane], storage: Storage, counts: tuple[int, ...]
) -> list[NDArray[np.uint8]]:
    """The bytes (calls, tokens, bytes of a row) of each plane of a record."""
    parts, at = [], 0
    for plane in planes:
        shape = (plane.calls, counts[plane.stack], plane.row_bytes(storage))
        end = at + shape[0] * shape[1] * shape[2]
        parts.append(record[at:end].reshape(shape))
        at = end
    return parts


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * E) as (B, heads, S, E)."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def constants(kwargs: Mapping[str, Any], j: int) -> dict[str, Any]:
    """The arguments of a cross-attention that are the same in every call.

    A tensor that adds the same to all keys' scores is left out: the softmax does not see it (T5 adds zeros).

    Raises:
        ConfigError: there are others.
    """
    kept = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() == 4 and is_even(value):
            continue
        if not isinstance(value, bool | int | float | str | None):
            raise ConfigError(
                f"the cross-attention of decoder block {j} is called with {name} (a {type(value).__name__}), which "
                f"another batch may change; {WAY_OUT}"
            )
        if not name.startswith("output_"):
            kept[name] = value
    return kept


def autocast_of(reading: Reading) -> str:
    """The dtype of the autocast that is on where the stacks are; empty without."""
    device = next(reading.hooks[-1].stack.blocks[0].parameters()).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def attention_of(reading: Reading) -> tuple[str, ...]:
    """The names of the implementations of attention that each stack's blocks look up, in words.

    Each gives other bits, and a model's can be changed at any time.
    """
    found = []
    for hooks in reading.hooks:
        modules = (module for block in hooks.stack.blocks for module in block.modules())
        configs = {id(config): config for m in modules if (config := getattr(m, "config", None)) is not None}
        names = {str(getattr(config, "_attn_implementation", None)) for config in configs.values()}
        found.append(" and ".join(sorted(names)))
    return tuple(found)
