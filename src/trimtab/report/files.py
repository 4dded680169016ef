"""Files that are either whole or absent: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trimtab.errors import TrimtabError


@contextmanager
def whole_file(path: Path, error: type[TrimtabError]) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: the target; its folder exists.
        error: what an `OSError` (no space, no permission) is turned into, with one line of advice.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a kill left is written over
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise error(
            f"{path} could not be written ({reason}); make room or choose another place with out=FOLDER, then try again"
        ) from problem
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str, error: type[TrimtabError]) -> None:
    """Write UTF-8 text to `path`, all of it or nothing."""
    with whole_file(path, error) as file:
        file.write(text.encode("utf-8"))
