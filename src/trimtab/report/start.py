"""The weights at attach, as a safetensors file that is written while the weights go by, one at a time.

The format (8 bytes with the header's length, little-endian; a JSON header; raw data) wants names and offsets
before the data, and they are known only after the last weight. So the header's place is kept free, and the header
is written into it at the end, padded with spaces, as the format allows. Should the names outgrow the free place,
the data is moved up within the file, piece by piece. Memory: one matrix, always.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, float32

from trimtab.errors import CheckpointError
from trimtab.report.files import whole_file

#: Bytes kept free for the length and the header: some 500 names of 80 characters. A multiple of 8.
ROOM = 1 << 16
_LENGTH = 8
_PIECE = 1 << 20


def write_start(path: Path, weights: Iterator[tuple[str, Tensor]], *, room: int = ROOM) -> None:
    """Write name -> fp32 weight to `path`, all or nothing.

    Args:
        path: `start.safetensors` of a run folder.
        weights: as `Adapter.effective_weights()` gives them; each may be freed once the next is asked for.
        room: bytes kept free for the header, a multiple of 8.

    Raises:
        CheckpointError: a name comes twice, or the file cannot be written (disk full).
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with whole_file(path, CheckpointError) as file:
        file.seek(room)
        offset = 0
        for name, weight in weights:
            if name in entries:
                raise CheckpointError(f"{path}: the weight {name!r} came twice")
            data = weight.detach().to("cpu", float32).contiguous().numpy().astype("<f4", copy=False)
            entries[name] = {
                "dtype": "F32",
                "shape": list(weight.shape),
                "data_offsets": [offset, offset + data.nbytes],
            }
            offset += data.nbytes
            file.write(data.data)
        header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        needed = -(-(_LENGTH + len(header)) // 8) * 8
        if needed > room:
            _shift(file, room, room + offset, needed - room)
            room = needed
        file.seek(0)
        file.write((room - _LENGTH).to_bytes(_LENGTH, "little"))
        file.write(header.ljust(room - _LENGTH, b" "))


def _shift(file: BinaryIO, start: int, end: int, by: int) -> None:
    """Move the bytes [start, end) of a file up by `by`, the last ones first, a piece at a time."""
    while end > start:
        size = min(_PIECE, end - start)
        end -= size
        file.seek(end)
        piece = file.read(size)
        file.seek(end + by)
        file.write(piece)
