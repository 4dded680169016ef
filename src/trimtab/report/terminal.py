"""Pictures made of characters: the learning rate of a run, drawn in the terminal."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import IO

from trimtab.config import PretrainConfig

#: The bits of a braille cell, by dot column (0..1) and dot row (0..3, from the top); U+2800 is the empty cell.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

#: A dot column looks at no more steps than this, so that the picture of a million steps is drawn at once.
_SAMPLES = 64

_GUTTER = 9  # width of "1.00e-03 "


def terminal_width(stream: IO[str] | None = None) -> int:
    """Columns to draw in: those of the terminal, 100 at most; 80 where there is none."""
    stream = stream or sys.stdout
    if not os.environ.get("COLUMNS") and not stream.isatty():
        return 80
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, 100))


def draws_braille(stream: IO[str] | None = None) -> bool:
    """Whether the stream's encoding has the characters of the fine picture."""
    try:
        "⣿│└─▲┆".encode(getattr(stream or sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def schedule_picture(config: PretrainConfig, *, width: int = 80, height: int = 10, braille: bool = True) -> str:
    """The learning rate over all steps, with the restarts and the end of the warm start marked below it.

    Args:
        config: of the run.
        width: of the whole picture, in characters.
        height: of the curve, in lines.
        braille: draw with braille dots, 2 x 4 a character; otherwise with ASCII, 1 x 2 a character.
    """
    multiplier, switch = config.multiplier(), config.method.switch_step
    before = config.optim.warm_start_lr or config.optim.lr

    def rate(step: int) -> float:
        return (before if step < switch else config.optim.lr) * multiplier(step)

    restarts = config.restarts()
    jumps = [*restarts, *([switch] if switch else [])]
    lines = curve(rate, config.train.steps, jumps=jumps, width=width, height=height, braille=braille)
    triangle, dashes = ("▲", "┆") if braille else ("^", "|")
    marks = [" "] * (width - _GUTTER - 1)
    for step, sign in [*((n, triangle) for n in restarts), *([(switch, dashes)] if switch else [])]:
        marks[min(step * len(marks) // config.train.steps, len(marks) - 1)] = sign
    legend = []
    if switch:
        legend.append(f"{dashes} end of the warm start (step {switch:,})")
    if restarts:
        legend.append(f"{triangle} restart ({len(restarts)})")
    if legend:
        lines.append((" " * (_GUTTER + 1) + "".join(marks)).rstrip())
    lines.append(_ends("0", f"step {config.train.steps:,}", width))
    if legend:
        room = width - _GUTTER - 1
        apart = ["   ".join(legend)] if len("   ".join(legend)) <= room else legend
        lines += [" " * (_GUTTER + 1) + part for part in apart]
    return "\n".join(lines)


def curve(
    value: Callable[[int], float],
    total: int,
    *,
    jumps: Sequence[int] = (),
    width: int = 80,
    height: int = 10,
    braille: bool = True,
) -> list[str]:
    """Lines of characters that show value(0) ... value(total - 1), from 0 to the largest, with a vertical axis.

    Args:
        value: of a step; not negative.
        total: number of steps.
        jumps: steps at which the value jumps; they are looked at whatever the resolution.
        width: of a whole line, in characters.
        height: number of lines above the axis.
        braille: see `schedule_picture`.
    """
    across, down = (2, 4) if braille else (1, 2)
    cells = width - _GUTTER - 1
    columns, rows = cells * across, height * down
    spans = [_span(value, total, column, columns, jumps) for column in range(columns)]
    top = max(high for _, high, _ in spans) or 1.0

    def row(level: float) -> int:
        return min(rows - 1, round((1.0 - level / top) * (rows - 1)))

    filled: set[tuple[int, int]] = set()
    last: int | None = None
    for column, (low, high, final) in enumerate(spans):
        first, bottom = row(high), row(low)
        if last is not None:  # join the columns, so that a jump is a stroke and no gap
            first, bottom = min(first, last), max(bottom, last)
        filled.update((column, r) for r in range(first, bottom + 1))
        last = row(final)

    bar, corner, dash = ("│", "└", "─") if braille else ("|", "+", "-")
    lines = []
    for line in range(height):
        label = {0: f"{top:.2e}", height // 2: f"{top * (1 - (height // 2 * down) / (rows - 1)):.2e}"}.get(line, "")
        text = "".join(_cell(filled, cell, line, braille) for cell in range(cells))
        lines.append(f"{label:>{_GUTTER - 1}} {bar}{text}".rstrip())
    lines.append(f"{'0':>{_GUTTER - 1}} {corner}{dash * cells}")
    return lines


def _span(
    value: Callable[[int], float], total: int, column: int, columns: int, jumps: Sequence[int]
) -> tuple[float, float, float]:
    """Lowest, highest and last value among the steps that a dot column stands for."""
    first = column * total // columns
    end = max(first + 1, (column + 1) * total // columns)
    stride = max(1, (end - first) // _SAMPLES)
    steps = {*range(first, end, stride), end - 1}
    steps |= {near for jump in jumps for near in (jump - 1, jump) if first <= near < end}
    values = [value(step) for step in sorted(steps)]
    return min(values), max(values), values[-1]


def _cell(filled: set[tuple[int, int]], cell: int, line: int, braille: bool) -> str:
    """The character of one cell."""
    if braille:
        bits = sum(_DOTS[x][y] for x in range(2) for y in range(4) if (cell * 2 + x, line * 4 + y) in filled)
        return chr(0x2800 + bits) if bits else " "
    return " '.:"[((cell, line * 2) in filled) + 2 * ((cell, line * 2 + 1) in filled)]


def _ends(left: str, right: str, width: int) -> str:
    """Two words at the ends of the horizontal axis."""
    room = width - _GUTTER - 1
    return " " * (_GUTTER + 1) + left + right.rjust(room - len(left))
