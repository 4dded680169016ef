"""Copies of base tensors, in host memory or in files, so that a base that was written into can be given back."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import CheckpointError


class Kept:
    """Tensors by name, copied when they are put, exact to the bit.

    Args:
        where: "host" for memory of the CPU; a path for a folder with a file for each tensor, which is read anew
            whenever the tensor is asked for.
    """

    def __init__(self, where: str | Path) -> None:
        self._folder = None if where == "host" else Path(where)
        self._held: dict[str, Tensor | Path] = {}

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
        file = self._folder / f"{name}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({"tensor": tensor.detach().cpu().contiguous()}, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"keep_base: {file} cannot be written: {error}") from None
        self._held[name] = file

    def get(self, name: str) -> Tensor:
        """The copy of a tensor, on the CPU.

        Raises:
            CheckpointError: its file is gone or damaged.
        """
        held = self._held[name]
        if isinstance(held, Tensor):
            return held
        try:
            with safe_open(held, "pt") as file:
                tensor: Tensor = file.get_tensor("tensor")
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"keep_base: {held} cannot be read: {error}") from None

    def another(self, name: str) -> Kept:
        """An empty store in the same place, apart from this one."""
        return Kept("host" if self._folder is None else self._folder / name)

    def drop(self) -> None:
        """Forget all copies and remove their files."""
        for held in self._held.values():
            if isinstance(held, Path):
                held.unlink(missing_ok=True)
        self._held.clear()
