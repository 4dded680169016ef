"""A folder or file that appears whole or not at all: made in a new hidden folder beside its place, then renamed.

The hidden folder has a name that nobody could foresee, so nothing of others is written into or deleted. What a kill
leaves of it stays, for the same reason.
"""

from __future__ import annotations

import os
import shutil
import tempfile
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
    temporary = out.absolute()
    try:
        try:
            temporary = hidden_folder(out) / "out"
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
        if temporary != out.absolute():
            shutil.rmtree(temporary.parent, ignore_errors=True)


def hidden_folder(out: Path) -> Path:
    """A new folder of ours alone beside `out`; what is made in it has the permissions that anything new has."""
    place = out.absolute()
    return Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.", suffix=".tmp", dir=place.parent))


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
