"""The drawing of curves, axes and numbers in the report page."""

from __future__ import annotations

import numpy as np
import pytest
from fakerun import write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from reportpage import Page, report

from trimtab import words
from trimtab.report.plots import Axis, Series, chart, loss_range, smooth, thin


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=400),
    columns=st.integers(2, 40),
)
def test_thinning_keeps_ends_and_extremes(values: list[float], columns: int) -> None:
    """No curve loses its highest, lowest, first or last point, nor gains a point that was not there."""
    x, y = np.arange(len(values), dtype=np.float64), np.asarray(values, dtype=np.float64)
    thin_x, thin_y = thin(x, y, columns)
    assert len(thin_x) <= 2 * columns + 2
    assert np.all(np.diff(thin_x) > 0)
    assert np.array_equal(y[thin_x.astype(int)], thin_y)
    assert (thin_y.min(), thin_y.max(), thin_y[0], thin_y[-1]) == (y.min(), y.max(), y[0], y[-1])


def test_running_mean_never_reaches_over_a_restart() -> None:
    """A jump at a restart stays a jump; within a cycle the mean is the plain centred one."""
    x = np.arange(1, 41, dtype=np.float64)
    y = np.where(x <= 20, 1.0, 5.0)
    assert np.array_equal(smooth(x, y, 9, [20]), y)
    ramp = smooth(x, x, 5)
    assert ramp[2:-2] == pytest.approx(x[2:-2])


def test_loss_axis_ignores_the_first_heights_but_not_a_later_level() -> None:
    """The start may stick out above; a run that stays high later does not."""
    x = np.arange(1, 1001, dtype=np.float64)
    falling = 3 + 8 * np.exp(-x / 10)
    low, high = loss_range([(x, falling)])
    assert low < 3 < high < 3.5
    diverged = np.where(x > 700, 9.0, falling)
    assert loss_range([(x, diverged)])[1] > 9
    assert loss_range([]) == (0.0, 1.0)


@settings(max_examples=80, deadline=None)
@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6), log=st.booleans())
def test_ticks_are_inside_and_few(low: float, span: float, log: bool) -> None:
    """Every axis has two to a dozen ticks within its range."""
    span = max(span, 1e-6 * abs(low))  # less is lost among the digits of its ends
    axis = Axis("x", abs(low) + 1e-6, (abs(low) + 1e-6) * (1.5 + span), log=True) if log else Axis("x", low, low + span)
    ticks = axis.ticks()
    places = axis.place(np.asarray(ticks))
    assert 2 <= len(ticks) <= 12
    assert places.min() > -1e-6
    assert places.max() < 1 + 1e-6


def test_chart_without_points_is_still_a_chart() -> None:
    """An empty series draws an empty plot that says so."""
    nothing = np.empty(0)
    html = chart("Loss", [Series("training", nothing, nothing)], Axis("step", 0, 1), Axis("nats", 0, 1))
    assert "Nothing was logged" in Page(html).text


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=5))
def test_gradient_axis_holds_every_norm(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    """Whatever the norms are, they lie within a log axis that has at least two ticks."""
    run = tmp_path_factory.mktemp("r")
    write_lines(
        run / "metrics.jsonl",
        [{"event": "step", "step": i + 1, "grad_norm": value} for i, value in enumerate(values)],
    )
    page = report(run)
    box = next(attrs for _, attrs in page.tags if str(attrs.get("aria-label")).startswith("Gradient norm"))
    low, high, log = map(float, str(box["data-y"]).split(","))
    assert log == 1
    assert low < min(values) <= max(values) < high
    assert len(Axis("norm", low, high, log=True).ticks(4)) >= 2


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (words.short(2_460_000_000), "2.46B"),
        (words.short(999_999), "1.00M"),
        (words.short(950), "950"),
        (words.sig(3.45678), "3.457"),
        (words.sig(1.5e-5, 2), "1.5e-5"),
        (words.tick(0.00025), "2.5e-4"),
        (words.tick(20_000), "20k"),
        (words.tick(1500), "1,500"),
        (words.size(1536), "1.50 KiB"),
        (words.duration(3661), "1 h 01 min"),
        (words.duration(200), "3 min 20 s"),
        (words.date(0), "1970-01-01 00:00 UTC"),
    ],
)
def test_numbers_read_well(found: str, expected: str) -> None:
    """Numbers have a unit and no more digits than a reader needs."""
    assert found == expected
