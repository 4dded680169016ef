"""Where bitsandbytes is imported, at first use, and refused where importing it would fetch a binary.

What was found in its 0.50.2: importing it imports its CPU backend, which on a processor with AVX512-BF16 calls
`kernels.get_kernel("kernels-community/quantization-bitsandbytes")` at module level: where the package `kernels`
is importable, that downloads a compiled library from a hub and loads it. On Apple devices the MPS backend does
the same at the first call. A training run must not fetch binaries behind its user's back.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FetchesBinaries(ImportError):
    """`kernels` is importable, so importing bitsandbytes would download a library."""


def import_bitsandbytes() -> Any:
    """The module bitsandbytes.

    Raises:
        FetchesBinaries: the package `kernels` is installed.
        ImportError: bitsandbytes is not installed, or cannot be loaded.
    """
    if "kernels" in sys.modules or importlib.util.find_spec("kernels") is not None:
        raise FetchesBinaries(
            "the package `kernels` is installed, and with it bitsandbytes fetches a compiled library from a hub when "
            "it is imported; uninstall `kernels`"
        )
    with _quiet("bitsandbytes.backends.cpu.ops"):
        import bitsandbytes
    return bitsandbytes


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Hold back the advice to install `kernels`, which this module refuses."""
    speaker = logging.getLogger(logger)
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        yield
    finally:
        speaker.setLevel(level)
