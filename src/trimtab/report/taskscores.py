"""What a fine-tuning run's page shows of its task: the headline over the steps, and every score of every split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab import words
from trimtab.report.plots import Axis, Series, chart
from trimtab.report.runfolder import Record, RunFolder, number


def headline(record: Record) -> tuple[str, float] | None:
    """The name and the value of an evaluation's headline."""
    found: Any = record.get("headline")
    if not isinstance(found, dict) or (value := number(found.get("value"))) is None:
        return None
    return str(found.get("name", "score")), value


def headline_figure(run: RunFolder, axis: Axis) -> str:
    """The headline of each evaluation; nothing where there is none."""
    found = [(record["step"], *pair, bool(record.get("final"))) for record in run.evals if (pair := headline(record))]
    if not found:
        return ""
    name = found[0][1]
    values = [value for _, _, value, _ in found]
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    low, high = min(values) - 0.08 * spread, max(values) + 0.08 * spread

    def points(final: bool) -> tuple[Any, Any]:
        chosen = [(step, value) for step, _, value, last in found if last is final]
        x, y = zip(*chosen, strict=True) if chosen else ((), ())
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    (x, y), (end_x, end_y) = points(False), points(True)
    kept = next((r.get("kept_step") for r in run.evals if r.get("final")), None)
    caption = f"What was kept is of step {kept:,}; the ring is its score over all examples." if kept else ""
    return chart(
        name.capitalize(),
        [
            Series("", x, y, "val", "faint", hover=False, legend=False),
            Series("while training", x, y, "val", "dots"),
            Series("what was kept", end_x, end_y, "final", "ring"),
        ],
        axis,
        Axis(name, low, high),
        height=260,
        caption=caption,
    )


def score_rows(run: RunFolder) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Heads and rows of a table: one row a split, one column a metric, of the last evaluation."""
    scores: Any = run.evals[-1].get("scores") if run.evals else None
    if not isinstance(scores, dict) or not all(isinstance(value, dict) for value in scores.values()):
        return [], []
    names = list(dict.fromkeys(str(key) for split in scores.values() for key in split))
    shown = [
        [str(split), *("" if (v := number(row.get(name))) is None else words.sig(v, 4) for name in names)]
        for split, row in scores.items()
    ]
    return ["split", *names], shown
