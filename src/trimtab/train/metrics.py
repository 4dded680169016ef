"""What a run writes down: metrics.jsonl, TensorBoard events, and the line on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import CheckpointError, ConfigError
from trimtab.train.progress import ProgressLine


def jsonable(value: Any) -> Any:
    """`value` with each number that JSON has no word for (NaN, infinity) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def truncate(path: Path, step: int) -> int:
    """Drop from a metrics.jsonl what lies after `step`, so that a resumed run's curves have no doubles.

    Records of the end of the run (`final`) go as well: it is not the end any more. So do lines that are no
    JSON object, such as one that a kill tore. The file is replaced in one move.

    Returns:
        How many lines were dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")
    kept = [line for line in lines if line and _stays(line, step)]
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return sum(1 for line in lines if line) - len(kept)


def _stays(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and record["step"] <= step
        and not record.get("final")
    )


class MetricsFile:
    """Appends to metrics.jsonl: one JSON object a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it has the keys `event` and `step`, and `time` is put in here.

        Raises:
            CheckpointError: the disk does not take it.
        """
        line = json.dumps(jsonable({"event": record["event"], "step": record["step"], "time": time.time(), **record}))
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} could not be written: {error.strerror or error}; free some space, then --resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def require_tensorboard() -> None:
    """Find out at the start of a run, before anything is computed.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "log.tensorboard = true needs the package tensorboard: pip install 'trimtab[tensorboard]', "
            "or set log.tensorboard=false"
        ) from error


def tensorboard_writer(folder: Path, start: int) -> Any:
    """A TensorBoard writer that hides what an earlier run wrote after step `start`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1)


class RunLog:
    """Gives each record to the file, to TensorBoard and to the terminal.

    Args:
        every: steps between two step records; the steps between them only move the progress line.
        last: the step that is recorded in any case (where this run ends).
    """

    def __init__(self, file: MetricsFile, progress: ProgressLine, board: Any | None, *, every: int, last: int) -> None:
        self._file, self._progress, self._board = file, progress, board
        self._every, self._last = every, last
        self._interval = (0, 0.0)  # tokens and seconds since the last step record, without evaluations and checkpoints

    def step(self, record: dict[str, Any]) -> None:
        """A completed step."""
        record = dict(record)
        tokens, seconds = record.pop("batch_tokens"), record.pop("seconds")
        self._interval = (self._interval[0] + tokens, self._interval[1] + seconds)
        speed = self._interval[0] / self._interval[1] if self._interval[1] > 0 else 0.0
        logged = record["step"] % self._every == 0 or record["step"] == self._last
        self._progress.step(record["step"], record["loss"], record["lr"], speed, seconds, logged=logged)
        if logged:
            self._write({**record, "tokens_per_second": speed})
            self._interval = (0, 0.0)

    def event(self, record: dict[str, Any]) -> None:
        """Anything but a step."""
        self._write(record)
        self._progress.event(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(record)
        if self._board is not None:
            prefix = "train" if record["event"] == "step" else record["event"]
            for key, value in record.items():
                if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(f"{prefix}/{key}", value, record["step"])

    def close(self) -> None:
        """Close the file and the writer."""
        self._file.close()
        if self._board is not None:
            self._board.close()
