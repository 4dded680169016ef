"""Random numbers that are the same on every machine, device and rank."""

from __future__ import annotations

import hashlib

import torch


def stable_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `key`: the same on every machine, rank and Python."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
