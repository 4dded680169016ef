"""`comparison.html`: what each method reached against what it cost; one file that loads nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from trimtab import words
from trimtab.compare.forms import cells
from trimtab.compare.plan import settings_text
from trimtab.compare.table import Comparison, Row, outcome_of, runs_of
from trimtab.report.page import Link, data_table, document, says
from trimtab.report.plots import Axis, Name, Series, chart
from trimtab.report.runfolder import FloatArray

_HEIGHT = 300


class Point(NamedTuple):
    """A method in a figure: its cost, what it reached, and the deviation of that."""

    name: str
    cost: float
    score: float
    deviation: float | None


def front(points: Sequence[Point], rising: bool) -> list[Point]:
    """Those that no other beats: none costs at most as much and reaches more, or less and as much; by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.score if rising else p.score)):
        if not found or (point.score > found[-1].score if rising else point.score < found[-1].score):
            found.append(point)
    return found


def render(found: Comparison) -> str:
    """The page as text; the same for the same runs."""
    parts = [("figures", "Quality against cost", _figures(found)), ("table", "Table", _table(found))]
    parts += [("runs", "Runs", _runs(found)), ("repeat", "Repeat this comparison", _repeat(found))]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in parts)
    body = f'<section id="summary"><h2>What this comparison shows</h2>{says(summary(found))}</section>'
    body += "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>' for key, title, text in parts)
    return document(found.plan.folder.name, f"{_subtitle(found)}<nav>{links}</nav>", body)


def summary(found: Comparison) -> list[str]:
    """What it shows, in sentences."""
    lines = []
    ranked = [(row, spread) for row in found.rows if (spread := found.reported(row)) is not None]
    if ranked:
        ranked.sort(key=lambda pair: -pair[1].mean if found.rising else pair[1].mean)
        row, spread = ranked[0]
        best = [one.entry.label for one, other in ranked if other.mean == spread.mean]
        have = f"{best[0]} has" if len(best) == 1 else f"{', '.join(best[:-1])} and {best[-1]} share"
        lines.append(f"{have} the best {found.reported_name}: {spread.text()}.")
        points = _points(found, lambda row: row.trainable)
        others = [point for point in front(points, found.rising) if point.name != row.entry.label]
        if others:
            told = ", ".join(
                f"{point.name} ({words.sig(point.score)} with {words.short(point.cost)})" for point in others
            )
            lines.append(f"No method does better with as few trainable parameters as {told}.")
    return [*lines, *found.notes()]


def _subtitle(found: Comparison) -> str:
    config = found.rows[0].entry.grid[0][0].config
    machine = found.sample.folder.machine if found.sample else {}
    parts = [f"{config.task.name} with {config.model.name} in {config.dtype}", words.many(len(found.rows), "method")]
    parts += [words.many(len(found.plan.seeds), "seed")]
    if device := machine.get("device"):
        parts.append(f"device {device}")
    return f'<p class="sub">{escape(" · ".join(parts))}</p>'


# -- figures --------------------------------------------------------------------------------------


def _figures(found: Comparison) -> str:
    if not any(found.reported(row) for row in found.rows):
        return "<p>No method has a score yet.</p>"
    drawn = (
        _figure(found, "Trainable parameters", "trainable parameters, log", lambda row: row.trainable, words.tick),
        _figure(found, "Memory", "peak live bytes of a training step, log", lambda row: row.peak_live, words.tick),
        _figure(found, "Computation", "FLOPs of the training, log", lambda row: row.flops, _power),
        _figure(found, "Time", "seconds of training, log", lambda r: r.seconds.mean if r.seconds else None, words.tick),
    )
    better = "higher" if found.rising else "lower"
    return (
        f"<p>Each point is a method, {better} is better. Bars are one standard deviation over the seeds to each side. "
        "The line joins the methods that no other beats at their cost (the Pareto front).</p>"
        f'<div class="pair">{"".join(drawn)}</div>'
    )


def _points(found: Comparison, cost: Callable[[Row], float | None]) -> list[Point]:
    return [
        Point(row.entry.label, float(price), spread.mean, spread.deviation)
        for row in found.rows
        if (spread := found.reported(row)) is not None and (price := cost(row))
    ]


def _figure(
    found: Comparison, title: str, label: str, cost: Callable[[Row], float | None], form: Callable[[float], str]
) -> str:
    points = _points(found, cost)
    best = front(points, found.rising)
    lost = [row.entry.label for row in found.rows if row.entry.label not in {point.name for point in points}]
    bars = [point for point in points if point.deviation]
    series = [Series("no method beats these", *_xy(best), "final", "line", hover=False)] if len(best) > 1 else []
    series += [
        Series(
            "",
            np.asarray([point.cost] * 2),
            np.asarray([point.score - (point.deviation or 0), point.score + (point.deviation or 0)]),
            "train",
            "line",
            hover=False,
            legend=False,
        )
        for point in bars
    ]
    rest = sorted((point for point in points if point not in best), key=lambda point: point.cost)
    series += [
        Series("", *_xy(rest), "train", "dots", hover=False, legend=False),
        Series("", *_xy(best), "final", "dots", hover=False, legend=False),
    ]
    return chart(
        title,
        series,
        _cost_axis(label, points, form),
        _score_axis(found.reported_name, points),
        names=[Name(point.name, point.cost, point.score, point.deviation or 0.0) for point in points],
        height=_HEIGHT,
        caption=f"Not drawn, for want of figures: {', '.join(lost)}." if lost else "",
        x_word=title.lower(),
    )


def _xy(points: Sequence[Point]) -> tuple[FloatArray, FloatArray]:
    return (
        np.asarray([point.cost for point in points], dtype=np.float64),
        np.asarray([point.score for point in points], dtype=np.float64),
    )


def _cost_axis(label: str, points: Sequence[Point], form: Callable[[float], str]) -> Axis:
    costs = [point.cost for point in points] or [1.0]
    low, high = min(costs), max(costs)
    room = max((high / low) ** 0.12, 1.25)
    return Axis(label, low / room, high * room, log=True, form=form)


def _power(value: float) -> str:
    """5e15"""
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _score_axis(label: str, points: Sequence[Point]) -> Axis:
    ends = [point.score + sign * (point.deviation or 0.0) for point in points for sign in (-1, 1)] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    room = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, low - room, high + room)


# -- tables ---------------------------------------------------------------------------------------


def _table(found: Comparison) -> str:
    heads, rows = cells(found)
    return (
        f"{data_table('What each method reached, and what it cost', heads, rows)}"
        '<p class="fine">Weights, gradients and optimizer state are counted for the phase that holds the most. '
        "Live tensors are counted in one step of the widest batch, the same on every machine; resident memory is that "
        "of the whole process, libraries included. FLOPs are of the training alone, counted on a few steps. Training "
        "time is that of the steps, without evaluations and checkpoints.</p>"
    )


def _runs(found: Comparison) -> str:
    rows: list[list[str | Link]] = []
    for row in found.rows:
        for run in runs_of(row):
            state, outcome = row.states[run.config.name], outcome_of(run, row)
            place = str((run.folder / "report.html").relative_to(found.plan.folder))
            chosen = "yes" if run.config.name in {one.config.name for one in row.seeds} else ""
            rows.append(
                [
                    row.entry.label,
                    settings_text(run.sweep),
                    str(run.seed),
                    words.sig(outcome.headline.value) if outcome else "",
                    words.sig(outcome.on(outcome.held_out).value) if outcome and outcome.held_out else "",
                    chosen,
                    state,
                    Link("report", place) if outcome else "",
                ]
            )
    heads = ["method", "settings", "seed", found.score_name, found.reported_name, "in the table", "state", "report"]
    if not found.held_out:
        heads.pop(4)
        for line in rows:
            line.pop(4)
    return data_table("All runs", heads, rows)


def _repeat(found: Comparison) -> str:
    command = shlex.join(found.plan.command)
    text = f"<pre>{escape(command)}</pre>" if command else ""
    return (
        f"{text}<p>The same command goes on where it stood; with more methods, values or seeds it adds their runs. "
        "Each run's configuration stands beside its folder.</p>"
    )
