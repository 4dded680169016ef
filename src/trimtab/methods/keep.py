"""Copies of base tensors, in host memory or in files, so that a base that was written into can be given back."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import CheckpointError, ConfigError

HOST = "host"


@dataclass(frozen=True)
class _Filed:
    """A copy in a file, and what it must be when it is read again."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype
    bits: int


class Kept:
    """Tensors by name, copied when they are put, exact to the bit.

    Args:
        where: "host" for memory of the CPU; a path for a folder, in which a new folder of its own is made, with a
            file for each tensor that is read anew whenever the tensor is asked for.

    Raises:
        ConfigError: `where` is neither.
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, where: str | Path) -> None:
        if not isinstance(where, str | Path) or (isinstance(where, str) and where != HOST and where.lower() == HOST):
            raise ConfigError(f"keep_base={where!r}: give 'host', or the path of a folder")
        self._where = where
        self._folder: Path | None = None
        if where != HOST:
            try:
                Path(where).mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="base-", dir=where))
            except OSError as error:
                raise CheckpointError(f"keep_base={str(where)!r} cannot be written: {error}") from None
        self._held: dict[str, Tensor | _Filed] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor under a name; a name that is there already keeps its first copy.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if name in self._held:
            return
        if self._folder is None:
            self._held[name] = tensor.detach().to("cpu", copy=True)
            return
        file, copy = self._folder / f"{len(self._held):05d}.safetensors", tensor.detach().cpu().contiguous()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: copy}, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"keep_base: {file} cannot be written: {error}") from None
        self._held[name] = _Filed(file, copy.shape, copy.dtype, _bits(copy))

    def get(self, name: str) -> Tensor:
        """The copy of a tensor, on the CPU.

        Raises:
            CheckpointError: its file is gone or damaged.
        """
        held = self._held[name]
        if isinstance(held, Tensor):
            return held
        try:
            with safe_open(held.file, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"keep_base: {held.file} cannot be read: {error}") from None
        if (tensor.shape, tensor.dtype, _bits(tensor)) != (held.shape, held.dtype, held.bits):
            raise CheckpointError(f"keep_base: {held.file} is not what was written there; the base is lost")
        return tensor

    def check(self) -> None:
        """Read every copy once.

        Raises:
            CheckpointError: one is gone or damaged.
        """
        if self._folder is not None:
            for name in self._held:
                self.get(name)

    def another(self) -> Kept:
        """An empty store in the same place, apart from this one."""
        return Kept(self._where)

    def drop(self) -> None:
        """Forget all copies and remove their files."""
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _bits(tensor: Tensor) -> int:
    return int(torch.hash_tensor(tensor).view(torch.int64)) if tensor.numel() else 0
