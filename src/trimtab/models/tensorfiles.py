"""The safetensors files of a checkpoint folder, one or several, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class TensorFiles:
    """The safetensors files of a folder, opened when they are first needed.

    Args:
        folder: where they lie.
        single: the file that holds all tensors, if there is no index.
    """

    def __init__(self, folder: Path, single: str) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self.homes = self._find(folder / single)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def _find(self, single: Path) -> dict[str, Path]:
        """Which file each tensor is in."""
        index = self.folder / INDEX
        if single.is_file():
            return dict.fromkeys(self._names(single), single)
        if not index.is_file():
            raise CheckpointError(f"{self.folder} has neither {single.name} nor {INDEX}; pickled weights are not read")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            homes = {str(name): self.folder / str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from None
        for file in set(homes.values()):
            if file.parent != self.folder or file.name in ("", ".."):
                raise CheckpointError(f"{index} names {file}, which is outside its folder")
            absent = {name for name, home in homes.items() if home == file} - set(self._names(file))
            if absent:
                raise CheckpointError(f"{file} lacks {min(absent)}, which {INDEX} says it has")
        return homes

    def _names(self, file: Path) -> list[str]:
        return list(self._handle(file).keys())

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from None
        return self._open[file]

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: it has another shape, or its file is damaged.
        """
        handle = self._handle(self.homes[name])
        found = list(handle.get_slice(name).get_shape())
        if found != list(shape):
            raise CheckpointError(f"{self.homes[name]}: {name} is {found}, and the config makes it {list(shape)}")
        tensor: Tensor = handle.get_tensor(name)
        return tensor
