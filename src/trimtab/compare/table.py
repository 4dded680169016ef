"""The figures of a comparison: what each method reached, what it was chosen by, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from trimtab import words
from trimtab.compare.outcome import Outcome, State
from trimtab.compare.plan import Entry, Plan, Run
from trimtab.report.runfolder import Phase


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation (n - 1); None of a single value."""
        return stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """0.9123 ± 0.0042, the deviation to the digits of the mean."""
        mean, deviation = words.sig(self.mean), self.deviation
        if deviation is None:
            return mean
        if "e" in mean or mean == "0":
            return f"{mean} ± {words.sig(deviation, 2)}"
        return f"{mean} ± {deviation:.{len(mean.partition('.')[2])}f}"

    def record(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


@dataclass(frozen=True)
class Row:
    """A method: the runs with the settings that were chosen for it.

    Attributes:
        entry: the method.
        states: where each of its runs stands, by the run's name.
        grid: the complete runs that choose.
        chosen: the settings that were chosen; None as long as they are not, or where every run diverged.
        seeds: the runs with these settings, of each seed.
        outcomes: those of them that are complete and whose headline is a number.
        costs: of `compare.costs`.
    """

    entry: Entry
    states: Mapping[str, State]
    grid: tuple[Outcome, ...]
    chosen: Mapping[str, Any] | None
    seeds: tuple[Run, ...]
    outcomes: tuple[Outcome, ...]
    costs: Mapping[str, Any] | None

    @property
    def diverged(self) -> int:
        """How many of the seeds reached no figure."""
        lost = [o for o in self.seeds if self.states[o.config.name] == "diverged"]
        complete = [o for o in self.seeds if self.states[o.config.name] == "complete"]
        return len(lost) + len(complete) - len(self.outcomes)

    @property
    def score(self) -> Spread | None:
        """The headline that chooses, over the seeds."""
        return self._spread([o.headline.value for o in self.outcomes])

    @property
    def held_out(self) -> Spread | None:
        """The headline on the split that chose nothing."""
        return self._spread([o.on(o.held_out).value for o in self.outcomes if o.held_out is not None])

    @property
    def phase(self) -> Phase | None:
        """The phase that holds the most."""
        found = self.outcomes[0].folder.phases if self.outcomes else []
        return max(found, key=lambda phase: phase.on_device, default=None)

    @property
    def trainable(self) -> int | None:
        """Parameters that train, at the end."""
        found = self.outcomes[0].folder.phases if self.outcomes else []
        return found[-1].trainable if found else None

    @property
    def total(self) -> int | None:
        """All parameters, those that the method adds among them."""
        found = self.outcomes[0].folder.phases if self.outcomes else []
        return found[-1].total if found else None

    def measured(self, key: str) -> int | None:
        """The largest measured peak of the seeds, in bytes: "peak_resident", "peak_device"."""
        return max((o.folder.measured[key] for o in self.outcomes if key in o.folder.measured), default=None)

    @property
    def peak_live(self) -> int | None:
        """Bytes of all tensors at the peak of a training step."""
        return None if self.costs is None else int(self.costs["peak_live"])

    @property
    def flops(self) -> float | None:
        """Of the steps that were taken, on average over the seeds."""
        if self.costs is None or not self.outcomes:
            return None
        return float(self.costs["flops"]) * fmean(o.steps for o in self.outcomes) / int(self.costs["steps"])

    @property
    def seconds(self) -> Spread | None:
        """Of the training steps."""
        return self._spread([o.seconds for o in self.outcomes if o.seconds is not None])

    @staticmethod
    def _spread(values: Sequence[float]) -> Spread | None:
        return Spread(tuple(values)) if values else None


def choose(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """The best by the headline, the first of equals; None where there is no figure."""
    best: Outcome | None = None
    for one in outcomes:
        if one is None or math.isnan(one.headline.value):
            continue
        value, rising = one.headline.value, one.headline.rising
        if best is None or (value > best.headline.value if rising else value < best.headline.value):
            best = one
    return best


def row_of(
    entry: Entry,
    plan: Plan,
    states: Mapping[str, State],
    outcomes: Mapping[str, Outcome],
    costs: Mapping[str, Mapping[str, Any]],
) -> Row:
    """The row of a method; all but the plan by the names of its runs."""
    grid = tuple(outcomes[run.config.name] for run in entry.first if run.config.name in outcomes)
    pending = any(states[run.config.name] in ("new", "begun") for run in entry.first)
    best = None if pending else choose(grid)
    if best is None:
        return Row(entry, states, grid, None, (), (), None)
    seeds = next(runs for runs in entry.grid if runs[0].config.name == best.run.config.name)
    found = [outcomes[run.config.name] for run in seeds if run.config.name in outcomes]
    usable = tuple(one for one in found if not math.isnan(one.headline.value))
    return Row(entry, states, grid, best.run.sweep, seeds, usable, costs.get(best.run.config.name))


@dataclass(frozen=True)
class Comparison:
    """All that is known."""

    plan: Plan
    rows: Sequence[Row]

    @property
    def sample(self) -> Outcome | None:
        """Some complete run, which knows the names of the figures."""
        return next((one for row in self.rows for one in (*row.outcomes, *row.grid)), None)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        waiting = ("new", "begun")
        return all(
            not any(row.states[run.config.name] in waiting for run in (*row.entry.first, *row.seeds))
            for row in self.rows
        )

    @property
    def done(self) -> int:
        """How many runs are."""
        return sum(
            row.states[name] in ("complete", "diverged")
            for row in self.rows
            for name in {run.config.name for run in (*row.entry.first, *row.seeds)}
        )

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return self.sample is None or self.sample.headline.rising

    @property
    def chosen_on(self) -> str:
        """What chooses: the name of the split, where the headline is of one."""
        one = self.sample
        if one is None or one.on(one.chosen_on).name != one.headline.name:
            return "validation"
        return one.chosen_on

    @property
    def held_out(self) -> str | None:
        """The split that chooses nothing."""
        return self.sample.held_out if self.sample else None

    @property
    def score_name(self) -> str:
        """The headline that chooses."""
        return f"{self.chosen_on} {self.sample.headline.name}" if self.sample else "score"

    @property
    def reported_name(self) -> str:
        """The headline that is reported."""
        one, split = self.sample, self.held_out
        return self.score_name if one is None or split is None else f"{split} {one.on(split).name}"

    def reported(self, row: Row) -> Spread | None:
        """What a paper would print of a method."""
        return row.score if self.held_out is None else row.held_out

    def notes(self) -> list[str]:
        """What stands below the table."""
        found = []
        if not self.complete:
            found.append(f"Not complete: {self.done} of {self.plan.size} runs are done.")
        what = [f"the settings of each method (by seed {self.plan.seeds[0]})"] if self.plan.swept else []
        if any(row.entry.grid[0][0].config.eval.keep_best for row in self.rows):
            what.append("the step that each run keeps")
        if self.sample is not None:
            chosen = f"Chosen by {self.score_name}: {' and '.join(what)}"
            if not what:
                found.append("No score has chosen anything: neither settings nor a step.")
            elif self.held_out is not None:
                found.append(f"{chosen}. The figures of {self.held_out} have chosen nothing.")
            else:
                found.append(
                    f"{chosen}. There is no test split: the figures are of the examples that they were chosen by, and "
                    "somewhat too good."
                )
        if len(self.plan.seeds) > 1:
            seeds = ", ".join(map(str, self.plan.seeds))
            found.append(f"Mean ± sample standard deviation (n - 1) over the seeds {seeds}.")
        if any(row.diverged for row in self.rows):
            found.append("Runs that diverged are in no mean.")
        return found


def runs_of(row: Row) -> list[Run]:
    """The runs of a method, each once: those that choose, then the other seeds."""
    return [*row.entry.first, *row.seeds[1:]]


def outcome_of(run: Run, row: Row) -> Outcome | None:
    """What a run came to, if it is complete."""
    name = run.config.name
    return next((one for one in (*row.grid, *row.outcomes) if one.run.config.name == name), None)
