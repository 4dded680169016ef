"""What became of a run, read from its folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from trimtab.compare.plan import Run
from trimtab.errors import ConfigError, ReportError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.report.runfolder import RunFolder, number, read_run
from trimtab.tasks.base import Headline
from trimtab.train.resume import flatten

State = Literal["new", "begun", "complete", "diverged"]

#: Settings that touch nothing that is compared.
_IDLE = ("log.", "checkpoint.", "name", "out")


def state_of(run: Run) -> State:
    """Where a run stands.

    new: it has no checkpoint, and begins anew. diverged: its loss or gradient was not finite, as it would be again.

    Raises:
        ConfigError: what is there was run with other settings, or is no run of a comparison.
    """
    folder = run.folder
    checkpoints = folder / "checkpoints"
    if (folder / "results.json").is_file() and (folder / "report.html").is_file():
        found: State = "complete"
    elif _diverged(folder / "metrics.jsonl"):
        found = "diverged"
    elif checkpoints.is_dir() and any(path.suffix not in (".tmp", ".old") for path in checkpoints.iterdir()):
        found = "begun"
    else:
        found = "new"
    if run.asked.is_file():
        if found != "new":
            _check_asked(run)
    elif folder.exists():
        raise ConfigError(f"{folder} exists, and no comparison began it; remove it, or choose another name=NAME")
    return found


def _check_asked(run: Run) -> None:
    """The settings with which a run was begun must be those of now."""
    old = load_tree(FinetuneConfig, run.asked)
    before, after = flatten(old.model_dump(mode="json")), flatten(run.config.model_dump(mode="json"))
    for key in {**before, **after}:
        if not key.startswith(_IDLE) and before.get(key) != after.get(key):
            raise ConfigError(
                f"{key}: {run.folder} was run with {before.get(key)!r}, and now it is {after.get(key)!r}, so that the "
                "runs could not be compared; leave it as it was, or choose another name=NAME"
            )


def _diverged(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        last = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return False
    return isinstance(last, dict) and last.get("event") == "stop" and str(last.get("reason")).endswith("is not finite")


@dataclass(frozen=True)
class Outcome:
    """A complete run.

    Attributes:
        run: which.
        results: results.json.
        seconds: of the training steps, without evaluations and checkpoints; None where no step was logged.
        folder: what else it left.
    """

    run: Run
    results: dict[str, Any]
    seconds: float | None
    folder: RunFolder = field(repr=False)

    @property
    def headline(self) -> Headline:
        """The figure that chose its best step; NaN where it is no number."""
        found = self.results["headline"]
        return Headline(found["name"], _figure(found["value"]), bool(found["rising"]))

    @property
    def chosen_on(self) -> str:
        """The split that chooses."""
        return str(next(iter(self.results["scores"])))

    @property
    def held_out(self) -> str | None:
        """The split that chose nothing, if there is one."""
        return "test" if "test" in list(self.results["scores"])[1:] else None

    def on(self, split: str) -> Headline:
        """The headline of one split alone."""
        scores = {name: _figure(value) for name, value in self.results["scores"][split].items()}
        config = self.run.config
        return config.task.headline({split: scores}, config.eval.report)

    @property
    def steps(self) -> int:
        """How many it took."""
        return int(self.results["steps"])

    @property
    def kept_step(self) -> int:
        """The one that its scores are of."""
        return int(self.results["kept_step"])


def read_outcome(run: Run) -> Outcome:
    """Read a complete run.

    Raises:
        ReportError: a file of it is damaged.
    """
    path = run.folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        folder = read_run(run.folder)
        found = Outcome(run, results, _training_seconds(folder, int(results["steps"])), folder)
        assert math.isfinite(found.steps + found.kept_step)
        found.on(found.chosen_on)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, AssertionError) as error:
        raise ReportError(
            f"{path} is damaged ({type(error).__name__}: {error}); remove the folder, and give the same command again"
        ) from error
    return found


def _training_seconds(run: RunFolder, steps: int) -> float | None:
    """Time of the steps: of each logged stretch its tokens by its rate; steps after the last one logged count alike."""
    logged = [(0, 0.0)]
    seconds = 0.0
    for record in run.steps:
        tokens, rate = number(record.get("tokens")), number(record.get("tokens_per_second"))
        if tokens is not None and rate:
            logged.append((record["step"], tokens))
    rates = {record["step"]: record["tokens_per_second"] for record in run.steps if "tokens_per_second" in record}
    for (_, before), (step, after) in pairwise(logged):
        seconds += (after - before) / rates[step]
    last = logged[-1][0]
    return seconds * steps / last if last else None


def _figure(value: Any) -> float:
    return math.nan if value is None else float(value)
