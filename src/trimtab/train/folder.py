"""Files of a run folder that are whole or absent, and the rule that no run overwrites another."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimtab.errors import CheckpointError, ConfigError
from trimtab.quiet import quiet_libraries

_LOG = logging.getLogger(__name__)


#: What a run writes before its first step.
_FIRST_FILES = {"config.yaml", "metrics.jsonl", "parameters.json", "start.safetensors"}


def refuse_used_folder(folder: Path) -> None:
    """A new run needs a folder of its own; one whose run never took a step (a full disk, say) counts as new.

    Raises:
        ConfigError: it exists and holds something else.
    """
    if folder.is_dir() and _never_began(folder):
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        return
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"name: {folder} exists and is not empty; {_way_out(folder)}choose another name")


def _way_out(folder: Path) -> str:
    if folder.is_dir() and _resumable(folder):
        return f"continue that run with --resume {folder}, or "
    return f"it has no checkpoint, so remove it ({_remove(folder)}), or " if _is_run(folder) else ""


def way_on(folder: Path) -> str:
    """What to type after a run has broken off, to go on with it or to begin it anew: "; ...", or nothing."""
    if _resumable(folder):
        return f"; the run goes on from its newest checkpoint with --resume {folder} and what you change"
    return begin_anew(folder)


def begin_anew(folder: Path) -> str:
    """What to do for the run in a folder, if there is one, to begin again under its name: "; ...", or nothing."""
    if not folder.is_dir() or _never_began(folder):
        return "; no step was taken, so that the run can begin anew under its name"
    return f"; to begin anew under this name, remove what it left: {_remove(folder)}" if _is_run(folder) else ""


def _is_run(folder: Path) -> bool:
    """Whether a run has left what is there. Only of that it is said how to remove it: anything else is somebody's."""
    return folder.is_dir() and {"config.yaml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}


def _remove(folder: Path) -> str:
    return f"rm -r {shlex.quote(str(folder))}"


def _resumable(folder: Path) -> bool:
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _never_began(folder: Path) -> bool:
    if not {path.name.removesuffix(".tmp") for path in folder.iterdir()} <= _FIRST_FILES:
        return False
    metrics = folder / "metrics.jsonl"
    return not metrics.is_file() or '"event": "step"' not in metrics.read_text(encoding="utf-8", errors="replace")


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold a run folder alone; the system drops the lock when its holder ends, however it ends.

    Raises:
        ConfigError: another process holds it.
        CheckpointError: the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"the run folder {folder} cannot be written: {error.strerror or error}; choose another out=FOLDER"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is working on this run; wait for it, or end it") from None
        except OSError as error:
            _LOG.warning("%s: no locks on this file system (%s); start no second process", folder, error.strerror)
        yield
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and move it into place."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def save_model(model: Any, tokenizer: Any, folder: Path, *, without: Collection[str] = ()) -> None:
    """Write a Hugging Face folder with model and tokenizer, under a temporary name first.

    Args:
        model: a transformers model.
        tokenizer: has `save(folder)`.
        folder: where to; what was there is replaced.
        without: names of parameters to leave out, such as an adapter's.

    Raises:
        CheckpointError: it could not be written; nothing is left of it then, and an older one is as it was.
    """
    temporary, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    try:
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        with quiet_libraries():
            kept = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
            model.save_pretrained(temporary, state_dict=kept if without else None)
        tokenizer.save(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the library makes an error of its own of a full disk
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"the model could not be written to {folder}: {reason}; the last checkpoint stands, "
            "so free some space and continue with --resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
