"""What the commands of a run share: their words, their console, and a signal that came too early."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from trimtab.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# Its help stands in each command's own text, which explains the two kinds of words.
Words = Annotated[list[str] | None, typer.Argument(hidden=True)]


class RunCommand(TyperCommand):
    """A command whose usage line names its two kinds of words."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml]", "[section.key=value ...]", "[OPTIONS]"]


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The config file, if a word names one, and the overrides."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        for word in files:
            if not Path(word).exists():
                raise ConfigError(f"command line: {word}: is no file, and a setting is written {word}=value")
        raise ConfigError(f"command line: one config file is read, and {len(files)} are given: {', '.join(files)}")
    return (Path(files[0]) if files else None), in_effect([word for word in words if word not in files])


def in_effect(overrides: list[str]) -> list[str]:
    """The overrides as they are, if none of them is undone by one behind it that gives its whole section.

    Raises:
        ConfigError: one is.
    """
    keys = [word.partition("=")[0] for word in overrides]
    for number, key in enumerate(keys):
        for word, earlier in zip(overrides[:number], keys, strict=False):
            if earlier.startswith(f"{key}."):
                raise ConfigError(
                    f"command line: {word}: {key}=... behind it gives the whole section anew, and this would be lost; "
                    f"put {earlier} behind {key}"
                )
    return overrides


def config_of(run: Path, command: str) -> Path:
    """The configuration in the folder of a run of this command.

    Raises:
        CheckpointError: it is no run folder, or that of another command.
    """
    path = run / "config.yaml"
    if not path.is_file():
        what = "holds no config.yaml, so it is no run folder" if run.is_dir() else "there is no such folder"
        if (run / "comparison.json").is_file():
            what = "is a comparison; the command that began it goes on with it"
        if run.is_file():
            what = f"is a file; give the run's folder, {run.parent}"
        raise CheckpointError(f"--resume {run}: {what}")
    # Only a fine-tuning run has a task; its other sections may be wrong, which is said of them later.
    tuned = any(line.startswith("task:") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    if tuned != (command == "finetune"):
        made = "finetune" if tuned else "pretrain"
        raise CheckpointError(f"--resume {run}: this is a run of `trimtab {made}`; use that command")
    return path


def open_console() -> Console:
    """Standard output, which nobody needs to read to its end."""
    from rich.console import Console

    class QuietOnBrokenPipe(Console):
        """When nobody reads the output any more, it falls silent; a training must not end for that."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            to_nowhere()

    return QuietOnBrokenPipe()


def to_nowhere() -> None:
    """Let standard output go nowhere, so that flushing it at the end cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within, a warning of trimtab's own is a line for a user, without the place in the program; others are as ever."""
    before, package = warnings.showwarning, Path(__file__).parent

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning) and Path(filename).is_relative_to(package):
            print(f"trimtab: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def told_if_interrupted(folder: Path | None) -> Iterator[None]:
    """Within, an interrupt says what is left of the run in a folder, and how to go on; None: there is none yet.

    One that got lost in a callback of an import may leave that import torn; what fails then is the interrupt, too.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as stop:
        if not (interrupted or isinstance(stop, KeyboardInterrupt)):
            raise
        if folder is None:
            raise KeyboardInterrupt("interrupted; nothing was done") from stop
        from trimtab.train.folder import way_on

        raise KeyboardInterrupt(f"interrupted{way_on(folder)}") from stop


#: Signals that came before the training took them over.
interrupted: list[int] = []


def note_interrupt(number: int, frame: FrameType | None) -> None:
    """Take a signal before a run does."""
    interrupted.append(number)
    raise KeyboardInterrupt
