"""Read a run folder as it is found: finished, unfinished, resumed, or cut off in the middle of a line.

Everything that is missing or damaged becomes a notice, which the page shows; only a folder that is no run at all
is an error. What was logged after the step that a later session resumed from never became part of the model, so
it is left out, except for the time it took.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trimtab.config import PretrainConfig, RunConfig
from trimtab.errors import ReportError
from trimtab.finetuneconfig import FinetuneConfig, is_finetuning
from trimtab.report.spectrum import Spectrum

#: Nothing that is logged is this large; beyond it, sums and squares would leave float64.
_HUGE = 1e150

Record = dict[str, Any]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one set of trained tensors; `memory` is in bytes, parameters are counts."""

    name: str
    from_step: int
    total: int
    trainable: int
    groups: dict[str, int]
    memory: dict[str, int]

    @property
    def on_device(self) -> int:
        """Bytes held on the device: all but what is kept in host memory."""
        return sum(size for key, size in self.memory.items() if not key.endswith("_host"))


@dataclass
class RunFolder:
    """What a run left behind.

    Attributes:
        name: the folder's own name.
        config_text: config.yaml as it stands; None when it is missing.
        config: the same, checked; None when it is missing or another version's.
        machine: the last "run" event (device, threads, versions).
        started: unix seconds of the first event.
        seconds: time in sessions, the pauses between them left out.
        sessions: how often the run was started or resumed.
        steps: "step" events, by rising step, each step once; `evals` likewise.
        restarts: steps after which the adapter was merged and drawn anew; `resumes` likewise.
        switch: the step at which the warm start ended.
        stop: the last "stop" event.
        measured: peaks of memory that the process saw, in bytes.
        notices: what could not be read, one sentence each.
    """

    name: str
    config_text: str | None = None
    config: RunConfig | None = None
    machine: Record = field(default_factory=dict)
    started: float | None = None
    seconds: float = 0.0
    sessions: int = 0
    steps: list[Record] = field(default_factory=list)
    evals: list[Record] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    switch: int | None = None
    stop: Record | None = None
    phases: list[Phase] = field(default_factory=list)
    measured: dict[str, int] = field(default_factory=dict)
    spectrum: Spectrum | None = None
    notices: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int | None:
        """The steps that the config asks for."""
        return self.config.total_steps if self.config else None

    @property
    def command(self) -> str:
        """The command that makes such a run."""
        return "finetune" if isinstance(self.config, FinetuneConfig) else "pretrain"

    @property
    def last_step(self) -> int:
        """The last completed step that is known."""
        return max((record["step"] for record in (*self.steps, *self.evals)), default=0)

    @property
    def final(self) -> Record | None:
        """The last evaluation, of the merged model; None while the run has not got there."""
        last = self.evals[-1] if self.evals else {}
        return last if last.get("final") and last["step"] >= self.last_step else None

    def series(self, key: str, records: Iterable[Record] | None = None) -> tuple[FloatArray, FloatArray]:
        """Steps and values of one logged number, without the records that lack it or hold no finite one."""
        pairs = [
            (record["step"], value)
            for record in (self.steps if records is None else records)
            if (value := number(record.get(key))) is not None
        ]
        x, y = zip(*pairs, strict=True) if pairs else ((), ())
        return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    def last(self, key: str) -> float | None:
        """The last logged value of one number."""
        return next((value for r in reversed(self.steps) if (value := number(r.get(key))) is not None), None)


def number(value: Any) -> float | None:
    """A finite number as a float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_HUGE < value < _HUGE:
        return None
    return float(value)


def read_run(path: Path) -> RunFolder:
    """Read the run folder at `path`.

    Raises:
        ReportError: `path` is no folder, or holds neither config.yaml nor metrics.jsonl.
    """
    if not path.is_dir():
        raise ReportError(f"{path} is not a run folder: there is no such folder; `trimtab pretrain` makes one")
    if not (path / "config.yaml").exists() and not (path / "metrics.jsonl").exists():
        raise ReportError(f"{path} is not a run folder: it holds neither config.yaml nor metrics.jsonl")
    run = RunFolder(name=path.resolve().name)
    _read_config(path / "config.yaml", run)
    _take_up(_read_metrics(path / "metrics.jsonl", run), run)
    _read_parameters(path / "parameters.json", run)
    if (path / "spectrum.json").exists():
        try:
            run.spectrum = Spectrum.load(path / "spectrum.json")
        except ReportError as problem:
            run.notices.append(str(problem).replace(str(path / "spectrum.json"), "spectrum.json"))
    return run


def _read_config(path: Path, run: RunFolder) -> None:
    try:
        run.config_text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(run.config_text)
        run.config = (FinetuneConfig if is_finetuning(tree) else PretrainConfig).model_validate(tree)
    except FileNotFoundError:
        run.notices.append("config.yaml is missing.")
    except (OSError, ValueError, yaml.YAMLError) as problem:
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        run.notices.append(f"config.yaml could not be understood ({first}); the planned schedule is not drawn.")


def _read_metrics(path: Path, run: RunFolder) -> list[Record]:
    """All whole lines; a torn last one is normal after a kill, any other damage is noticed."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        run.notices.append("metrics.jsonl is missing: the run has not begun to train.")
        return []
    except OSError as problem:
        run.notices.append(f"metrics.jsonl could not be read ({problem.strerror}).")
        return []
    records: list[Record] = []
    broken: list[int] = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if index < len(lines) - 1:
                broken.append(index + 1)
            continue
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            step = number(record.get("step", 0))
            record["step"] = 0 if step is None else int(step)
            records.append(record)
        else:
            broken.append(index + 1)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        which = f"line {shown}" if len(broken) == 1 else f"lines {shown}"
        run.notices.append(f"metrics.jsonl: {which} could not be read and left out ({len(broken)} in all).")
    return records


def _take_up(records: list[Record], run: RunFolder) -> None:
    """Sort the events into `run`, dropping what a resumed session took back."""
    kept: list[Record] = []
    first: float | None = None
    last: float | None = None
    fresh = False  # a "run" and a "resume" event side by side open one session, not two
    for record in records:
        time = number(record.get("time"))
        if run.started is None:
            run.started = time
        opens = record["event"] in ("run", "resume")
        if opens and not fresh:
            run.seconds += max(0.0, last - first) if first is not None and last is not None else 0.0
            run.sessions += 1
            first = last = None
        fresh = opens
        if time is not None:
            first = time if first is None else first
            last = time
        if record["event"] == "resume":
            kept = [r for r in kept if r["event"] == "run" or (r["step"] <= record["step"] and r["event"] != "stop")]
        kept.append(record)
    run.seconds += max(0.0, last - first) if first is not None and last is not None else 0.0
    steps: dict[int, Record] = {}
    evals: dict[tuple[int, bool], Record] = {}
    for record in kept:
        match record["event"]:
            case "run":
                run.machine = record
            case "step":
                steps[record["step"]] = record
            case "eval":
                evals[record["step"], bool(record.get("final"))] = record
            case "switch":
                run.switch = record["step"]
            case "restart":
                run.restarts.append(record["step"])
            case "resume":
                run.resumes.append(record["step"])
            case "stop":
                run.stop = record
    run.steps = [steps[step] for step in sorted(steps)]
    run.evals = [evals[key] for key in sorted(evals)]
    run.restarts = sorted(set(run.restarts))
    _notice_holes(run)


def _notice_holes(run: RunFolder) -> None:
    bad = [record["step"] for record in run.steps if "loss" in record and number(record["loss"]) is None]
    if bad:
        run.notices.append(f"The loss was not a finite number at step {bad[0]:,} ({len(bad)} such lines in all).")


def _read_parameters(path: Path, run: RunFolder) -> None:
    if not path.exists():
        return
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        run.measured = {str(key): _count(value) for key, value in tree.get("measured", {}).items()}
        for entry in tree["phases"]:
            run.phases.append(
                Phase(
                    name=str(entry["phase"]),
                    from_step=_count(entry.get("from_step", 0)),
                    total=_count(entry["total"]),
                    trainable=_count(entry["trainable"]),
                    groups={str(key): _count(value) for key, value in entry.get("groups", {}).items()},
                    memory={str(key): _count(value) for key, value in entry.get("memory", {}).items()},
                )
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        run.phases, run.measured = [], {}
        run.notices.append(f"parameters.json could not be read ({type(problem).__name__}: {problem}).")


def _count(value: Any) -> int:
    found = int(value)
    if not 0 <= found < 1 << 62:
        raise ValueError(f"{str(value)[:20]} is no count")
    return found
