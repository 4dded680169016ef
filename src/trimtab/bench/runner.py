"""Times several programs in one run, interleaved, so that a slow minute of the machine hits all of them.

Beside it, what every printed table needs: the date, the machine and the command.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
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

    def spread(self, name: str, other: str) -> tuple[float, float]:
        """The least and the largest of the ratios whose median is `ratio`."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds[name], self.seconds[other], strict=True)]
        return min(ratios), max(ratios)

    def shown(self, name: str, other: str) -> str:
        """The ratio as tables print it: its median, and its least and largest value where there are several."""
        low, high = self.spread(name, other)
        several = len(self.seconds[name]) > 1
        return f"{self.ratio(name, other):.2f}" + (f" ({low:.2f}-{high:.2f})" if several else "")

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


def circumstances() -> str:
    """One line: the date, the machine, torch, the threads, and the command that was run."""
    return (
        f"{date.today().isoformat()}; {_processor()}; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"`python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}`"
    )


def _processor() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        name = next((value.strip() for key, value in fields.items() if key.strip() == "model name"), name)
    capability = torch.backends.cpu.get_cpu_capability()
    device = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name} ({capability}{device})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join((first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)))} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join((line(header), f"|{rule}|", *map(line, rows)))
