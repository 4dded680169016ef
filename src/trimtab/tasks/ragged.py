"""Sequences of unequal length in one flat array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ragged:
    """n sequences; sequence i is `flat[starts[i] : starts[i + 1]]`.

    Attributes:
        flat: (N,), all of them one after the other.
        starts: (n + 1,) int64, from 0 to N.
    """

    flat: NDArray[Any]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any] | NDArray[Any]], dtype: Any = np.int32) -> Ragged:
        """From one sequence each."""
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows)), out=starts[1:])
        flat = np.empty(int(starts[-1]), dtype=dtype)
        for start, row in zip(starts, rows, strict=False):
            flat[start : start + len(row)] = row
        return cls(flat, starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        return self.flat[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,): of each sequence."""
        return np.diff(self.starts)

    def padded(self, rows: Iterable[int], value: int, *, left: bool = False) -> NDArray[np.int64]:
        """Some of them as (rows, longest) int64, filled with `value` behind, or with `left` before, their end."""
        chosen = [self[row] for row in rows]
        width = max((len(row) for row in chosen), default=0)
        out = np.full((len(chosen), width), value, dtype=np.int64)
        for line, row in zip(out, chosen, strict=True):
            if left:
                line[width - len(row) :] = row
            else:
                line[: len(row)] = row
        return out
