"""What a command does with an error: a user's is one line, any other keeps its traceback."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from trimtab.errors import TrimtabError

P = ParamSpec("P")

INTERRUPTED = 130
USER_ERROR = 2

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Fault(Exception):
    """A user's error on its way to standard error, as one line."""


def one_line_errors(function: Callable[P, int]) -> Callable[P, None]:
    """A command whose result is the exit status, and whose user errors are one line each."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            status = function(*args, **kwargs)
        except KeyboardInterrupt as stop:
            print(f"trimtab: {str(stop) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except TrimtabError as error:
            raise Fault(str(error)) from error
        except OSError as error:
            # A file that a user named, or a full disk; any other is a fault of the program and shows its traceback.
            if error.errno == errno.EPIPE or (error.filename is None and error.errno not in _DISK):
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            raise Fault(f"{where}{error.strerror or error}") from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            raise Fault(
                "the GPU has no memory left for this run; lower train.micro_batch, or set "
                "model.gradient_checkpointing=true; a checkpoint, if there is one, still stands"
            ) from error
        raise typer.Exit(status)

    return run
