"""The order of training samples: a fresh permutation each epoch that is computed, never stored.

A Feistel network is a bijection of {0, ..., 2^b - 1} for any round function. Where its output falls
outside {0, ..., n - 1} it is applied again ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002), which makes it a bijection of {0, ..., n - 1}; since 2^b < 2n for n > 2, two
applications suffice on average. A seek to any position costs the same few operations at any n.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # even, so that halves of unequal width end up where they began


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """The keys of one epoch, from a hash that is the same on every machine and in every version."""
    digest = hashlib.blake2b(f"trimtab.order:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each word over all its 64 bits (the finaliser of SplitMix64; Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """Maps a position in an endless sequence of epochs to the sample that is seen there.

    Position `epoch * n + i` is the i-th sample of its epoch; within one epoch each of the n samples comes
    exactly once. A pure function of (n, seed, position).

    Args:
        n: number of samples, at least 1.
        seed: any integer; another seed or another epoch gives an unrelated permutation.

    Raises:
        ValueError: n is below 1, or a position is negative.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"an order needs at least one sample, got n={n}")
        self.n = n
        self.seed = seed
        bits = max(2, (n - 1).bit_length())
        self._left = bits // 2
        self._right = bits - bits // 2

    def index(self, position: int) -> int:
        """The sample at one position."""
        return int(self.indices(np.array([position], dtype=np.int64))[0])

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at `positions` (any shape); returns int64 of the same shape."""
        flat = np.asarray(positions, dtype=np.int64).reshape(-1)
        if flat.size and flat.min() < 0:
            raise ValueError(f"a position in the data is never negative, got {flat.min()}")
        out = np.empty_like(flat)
        epochs = flat // self.n
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._permute((flat[chosen] % self.n).astype(np.uint64), int(epoch))
        return out.reshape(np.shape(positions))

    def _permute(self, x: NDArray[np.uint64], epoch: int) -> NDArray[np.int64]:
        keys = _round_keys(self.seed, epoch)
        out = self._feistel(x, keys)
        outside = np.flatnonzero(out >= self.n)
        while outside.size:
            out[outside] = self._feistel(out[outside], keys)
            outside = outside[out[outside] >= self.n]
        return out.astype(np.int64)

    def _feistel(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_bits, right_bits = self._left, self._right
        left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
        for key in keys:
            # (L, R) -> (R, L xor f(R)): the widths change places with the halves.
            left, right = right, left ^ (_mix(right ^ key) & np.uint64((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
