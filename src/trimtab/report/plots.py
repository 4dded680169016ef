"""Charts as inline SVG that is drawn once, here, and stretches with the page.

The lines live in an SVG of 1000 x 1000 units that fills its box whatever its shape (strokes do not scale); the
text around it is ordinary HTML at percentages, so it stays readable on a phone. Colours are the page's variables,
so that one drawing serves light and dark. A few lines of script (assets.py) add a cross-hair; without it the chart
is complete. No plotting library is needed, and the file stays small: a curve is thinned to the smallest and the
largest value in each of `COLUMNS` columns, which keeps every spike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Literal

import numpy as np

from trimtab import words
from trimtab.report.runfolder import FloatArray

#: Columns that a curve is thinned to; a page is some 1,000 pixels wide.
COLUMNS = 700
_UNITS = 1000.0
_ROUND = ("points", "dots", "ring")


@dataclass(frozen=True)
class Series:
    """One curve or cloud of points; x rises.

    Attributes:
        label: its name in the legend and under the cross-hair.
        x: positions; y: values, of the same length.
        colour: a colour variable of the page.
        style: "line", "faint" (a line in the background), "points" (small), "dots" or "ring".
        hover: whether the cross-hair reads it out.
        legend: whether the legend lists it.
    """

    label: str
    x: FloatArray
    y: FloatArray
    colour: str = "train"
    style: Literal["line", "faint", "points", "dots", "ring"] = "line"
    hover: bool = True
    legend: bool = True


@dataclass(frozen=True)
class Marks:
    """Vertical lines at `xs`; `note` is written at the first one's head."""

    label: str
    xs: Sequence[float]
    colour: str
    note: str = ""


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    label: str
    y: float
    colour: str = "level"


@dataclass(frozen=True)
class Name:
    """A word beside a point, whose error bar reaches `bar` to each side of it."""

    text: str
    x: float
    y: float
    bar: float = 0.0


@dataclass(frozen=True)
class Axis:
    """The range of one axis, and how its numbers are written."""

    label: str
    low: float
    high: float
    log: bool = False
    form: Callable[[float], str] = field(default=words.tick)

    def place(self, values: FloatArray) -> FloatArray:
        """Positions in [0, 1]; outside it for values out of range, but never far outside."""
        if self.log:
            floor = self.low * 1e-3
            values, low, high = np.log10(np.maximum(values, floor)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return np.asarray((values - low) / (high - low), dtype=np.float64)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers inside the range: decades on a log axis, steps of 1, 2 or 5 elsewhere."""
        if self.log:
            low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((high - low + 1) / (wanted + 1)))
            decades = [10.0**power for power in range(high, low - 1, -stride)][::-1]
            if len(decades) > 2 or high - low > 1:
                return decades
            fine = [m * 10.0**power for power in range(low - 1, high + 1) for m in (1, 2, 5)]
            found = [value for value in fine if self.low <= value <= self.high]
            return found if len(found) > 1 else [self.low, self.high]
        raw = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def thin(x: FloatArray, y: FloatArray, columns: int = COLUMNS) -> tuple[FloatArray, FloatArray]:
    """The first and the last point, and the smallest and largest y of each column of equal width; x rises."""
    if len(x) <= 2 * columns or x[0] == x[-1]:
        return x, y
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * columns).astype(np.int64), columns - 1)
    edges = np.flatnonzero(np.diff(column)) + 1
    kept = {0, len(x) - 1}
    for begin, end in zip((0, *edges.tolist()), (*edges.tolist(), len(x)), strict=True):
        kept.add(begin + int(y[begin:end].argmin()))
        kept.add(begin + int(y[begin:end].argmax()))
    order = np.asarray(sorted(kept))
    return x[order], y[order]


def smooth(x: FloatArray, y: FloatArray, window: int, breaks: Sequence[float] = ()) -> FloatArray:
    """The centred mean over `window` points, never reaching over a step in `breaks` (a restart shows as it is)."""
    edges = [0, *np.searchsorted(x, np.asarray(sorted(breaks)), side="right").tolist(), len(x)]
    out = np.empty_like(y)
    half = window // 2
    for begin, end in pairwise(edges):
        part = y[begin:end]
        if not len(part):
            continue
        sums = np.concatenate(([0.0], np.cumsum(part)))
        at = np.arange(len(part))
        low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(part))
        out[begin:end] = (sums[high] - sums[low]) / (high - low)
    return out


def loss_range(series: Sequence[tuple[FloatArray, FloatArray]], share: float = 0.05) -> tuple[float, float]:
    """A range of y that shows what matters: the highest 2 % and the first `share` of the run may stick out above.

    The bottom is the lowest value. Without points it is (0, 1).
    """
    curves = [(x, y) for x, y in series if len(x)]
    if not curves:
        return 0.0, 1.0
    end = max(float(x[-1]) for x, _ in curves)
    late = [y[x > share * end] for x, y in curves]
    high = max(float(np.quantile(y, 0.98)) for y in late if len(y))
    low = min(float(y.min()) for _, y in curves)
    room = max((high - low) * 0.08, 1e-3 * max(abs(high), abs(low)), 1e-9)
    return low - room, high + room


def chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    marks: Sequence[Marks] = (),
    levels: Sequence[Level] = (),
    names: Sequence[Name] = (),
    height: int = 240,
    caption: str = "",
    columns: int = COLUMNS,
    x_word: str = "step",
    legend: bool = True,
) -> str:
    """One figure as HTML. All texts are plain; they are escaped here."""
    drawn = [(one, *thin(one.x, one.y, columns)) for one in series if len(one.x)]
    lines = "".join(_curve(one, x.place(xs), y.place(ys)) for one, xs, ys in drawn if one.style not in _ROUND)
    dots = "".join(_curve(one, x.place(xs), y.place(ys)) for one, xs, ys in drawn if one.style in _ROUND)
    x_ticks, y_ticks = x.ticks(), y.ticks(4)
    grid = "".join(f"M0 {_u(1 - at)}H1000" for at in y.place(np.asarray(y_ticks)))
    upright = "".join(_marks(mark, x) for mark in marks if len(mark.xs))
    flat = "".join(
        f'<path class="level" style="stroke:var(--{level.colour})" d="M0 {_u(1 - at)}H1000"/>'
        for level in levels
        if 0 <= (at := float(y.place(np.asarray([level.y]))[0])) <= 1
    )
    data = [
        {
            "l": one.label,
            "c": one.colour,
            "x": [float(f"{v:.8g}") for v in xs.tolist()],
            "y": [float(f"{v:.5g}") for v in ys.tolist()],
        }
        for one, xs, ys in drawn
        if one.hover
    ]
    texts = "".join(
        f'<span class="yt" style="top:{100 - 100 * at:.2f}%">{escape(y.form(tick))}</span>'
        for tick, at in zip(y_ticks, y.place(np.asarray(y_ticks)).tolist(), strict=True)
    ) + "".join(
        f'<span class="xt" style="left:{100 * at:.2f}%">{escape(x.form(tick))}</span>'
        for tick, at in zip(x_ticks, x.place(np.asarray(x_ticks)).tolist(), strict=True)
    )
    notes = "".join(_note(mark, x) for mark in marks if mark.note and len(mark.xs))
    empty = "" if drawn else '<p class="empty">Nothing was logged for this plot.</p>'
    about = f"{title}. {caption}" if caption else title
    keys = _legend(series, marks, levels) if legend else ""
    ranges = f'data-x="{_n(x.low)},{_n(x.high)}" data-y="{_n(y.low)},{_n(y.high)},{int(y.log)}"'
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<div class="legend"><span class="unit">{escape(y.label)}</span>{keys}</div>'
        f'<div class="box" style="height:{height}px" tabindex="0" role="img" aria-label="{escape(about)}" '
        f'{ranges} data-word="{escape(x_word)}" '
        f'data-s="{escape(json.dumps(data, separators=(",", ":"), allow_nan=False))}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{upright}{flat}{lines}</svg>'
        f'<svg class="over" viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{dots}</svg>'
        f'{texts}{notes}{_names(names, x, y, height)}{empty}</div><div class="xl">{escape(x.label)}</div>'
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"
    )


def histogram(title: str, values: FloatArray, *, bins: int = 50, height: int = 120) -> str:
    """The density of `values` in `bins` equal bins on (0, largest), on a log axis, as a small figure."""
    top = float(values.max()) if len(values) else 0.0
    if top <= 0:
        return chart(title, (), Axis("", 0, 1), Axis("density", 0, 1), height=height)
    density, edges = np.histogram(values, bins=bins, range=(0.0, top), density=True)
    positive = density[density > 0]
    y = Axis("density", 10.0 ** math.floor(math.log10(positive.min())), float(positive.max()) * 1.5, log=True)
    stairs_x = np.repeat(edges, 2)[1:-1]
    stairs_y = np.repeat(np.maximum(density, y.low * 1e-2), 2)
    middle = (edges[1:] + edges[:-1]) / 2
    return chart(
        title,
        (
            Series("density", stairs_x, stairs_y, "train", hover=False),
            Series("density", middle, density, "train", "faint", legend=False),
        ),
        Axis("singular value", 0.0, top),
        Axis("density", y.low, y.high, log=True),
        height=height,
        x_word="singular value",
        legend=False,
    )


def _curve(one: Series, x: FloatArray, y: FloatArray) -> str:
    """A path. Points far outside are pulled to the edge of what a renderer takes without trouble."""
    left, top = np.clip(x, -9, 10) * _UNITS, (1 - np.clip(y, -9, 10)) * _UNITS
    pairs = [f"{_n(round(a, 1))} {_n(round(b, 1))}" for a, b in zip(left.tolist(), top.tolist(), strict=True)]
    if one.style in _ROUND or len(pairs) == 1:
        inside = [pair for pair, at in zip(pairs, y.tolist(), strict=True) if -0.001 <= at <= 1.001]
        # A line of no length with round ends is a dot that stays round in a stretched drawing.
        path = "".join(f"M{pair}h0" for pair in inside)
        shape = one.style if one.style in _ROUND else "dots"
        again = f'<path class="hole" d="{path}"/>' if shape == "ring" else ""
        return f'<path class="{shape}" style="stroke:var(--{one.colour})" d="{path}"/>{again}'
    return f'<path class="{one.style}" style="stroke:var(--{one.colour})" d="M{"L".join(pairs)}"/>'


def _marks(mark: Marks, x: Axis) -> str:
    places = sorted({round(at, 3) for at in x.place(np.asarray(mark.xs, dtype=np.float64)).tolist() if 0 <= at <= 1})
    path = "".join(f"M{_u(at)} 0V1000" for at in places)
    crowded = " crowded" if len(places) > 60 else ""
    return f'<path class="mark {mark.colour}{crowded}" style="stroke:var(--{mark.colour})" d="{path}"/>'


def _note(mark: Marks, x: Axis) -> str:
    at = float(x.place(np.asarray([min(mark.xs)], dtype=np.float64))[0])
    if not 0 <= at <= 1:
        return ""
    side = "left" if at > 0.7 else "right"
    return (
        f'<span class="note {side}" style="left:{100 * at:.2f}%;color:var(--{mark.colour})">{escape(mark.note)}</span>'
    )


#: Pixels: how wide a chart is taken to be, a letter, the height of a word, and the room that a point takes.
_WIDE, _LETTER, _WORD, _POINT = 440.0, 6.6, 15.0, 7.0


def _names(names: Sequence[Name], x: Axis, y: Axis, height: int) -> str:
    """Words beside their points, where they hide neither a point nor another word, as far as there is room."""

    def down(value: float) -> float:
        return float(1 - y.place(np.asarray([value]))[0]) * height

    at = [(float(x.place(np.asarray([one.x]))[0]) * _WIDE, down(one.y)) for one in names]
    taken = [(a - _POINT, b - _POINT, a + _POINT, b + _POINT) for a, b in at]
    taken += [
        (a - 3, down(n.y + n.bar), a + 3, down(n.y - n.bar)) for n, (a, _) in zip(names, at, strict=True) if n.bar
    ]
    found = []
    for one, (a, b) in sorted(zip(names, at, strict=True), key=lambda pair: pair[1]):
        wide = _LETTER * len(one.text)
        # Right, left, then above and below with the point at the word's beginning, middle or end.
        places = [(a + _POINT + 1, b - _WORD / 2), (a - _POINT - 1 - wide, b - _WORD / 2)]
        places += [
            (a - wide * share, b + shift)
            for shift in (-_POINT - _WORD, _POINT, -_POINT - 2 * _WORD, _POINT + _WORD)
            for share in (0.5, 0.0, 1.0)
        ]

        def cost(place: tuple[float, float], wide: float = wide) -> float:
            left, top = place
            box = (left, top, left + wide, top + _WORD)
            hidden = sum(_common(box, other) for other in taken)
            outside = max(0.0, -left) + max(0.0, left + wide - _WIDE) + max(0.0, -top) + max(0.0, top + _WORD - height)
            return hidden + _WORD * outside

        left, top = min(places, key=cost)  # the first of equals
        taken.append((left, top, left + wide, top + _WORD))
        # At a share of the width for the point, and so many pixels from there: it stays by it whatever the width.
        found.append(
            f'<span class="name" style="left:calc({100 * a / _WIDE:.2f}% + {left - a:.0f}px);top:{top:.0f}px">'
            f"{escape(one.text)}</span>"
        )
    return "".join(found)


def _common(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """The area that two boxes (left, top, right, bottom) have in common."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    return max(0.0, wide) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))


def _legend(series: Sequence[Series], marks: Sequence[Marks], levels: Sequence[Level]) -> str:
    keys: list[tuple[str, str, str]] = [
        (one.label, one.colour, one.style) for one in series if one.legend and len(one.x)
    ]
    keys += [(mark.label, mark.colour, f"upright {mark.colour}") for mark in marks if mark.label and len(mark.xs)]
    keys += [(level.label, level.colour, "flat") for level in levels if level.label]
    return "".join(
        f'<span class="key"><i class="{style}" style="color:var(--{colour})"></i>{escape(label)}</span>'
        for label, colour, style in keys
    )


def _u(share: float) -> str:
    return _n(round(float(share) * _UNITS, 1))


def _n(value: float) -> str:
    """The shortest text of a number."""
    return f"{value:.10g}"
