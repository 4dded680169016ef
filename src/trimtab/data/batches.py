"""Batches as a pure function of (seed, step): training samples in their keyed order, validation from the start.

Sample i of a split with sequences of S tokens covers the tokens i * S ... i * S + S: S inputs and, shifted by
one, S labels. Neighbouring samples share one token, the last label of one being the first input of the next, so
that every token but the first of the split is a label exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.data.order import Order
from trimtab.data.store import Split

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of n sequences of S tokens.

    Attributes:
        input_ids: (n, S) int64.
        labels: (n, S) int64, already shifted: labels[:, t] is to be predicted from input_ids[:, : t + 1];
            -100 where nothing is scored.
        valid_per_row: how many labels of each sequence are scored; known on the host, so that nobody
            has to wait for a device to learn it.
        attention_mask: (n, 1, S, S) bool, true where a query (third axis) sees a key; None means causal.
        position_ids: (n, S) int64, restarting with each document; None means 0 ... S - 1.
    """

    input_ids: Tensor
    labels: Tensor
    valid_per_row: tuple[int, ...]
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def n_valid(self) -> int:
        """How many labels are scored."""
        return sum(self.valid_per_row)

    @property
    def tokens(self) -> int:
        """How many tokens it has; nothing in it is padding."""
        return self.input_ids.numel()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def split(self, micro: int) -> Iterator[Batch]:
        """Micro-batches of `micro` sequences in order; the last may be smaller. The tensors are views."""
        if micro < 1:
            raise ValueError(f"a micro-batch needs at least one sequence, got {micro}")
        for start in range(0, len(self), micro):
            rows = slice(start, start + micro)
            yield Batch(
                input_ids=self.input_ids[rows],
                labels=self.labels[rows],
                valid_per_row=self.valid_per_row[rows],
                attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
                position_ids=None if self.position_ids is None else self.position_ids[rows],
            )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            valid_per_row=self.valid_per_row,
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
            position_ids=None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
        )


def _batch(inputs: NDArray[np.int64], labels: NDArray[np.int64], document_mask: bool, eos_id: int) -> Batch:
    """Make tensors, and with `document_mask` shut each document off from the others in its sequence."""
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    if document_mask:
        ends = inputs == eos_id
        # A document's end-of-text token belongs to it; what it would predict is the next document's first token.
        labels = np.where(ends, IGNORE, labels)
        document = np.cumsum(ends, axis=1) - ends  # (n, S): 0 for the first document of each sequence, then 1, ...
        place = np.arange(inputs.shape[1])
        starts = np.ones_like(ends)
        starts[:, 1:] = ends[:, :-1]
        first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)  # (n, S): where its document begins
        position_ids = torch.from_numpy(place - first)
        documents = torch.from_numpy(document)
        same = documents[:, :, None] == documents[:, None, :]  # (n, S, S)
        mask = same.tril_()[:, None]  # (n, 1, S, S)
    valid = tuple(int(v) for v in (labels != IGNORE).sum(axis=1))
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), valid, mask, position_ids)


class TrainBatches:
    """The global batch of any step, of which each rank takes its slice.

    Args:
        split: the training part of a store.
        seq_len: S, tokens in a sequence.
        sequences: sequences in one global batch.
        seed: decides the order.
        rank: this process, 0 <= rank < world.
        world: number of processes.
        document_mask: documents in one sequence do not see each other.
        eos_id: the token that ends each document.

    Raises:
        ValueError: `sequences` is not divisible by `world`, the rank is out of range, or the split is
            smaller than one sequence.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        sequences: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        document_mask: bool = False,
        eos_id: int,
    ) -> None:
        if sequences < 1 or sequences % world:
            raise ValueError(f"sequences={sequences} a step cannot be shared evenly by world={world} processes")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is outside 0 ... world - 1 = {world - 1}")
        if split.n_chunks(seq_len) < 1:
            raise ValueError(f"{split.n_tokens} training tokens hold no sequence of seq_len={seq_len} (+ 1)")
        self.n_chunks = split.n_chunks(seq_len)
        self._tokens = split.tokens
        self._seq_len = seq_len
        self._sequences = sequences
        self._rank = rank
        self._share = sequences // world
        self._document_mask = document_mask
        self._eos_id = eos_id
        self._order = Order(self.n_chunks, seed)

    def batch(self, step: int) -> Batch:
        """This rank's slice of the batch of 0-based `step`."""
        first = step * self._sequences + self._rank * self._share
        chunks = self._order.indices(np.arange(first, first + self._share, dtype=np.int64))
        places = chunks[:, None] * self._seq_len + np.arange(self._seq_len + 1)
        tokens = self._tokens[places].astype(np.int64)  # (share, S + 1)
        inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return _batch(inputs, labels, self._document_mask, self._eos_id)

    def distinct(self, steps: int) -> int:
        """How many different samples the first `steps` batches hold, of all ranks."""
        return min(self.n_chunks, steps * self._sequences)

    def epoch(self, step: int) -> float:
        """How many times the data has been seen before 0-based `step` (that is, after `step` steps)."""
        return step * self._sequences / self.n_chunks

    def tokens(self, step: int) -> int:
        """How many tokens this rank's share of the steps before 0-based `step` has."""
        return step * self._share * self._seq_len


def validation_batches(
    split: Split,
    seq_len: int,
    tokens: int,
    batch_sequences: int,
    *,
    document_mask: bool = False,
    eos_id: int,
) -> Iterator[tuple[Batch, int]]:
    """Score the first `tokens` validation tokens that have something before them to be predicted from.

    Yields batches of up to `batch_sequences` consecutive sequences, each with the number of UTF-8 bytes that
    exactly its scored tokens cover (an end-of-text token covers none). Each token is scored at most once;
    the sum of `Batch.n_valid` is `tokens`, or all there are if the split holds fewer: all but its first one,
    and with `document_mask` all but each document's first one. A last sequence that is cut short is
    filled with `eos_id`, unscored.
    """
    if split.byte_lengths is None:
        raise ValueError("this split has no byte lengths: pass the validation part of a store")
    if tokens < 1 or batch_sequences < 1:
        raise ValueError(f"tokens={tokens} and batch_sequences={batch_sequences} must be at least 1")
    left = tokens
    start = 0
    while left > 0 and start < split.n_tokens - 1:
        stop = min(start + batch_sequences * seq_len, split.n_tokens - 1)
        rows = -(-(stop - start) // seq_len)
        inputs = np.full(rows * seq_len, eos_id, dtype=np.int64)
        labels = np.full(rows * seq_len, IGNORE, dtype=np.int64)
        covered = np.zeros(rows * seq_len, dtype=np.int64)
        inputs[: stop - start] = split.tokens[start:stop]
        labels[: stop - start] = split.tokens[start + 1 : stop + 1]
        covered[: stop - start] = split.byte_lengths[start + 1 : stop + 1]
        scored = labels != IGNORE
        if document_mask:
            scored &= inputs != eos_id
        scored &= np.cumsum(scored) <= left
        labels[~scored] = IGNORE
        rows = min(rows, int(np.flatnonzero(scored)[-1]) // seq_len + 1) if scored.any() else 0
        if rows:
            shape = (rows, seq_len)
            inputs, labels = inputs[: rows * seq_len].reshape(shape), labels[: rows * seq_len].reshape(shape)
            yield _batch(inputs, labels, document_mask, eos_id), int(covered[scored].sum())
        left -= int(scored.sum())
        start = stop
