"""Times several programs in one run, interleaved, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timings:
    """Seconds of each program in each round, in the order in which they ran."""

    seconds: dict[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The median time of a program."""
        return median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of time(name) / time(other), each ratio taken within one round."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return median(mine / theirs for mine, theirs in pairs)

    def ratios(self) -> dict[tuple[str, str], float]:
        """Every pair of different programs."""
        return {(a, b): self.ratio(a, b) for a in self.seconds for b in self.seconds if a != b}


def interleave(
    programs: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run A B C, A B C, ...: `warmup` rounds that do not count, then `rounds` that do.

    Args:
        programs: by name, each called without arguments.
        rounds: at least 1.
        warmup: rounds before the count, at least 0.
        clock: seconds; a test hands in its own.

    Raises:
        ValueError: no program, or a number of rounds that is out of range.
    """
    if not programs:
        raise ValueError("interleave needs at least one program")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(warmup + rounds):
        for name, program in programs.items():
            _synchronize()
            begin = clock()
            program()
            _synchronize()
            if index >= warmup:
                seconds[name].append(clock() - begin)
    return Timings({name: tuple(values) for name, values in seconds.items()})


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
