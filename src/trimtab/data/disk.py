"""Files that are there whole or not at all, checksums, and a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import DataError

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); what is done is kept: mend this and run again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file by way of a temporary name."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with naming_disk_errors(path):
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """The same value gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sha256(path: Path) -> str:
    """The checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the one lock of `folder`; wait for another process that holds it.

    The system drops the lock when its holder ends, however it ends, so that a lock is never stale.
    """
    import fcntl

    path = folder / ".lock"
    with naming_disk_errors(path):
        file = open(path, "a+b")  # noqa: SIM115 - it stays open for as long as the lock is held
    with file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    file.seek(0)
                    holder = file.read().decode("ascii", "replace") or "another process"
                    _LOG.warning("%s is being built by %s; waiting for it", folder, holder)
                waiting = True
                time.sleep(0.1)
            except OSError as error:
                raise DataError(
                    f"{path}: this file system has no locks ({error.strerror}); use a local disk"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}".encode())
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
