"""A folder that appears whole or not at all: written under a temporary name beside its place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trimtab.errors import CheckpointError, ConfigError


def refuse_used(out: Path) -> None:
    """Nothing that is there already is written over.

    Raises:
        ConfigError: `out` is a file, or a folder that is not empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} exists and is no folder; choose another name")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; remove it, or choose another name")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {parent} to put it in")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        ConfigError: `out` is in use.
        CheckpointError: it cannot be written (disk full, no permission).
    """
    refuse_used(out)
    temporary = out.absolute().with_name(f".{out.absolute().name}.tmp")
    try:
        try:
            if temporary.exists():  # what a kill left
                shutil.rmtree(temporary)
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                _sync(path)
            _sync(temporary)
            if out.is_dir():
                out.rmdir()
            temporary.rename(out)
        except (OSError, SafetensorError) as error:  # the library makes an error of its own of a full disk
            reason = getattr(error, "strerror", None) or error
            culprit = Path(getattr(error, "filename", None) or temporary)
            if not culprit.is_relative_to(temporary):
                raise CheckpointError(f"{culprit}: {reason}; {out} was not written") from error
            raise CheckpointError(
                f"{out} could not be written: {reason}; nothing is left of it, so free some space or choose another "
                "place, and try again"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
