"""Run a comparison: one run after another, each in a process of its own, going on where an earlier command stood.

For each method the grid runs with the first seed, the best point by the headline is chosen, and the other seeds run
with it. What a run left in its folder is all that is known of it, so nothing is lost with this process.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.compare.child import Child
from trimtab.compare.forms import comparison_json, markdown, terminal_tables
from trimtab.compare.outcome import Outcome, State, read_outcome, state_of
from trimtab.compare.page import render
from trimtab.compare.plan import Entry, Plan, Run, settings_text
from trimtab.compare.table import Comparison, choose, row_of
from trimtab.errors import CheckpointError, ConfigError, ReportError, TrimtabError
from trimtab.loadconfig import dump_config
from trimtab.report.files import write_whole
from trimtab.train.folder import replace_text, sole_user
from trimtab.train.material import prepare
from trimtab.train.session import refuse_distributed, say

#: Statuses of a run that was told to stop: SIGHUP, SIGINT, SIGTERM.
_STOPPED = (129, 130, 143)
COSTS = "costs.json"


def compare(plan: Plan, console: Console) -> int:
    """Run what is not complete yet; print the table, and write it and the page into the plan's folder.

    Returns:
        The exit status: 0, or that of a run that a signal ended.

    Raises:
        TrimtabError: a run cannot be begun, or ended with an error that the user can mend. What is complete stays.
    """
    refuse_distributed()
    check(plan)
    with sole_user(plan.folder):
        status = _Running(plan, console).go()
        found = write(plan)
    if status:
        runs = (run for entry in plan.entries for point in entry.grid for run in point)
        done = sum(state_of(run) in ("complete", "diverged") for run in runs)
        say(console, f"the comparison stopped after {done} of {plan.size} runs; the same command goes on")
        return status
    for table in terminal_tables(found, console.width):
        console.print(table)
    for note in found.notes():
        say(console, note)
    say(console, f"comparison: {plan.folder / 'comparison.html'}   table: {plan.folder / 'comparison.md'}")
    return 0


def check(plan: Plan) -> None:
    """See that every method goes with the model and the task, before any run.

    Raises:
        ConfigError: one does not, or a folder holds something else; the message names the method or the run.
    """
    for entry in plan.entries:
        seen: dict[str, int] = {}
        for runs in entry.grid:
            states = [state_of(run) for run in runs]
            if "new" not in states:  # it went through this when it was begun
                continue
            try:
                key = _prepared_alike(runs[0])
                if key not in seen:
                    seen[key] = prepare(runs[0].config).batches.per_epoch
                for run in runs:
                    run.config.resolved(seen[key])
            except TrimtabError as error:
                raise ConfigError(f"method {entry.label}: {error}") from error


def _prepared_alike(run: Run) -> str:
    """What decides whether a run can be prepared, as text."""
    tree = run.config.model_dump(mode="json", include={"model", "method", "task", "data", "train", "dtype", "pure"})
    return json.dumps(tree, sort_keys=True)


def show_plan(plan: Plan, console: Console) -> None:
    """Print the runs of a comparison, and where each stands; nothing is run or written."""
    check(plan)
    table = Table(title=f"{plan.size} runs in {plan.folder}", title_justify="left")
    for head in ("method", "settings", "seed", "folder", "state"):
        table.add_column(head)
    for entry in plan.entries:
        for run in entry.first:
            table.add_row(*_planned(plan, entry, run))
        if len(entry.grid) == 1:
            for run in entry.grid[0][1:]:
                table.add_row(*_planned(plan, entry, run))
        else:
            for seed in plan.seeds[1:]:
                table.add_row(entry.label, f"the best of {len(entry.grid)}", str(seed), "", "")
    console.print(table)
    say(console, "Dry run: nothing was trained and nothing was written.")


def _planned(plan: Plan, entry: Entry, run: Run) -> tuple[str, ...]:
    folder = str(run.folder.relative_to(plan.folder))
    return entry.label, settings_text(run.sweep), str(run.seed), folder, state_of(run)


class _Running:
    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.number = 0

    def go(self) -> int:
        """The status of the first run that a signal ended, or 0 after the last one."""
        for entry in self.plan.entries:
            for run in entry.first:
                if status := self._run(run):
                    return status
            chosen = choose([_outcome(run) for run in entry.first])
            if chosen is None:
                self.number += len(self.plan.seeds) - 1
                say(self.console, f"{entry.label}: every run diverged, so there is nothing to choose")
                continue
            if len(entry.grid) > 1:
                value = chosen.headline
                say(
                    self.console,
                    f"{entry.label}: {settings_text(chosen.run.sweep)} is the best of {len(entry.grid)} by "
                    f"{chosen.chosen_on} {value.name} ({value.value:.4g})",
                )
            runs = next(runs for runs in entry.grid if runs[0] is chosen.run)
            for run in runs[1:]:
                if status := self._run(run):
                    return status
            if status := self._count(runs[0]):
                return status
        return 0

    def _run(self, run: Run) -> int:
        self.number += 1
        state = state_of(run)
        title = f"run {self.number} of {self.plan.size}: {run.told()}"
        if state in ("complete", "diverged"):
            say(self.console, f"{title}: {state}")
            return 0
        self.console.rule(title, align="left")
        if state == "new":
            _begin_anew(run)
        words = ["--resume", str(run.folder)] if state == "begun" else [str(run.asked)]
        self.console.file.flush()
        status, error = Child().run("trimtab.cli", ["finetune", *words])
        if status in _STOPPED:
            return status
        state = state_of(run)
        if status == 0 and state == "complete":
            return 0
        if status == 2 and state == "diverged":
            say(self.console, f"{run.told()} diverged: {error}")
            return 0
        raise _failure(run.folder, status, error)

    def _count(self, run: Run) -> int:
        """Count the costs of a method, once; a count that fails is told, and the comparison goes on."""
        target = run.folder / COSTS
        if target.is_file():
            return 0
        say(self.console, f"{run.method}: counting what a step costs")
        self.console.file.flush()
        status, error = Child().run("trimtab.compare.costs", [str(run.asked), str(target)])
        if status in _STOPPED:
            return status
        if status:
            say(self.console, f"{run.method}: its costs could not be counted: {error or f'status {status}'}")
        return 0


def _begin_anew(run: Run) -> None:
    """Clear what a run without a checkpoint left, and write down what it is asked for."""
    try:
        if run.folder.exists():
            with sole_user(run.folder):
                shutil.rmtree(run.folder)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        replace_text(run.asked, dump_config(run.config))
    except OSError as error:
        raise CheckpointError(
            f"{run.folder} cannot be written: {error.strerror or error}; choose another out=FOLDER"
        ) from error


def _failure(folder: Path, status: int, error: str) -> Exception:
    if status == 2:
        return ConfigError(f"{folder}: {error}")
    if status == 137:
        return ConfigError(
            f"{folder}: the run was killed, perhaps for want of memory; with train.micro_batch, or another name=NAME "
            "and smaller sizes, it needs less. The same command goes on"
        )
    return RuntimeError(f"the run in {folder} ended with status {status}; its own error stands above")


def _outcome(run: Run) -> Outcome | None:
    return read_outcome(run) if state_of(run) == "complete" else None


# -- what comes of it -----------------------------------------------------------------------------


def read(plan: Plan) -> Comparison:
    """All that is known of a comparison so far."""
    rows = []
    for entry in plan.entries:
        states: dict[str, State] = {}
        outcomes: dict[str, Outcome] = {}
        for run in (run for runs in entry.grid for run in runs):
            states[run.config.name] = state_of(run)
            if (outcome := _outcome(run)) is not None:
                outcomes[run.config.name] = outcome
        rows.append(row_of(entry, plan, states, outcomes, _read_costs(entry)))
    return Comparison(plan, rows)


def _read_costs(entry: Entry) -> dict[str, dict[str, Any]]:
    """The counted costs by the name of the run that has them."""
    found = {}
    for run in entry.first:
        path = run.folder / COSTS
        if path.is_file():
            try:
                found[run.config.name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ReportError(f"{path} is damaged ({error}); remove it, and give the same command again") from error
    return found


def write(plan: Plan) -> Comparison:
    """Write comparison.md, comparison.json and comparison.html of what there is."""
    found = read(plan)
    folder = plan.folder
    write_whole(folder / "comparison.md", markdown(found), ReportError)
    write_whole(folder / "comparison.json", comparison_json(found), ReportError)
    write_whole(folder / "comparison.html", render(found), ReportError)
    return found


__all__ = ["check", "compare", "read", "show_plan", "write"]
