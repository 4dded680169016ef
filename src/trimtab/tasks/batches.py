"""Batches of examples as a pure function of (seed, step), and the tensors that a model is called with.

A step has `batch` examples, drawn without replacement within an epoch; the last step of an epoch may have fewer. Which
examples a step has does not depend on how they are put into sequences: examples that are packed, or padded in
micro-batches of any size, give the same sum of losses.

Packing (causal models): the examples of a micro-batch are laid into as few positions as possible, several to a
sequence; positions begin anew with each, and a mask keeps them from seeing each other.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.data.batches import IGNORE
from trimtab.data.order import Order
from trimtab.tasks.encode import Encoded

# Steps whose examples are sorted by length together: enough for similar ones, few enough to keep the order random.
_WINDOW = 50
# Positions of attention that cost as much as the rest of a position.
_FLAT = 4000
# Steps over which the share of padding is counted.
_COUNTED = 1000


@dataclass(frozen=True, eq=False)
class Part:
    """One micro-batch, as tensors.

    Attributes:
        input_ids: (n, S) int64.
        labels: (n, S) int64, shifted, -100 where nothing is due; (n, T) of a decoder; (n,) classes or values.
        examples: how many examples it holds (packed sequences hold several).
        tokens: how many of its positions are not padding, a decoder's included.
        n_valid: how many tokens or labels are scored.
        attention_mask: (n, S) int64, 0 at padding, or (n, 1, S, S) bool of packed sequences; None: causal alone.
        position_ids: (n, S) of packed sequences.
        token_type_ids: (n, S), where the tokenizer tells two texts apart.
        decoder_input_ids: (n, T) of an encoder-decoder model.
    """

    input_ids: Tensor
    labels: Tensor
    examples: int
    tokens: int
    n_valid: int
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.examples

    @property
    def positions(self) -> int:
        """How many positions the model computes, padding included."""
        return self.input_ids.numel() + (0 if self.decoder_input_ids is None else self.decoder_input_ids.numel())

    def to(self, device: torch.device | str) -> Part:
        """The same on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            token_type_ids=moved(self.token_type_ids),
            decoder_input_ids=moved(self.decoder_input_ids),
        )


class Collate(Protocol):
    """Makes tensors of some examples of a set."""

    def __call__(self, data: Encoded, rows: Sequence[int]) -> Part: ...


@dataclass(frozen=True)
class PadHead:
    """For a model with a head: padded on the right."""

    pad_id: int

    def __call__(self, data: Encoded, rows: Sequence[int]) -> Part:
        assert data.labels is not None
        ids = torch.from_numpy(data.ids.padded(rows, self.pad_id))
        lengths = torch.from_numpy(data.ids.lengths[list(rows)])
        types = None if data.types is None else torch.from_numpy(data.types.padded(rows, 0))
        labels = torch.from_numpy(data.labels[list(rows)])
        tokens = int(lengths.sum())
        mask = _within(lengths, ids.shape[1])
        return Part(ids, labels, len(rows), tokens, len(rows), attention_mask=mask, token_type_ids=types)


@dataclass(frozen=True)
class PadPairs:
    """For an encoder-decoder model: both sides padded on the right; the decoder reads its targets shifted by one."""

    pad_id: int
    start_id: int

    def __call__(self, data: Encoded, rows: Sequence[int]) -> Part:
        assert data.targets is not None
        ids = torch.from_numpy(data.ids.padded(rows, self.pad_id))
        lengths = torch.from_numpy(data.ids.lengths[list(rows)])
        labels = torch.from_numpy(data.targets.padded(rows, IGNORE))
        given = torch.full_like(labels, self.start_id)
        given[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, self.pad_id)
        scored = int(data.targets.lengths[list(rows)].sum())
        mask = _within(lengths, ids.shape[1])
        tokens = int(lengths.sum()) + scored
        return Part(ids, labels, len(rows), tokens, scored, attention_mask=mask, decoder_input_ids=given)


@dataclass(frozen=True)
class LayCausal:
    """For a causal model: packed, or padded on the right, where causality alone keeps padding out of sight.

    `masked` tells of the padding all the same, for those who have to know which positions hold tokens.
    """

    pad_id: int
    seq_len: int
    packing: bool
    masked: bool = False

    def __call__(self, data: Encoded, rows: Sequence[int]) -> Part:
        assert data.learned is not None
        lengths = [int(length) for length in data.ids.lengths[list(rows)]]
        bins, width = pack(lengths, self.seq_len) if self.packing else ([[n] for n in range(len(rows))], max(lengths))
        shape = (len(bins), width)
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        document = np.zeros(shape, dtype=np.int64)
        places = np.zeros(shape, dtype=np.int64)
        for line, members in enumerate(bins):
            at = 0
            for number, member in enumerate(members):
                row, size = rows[member], lengths[member]
                tokens, learned = data.ids[row].astype(np.int64), data.learned[row]
                ids[line, at : at + size] = tokens
                labels[line, at : at + size - 1] = np.where(learned[1:], tokens[1:], IGNORE)
                document[line, at : at + size] = number
                places[line, at : at + size] = np.arange(size)
                at += size
            document[line, at:] = len(members)  # padding sees itself alone, so that no row of the mask is empty
            places[line, at:] = np.arange(width - at)
        mask = position_ids = None
        if any(len(members) > 1 for members in bins):
            same = torch.from_numpy(document[:, :, None] == document[:, None, :])
            mask, position_ids = same.tril_()[:, None], torch.from_numpy(places)
        elif self.masked:
            mask = _within(torch.tensor([sum(lengths[n] for n in members) for members in bins]), width)
        valid = int((labels != IGNORE).sum())
        return Part(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            len(rows),
            sum(lengths),
            valid,
            attention_mask=mask,
            position_ids=position_ids,
        )


def pack(lengths: Sequence[int], limit: int) -> tuple[list[list[int]], int]:
    """Lay sequences into rows of one width, several to a row; few positions in all, and narrow rows.

    Each position attends over its row's width, masked or not, so what is made least is rows * width * (4000 + width):
    a position costs as much as attending over some 4,000 (2,000 in a model 600 wide, 14,000 in one 4,096 wide).

    For each number of rows, sequences go, longest first, to the row that is shortest so far; the width is then that of
    the longest row, at most 4/3 of the least there could be (Graham, "Bounds on Multiprocessing Timing Anomalies",
    1969), and must not exceed `limit`, unless one sequence does.

    Returns:
        The numbers of the sequences in each row, and the width.
    """
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    limit = max(limit, lengths[order[0]])
    best: tuple[int, int, list[list[int]]] | None = None  # cost, width, rows
    for rows in range(-(-sum(lengths) // limit), len(lengths) + 1):
        bins: list[list[int]] = [[] for _ in range(rows)]
        heap = [(0, row) for row in range(rows)]
        for n in order:
            filled, row = heap[0]
            bins[row].append(n)
            heapq.heapreplace(heap, (filled + lengths[n], row))
        width = max(heap)[0]
        cost = rows * width * (_FLAT + width)
        if width <= limit and (best is None or (cost, width) < best[:2]):
            best = (cost, width, bins)
    assert best is not None  # a row for each is always one of them
    return best[2], best[1]


def _within(lengths: Tensor, width: int) -> Tensor:
    """(n, width) int64: 1 where a sequence is, 0 behind its end."""
    return (torch.arange(width) < lengths[:, None]).long()


class StepBatch:
    """The examples of one step, `rows` of its data; tensors are made part by part."""

    def __init__(self, data: Encoded, collate: Collate, rows: NDArray[np.int64]) -> None:
        self._data, self._collate, self.rows = data, collate, rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_valid(self) -> int:
        """How many tokens or labels are scored."""
        return int(self._data.due[self.rows].sum())

    @property
    def tokens(self) -> int:
        """How many tokens it has, without padding."""
        return int(self._data.tokens[self.rows].sum())

    def split(self, micro: int) -> Iterator[Part]:
        """Micro-batches of `micro` examples in order; the last may be smaller."""
        for start in range(0, len(self.rows), micro):
            yield self._collate(self._data, self.rows[start : start + micro].tolist())


class ExampleBatches:
    """The batch of any step.

    Args:
        data: of the training split.
        collate: makes its tensors.
        batch: examples a step.
        seed: decides the order.
        grouped: batches hold examples of similar length (sorted within windows of 50 batches, which are then shuffled).
    """

    def __init__(self, data: Encoded, collate: Collate, batch: int, seed: int, *, grouped: bool = False) -> None:
        self.data, self.collate, self.size = data, collate, batch
        self._seed, self._grouped = seed, grouped
        self._order = Order(len(data), seed)
        self._lengths = data.tokens
        self._epoch_of = functools.lru_cache(maxsize=2)(self._make_epoch)

    def lay(self, collate: Collate, *, grouped: bool) -> None:
        """Make tensors in another way from now on; which examples an epoch has stays."""
        self.collate, self._grouped = collate, grouped
        self._epoch_of.cache_clear()

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.data) // self.size)

    def batch(self, step: int) -> StepBatch:
        """The batch of 0-based `step`."""
        epoch, place = divmod(step, self.per_epoch)
        return StepBatch(self.data, self.collate, self._epoch_of(epoch)[place])

    def epoch(self, step: int) -> float:
        """How many times the examples have been seen before 0-based `step`."""
        return step / self.per_epoch

    def tokens(self, step: int) -> int:
        """How many tokens, without padding, the steps before 0-based `step` have."""
        epoch, place = divmod(step, self.per_epoch)
        now = sum(int(self._lengths[rows].sum()) for rows in self._epoch_of(epoch)[:place]) if place else 0
        return epoch * int(self._lengths.sum()) + now

    def padding(self, micro: int | None = None) -> float:
        """The share of padding among the positions of the first epoch (of its first 1,000 steps, if it has more)."""
        real = positions = 0
        for step in range(min(self.per_epoch, _COUNTED)):
            batch = self.batch(step)
            for part in batch.split(micro or len(batch)):
                real += part.tokens
                positions += part.positions
        return 1.0 - real / positions

    def _make_epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The examples of each of its steps."""
        n = len(self.data)
        order = self._order.indices(np.arange(epoch * n, (epoch + 1) * n, dtype=np.int64))
        if not self._grouped:
            return [order[start : start + self.size] for start in range(0, n, self.size)]
        batches: list[NDArray[np.int64]] = []
        window = _WINDOW * self.size
        for start in range(0, n, window):
            inside = order[start : start + window]
            inside = inside[np.argsort(-self._lengths[inside], kind="stable")]
            batches += [inside[at : at + self.size] for at in range(0, len(inside), self.size)]
        turn = Order(len(batches), self._seed + 1)
        places = turn.indices(np.arange(epoch * len(batches), (epoch + 1) * len(batches), dtype=np.int64))
        return [batches[place] for place in places]


def in_order(data: Encoded, collate: Collate, batch: int) -> Iterator[tuple[Part, NDArray[np.int64]]]:
    """All examples once, longest first so that little is padded, each part with the numbers of its sequences."""
    order = np.argsort(-data.tokens, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        yield collate(data, rows.tolist()), rows
