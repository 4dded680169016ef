"""Writing tensors as a safetensors file, one at a time, with a checksum of what was written.

The format is eight bytes of header length (little endian), a JSON header that maps each name to dtype,
shape and byte range, and the raw bytes. It is written here rather than by the library because a
checkpoint must never hold a second copy of the model in host memory, and because the checksum then
costs no second pass. Reading goes through the library, which checks the header against the length.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import CheckpointError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

#: torch's dtypes by their names in the format.
DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_PIECE = 1 << 24  # bytes read at once when a file is verified


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` to a new file at `path`, flush it to the disk, and return the SHA-256 of its bytes.

    Each tensor is brought to the CPU by itself. The order in the file is by falling element size (so that
    every tensor is aligned), then by name: equal tensors give equal files.

    Raises:
        CheckpointError: a dtype has no name in the format.
        OSError: the file could not be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name} has the dtype {tensor.dtype}, which a safetensors file cannot hold")
    return stream_tensors(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__)


def stream_tensors(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """As `write_tensors`, for tensors of which dtype and shape are known before they are made, one at a time.

    Args:
        path: the new file.
        kinds: dtype and shape of each tensor.
        value: makes the tensor of a name; it may be freed once the next is asked for.
        metadata: words for the header.
    """
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        dtype, shape = kinds[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            digest.update(piece)
            file.write(piece)
        for name in order:
            tensor = value(name)
            if (tensor.dtype, tuple(tensor.shape)) != kinds[name]:
                raise AssertionError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, not as {kinds[name]}")
            raw = raw_bytes(tensor)
            digest.update(raw)
            file.write(raw)
            del tensor, raw  # else it would stay while the next one is made
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes in row-major order; a view where it lies so on the CPU already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def verify(path: Path, digest: str) -> None:
    """Read the file again, whole.

    Raises:
        CheckpointError: it is missing, its header does not fit its length, or its bytes are others.
    """
    try:
        names(path)
        found = file_digest(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if found != digest:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., the checkpoint says {digest[:12]}..."
        )


def names(path: Path) -> list[str]:
    """The names of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for. Use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")

    def __enter__(self) -> TensorFile:
        self._file.__enter__()
        self._names = dict.fromkeys(self._file.keys())
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, each in memory of its own."""
    with TensorFile(path) as file:
        return {name: tensor.clone() for name, tensor in file.items()}


def copy_into(path: Path, targets: Mapping[str, Tensor]) -> None:
    """Copy each tensor of a file into the tensor of its name, in place, one at a time.

    Raises:
        CheckpointError: the names, a shape or a dtype differ; nothing was copied then.
    """
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        missing, unexpected = sorted(set(targets) - stored), sorted(stored - set(targets))
        if missing or unexpected:
            raise CheckpointError(
                f"{path} does not fit the model: {_some('missing', missing)}{_some('unexpected', unexpected)}"
                "resume with the model, the method and the library version of the run"
            )
        for name, target in targets.items():
            part = file.get_slice(name)
            shape, dtype = list(part.get_shape()), part.get_dtype()
            if shape != list(target.shape) or dtype != _NAMES.get(target.dtype):
                raise CheckpointError(
                    f"{path} does not fit the model: {name} is {dtype} {shape} in the file and "
                    f"{_NAMES.get(target.dtype)} {list(target.shape)} in the model"
                )
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))


def _some(label: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{label} {', '.join(keys[:3])}{more}; "
