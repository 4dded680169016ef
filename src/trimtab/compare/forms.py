"""The table of a comparison in its three forms: for the terminal, as markdown, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from trimtab import words
from trimtab.bench.runner import markdown_table
from trimtab.compare.plan import Plan, Run, settings_text
from trimtab.compare.table import Comparison, Row, outcome_of, runs_of
from trimtab.report.figures import memory_name
from trimtab.train.metrics import jsonable

_GAP = "-"


def cells(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row of texts for each method."""
    kinds = list(dict.fromkeys(key for row in found.rows if row.phase for key in row.phase.memory))
    kinds = [key for key in kinds if any(row.phase and row.phase.memory.get(key) for row in found.rows)]
    device = any(row.measured("peak_device") for row in found.rows)
    heads = ["method", found.reported_name, *([found.score_name] if found.held_out else []), "seeds"]
    heads += [*(["chosen settings"] if found.plan.swept else []), "trainable parameters"]
    heads += [memory_name(key) for key in kinds]
    heads += ["peak live tensors of a step", *(["peak device memory"] if device else []), "peak resident memory"]
    heads += ["FLOPs of training", "training time", "steps", "best step"]
    return heads, [_cells(row, found, kinds, device) for row in found.rows]


def _cells(row: Row, found: Comparison, kinds: Sequence[str], device: bool) -> list[str]:
    reported, score = found.reported(row), row.score
    texts = [row.entry.label, reported.text() if reported else _GAP]
    if found.held_out:
        texts.append(score.text() if score else _GAP)
    texts.append(_seeds(row, found.plan))
    if found.plan.swept:
        swept = len(row.entry.grid) > 1
        texts.append(settings_text(row.chosen) if row.chosen is not None and swept else _GAP)
    trainable = _GAP if row.trainable is None else words.count(row.trainable)
    if row.trainable and row.total:
        trainable += f" ({words.sig(100 * row.trainable / row.total, 3)} %)"
    texts.append(trainable)
    texts += [_size(row.phase.memory.get(key, 0) if row.phase else None) for key in kinds]
    texts += [_size(row.peak_live), *([_size(row.measured("peak_device"))] if device else [])]
    texts.append(_size(row.measured("peak_resident")))
    texts.append(_GAP if row.flops is None else flops_text(row.flops))
    texts.append(words.duration(row.seconds.mean) if row.seconds else _GAP)
    texts.append(", ".join(dict.fromkeys(words.count(one.steps) for one in row.outcomes)) or _GAP)
    texts.append(", ".join(words.count(one.kept_step) for one in row.outcomes) or _GAP)
    return texts


def flops_text(value: float) -> str:
    """1.23e+15 as 1.23 PFLOP."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{words.sig(value / size, 3)} {unit}FLOP"
    return f"{words.sig(value, 3)} FLOP"


def _seeds(row: Row, plan: Plan) -> str:
    lost = f", {row.diverged} diverged" if row.diverged else ""
    if row.chosen is None:
        if all(row.states[run.config.name] in ("complete", "diverged") for run in row.entry.first):
            return "diverged"
        return f"0 of {len(plan.seeds)}"
    done = len(row.outcomes)
    return f"{done}{lost}" if done + row.diverged == len(plan.seeds) else f"{done} of {len(plan.seeds)}{lost}"


def _size(value: float | None) -> str:
    return _GAP if value is None else words.size(value)


# -- three forms ----------------------------------------------------------------------------------


def terminal_tables(found: Comparison, width: int) -> list[Table]:
    """For the terminal: a column a method, since there are more figures than fit beside each other.

    Methods that do not fit beside the others go into a further table.
    """
    heads, rows = cells(found)
    first = max(map(len, heads)) + 4
    groups: list[list[list[str]]] = []
    left = 0
    for row in rows:
        wide = max(map(len, row)) + 3
        if not groups or left < wide:
            groups.append([])
            left = width - first
        groups[-1].append(row)
        left -= wide
    tables = []
    for group in groups:
        table = Table()
        table.add_column("")
        for row in group:
            table.add_column(row[0], justify="right", overflow="fold")
        for index, head in enumerate(heads[1:], start=1):
            table.add_row(head, *(row[index] for row in group))
        tables.append(table)
    return tables


def markdown(found: Comparison) -> str:
    """As a document: the table, and what stands below it."""
    heads, rows = cells(found)

    def clean(texts: Sequence[str]) -> list[str]:
        return [text.replace("|", "\\|") for text in texts]

    table = markdown_table(clean(heads), [clean(row) for row in rows])
    notes = "".join(f"- {note}\n" for note in found.notes())
    return f"# {found.plan.folder.name}\n\n{table}\n\n{notes}"


def comparison_json(found: Comparison) -> str:
    """All figures as JSON: bytes, seconds, counts."""
    sample = found.sample
    tree = {
        "name": found.plan.folder.name,
        "task": found.rows[0].entry.grid[0][0].config.task.name,
        "complete": found.complete,
        "seeds": list(found.plan.seeds),
        "headline": sample.headline.name if sample else None,
        "rising": found.rising,
        "chosen_on": found.chosen_on if sample else None,
        "reported_on": (found.held_out or found.chosen_on) if sample else None,
        "notes": found.notes(),
        "methods": [_record(row, found) for row in found.rows],
    }
    return json.dumps(jsonable(tree), indent=1, ensure_ascii=False) + "\n"


def _record(row: Row, found: Comparison) -> dict[str, Any]:
    reported, score = found.reported(row), row.score
    return {
        "method": row.entry.label,
        "name": row.entry.name,
        "chosen": dict(row.chosen) if row.chosen is not None else None,
        "reported": reported.record() if reported else None,
        "chosen_by": score.record() if score else None,
        "diverged": row.diverged,
        "parameters": {"trainable": row.trainable, "total": row.total},
        "memory": dict(row.phase.memory) if row.phase else None,
        "peak_live": row.peak_live,
        "peak_device": row.measured("peak_device"),
        "peak_resident": row.measured("peak_resident"),
        "flops": row.flops,
        "seconds": row.seconds.record() if row.seconds else None,
        "steps": [one.steps for one in row.outcomes],
        "best_steps": [one.kept_step for one in row.outcomes],
        "runs": [_run_record(run, row, found.plan) for run in runs_of(row)],
    }


def _run_record(run: Run, row: Row, plan: Plan) -> dict[str, Any]:
    outcome = outcome_of(run, row)
    return {
        "folder": str(run.folder.relative_to(plan.folder)),
        "sweep": dict(run.sweep),
        "seed": run.seed,
        "state": row.states[run.config.name],
        "score": outcome.headline.value if outcome else None,
    }
