"""Checkpoints: folders that stand complete or not at all.

    checkpoints/step-00001000/
        base.safetensors        what the model holds beside the adapter's tensors; tied tensors once. A run whose
                                model can be had again leaves out what is as it was then, and keeps its SHA-256
        adapter.safetensors     the adapter's tensors (what trains, and what a method stores beside it)
        optimizer.safetensors   optimizer state by parameter name
        state.json              step, config, counters, Python values, random states, checksum of each file

A folder is written under a temporary name beside its place, flushed to the disk, read again and
compared with its checksums, and only then renamed; older folders go after the new one stands. A kill
at any moment therefore leaves the previous checkpoint. Each folder holds its own copy of what it holds:
a link to the previous one would save writing it, but one bad sector would then end all checkpoints.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.errors import CheckpointError
from trimtab.methods.base import Adapter, AdapterState
from trimtab.train import optimstate, randomstate
from trimtab.train.asbuilt import AsBuilt, fingerprint
from trimtab.train.tensorfile import TensorFile, copy_into, read_tensors, verify, write_tensors

FORMAT = 2
#: The first format had the whole base in each checkpoint.
_READ = (1, FORMAT)
FILES = ("base.safetensors", "adapter.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step-(\d{8,})")


def base_tensors(model: nn.Module, adapter_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors by name (parameters and persistent buffers) that the adapter does not store.

    A tensor that the model holds under several names comes under the first; one that shares its memory
    with an adapter's tensor does not come at all.
    """
    seen = {_identity(tensor) for tensor in adapter_tensors.values()}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"the model's state has {name}, a {type(tensor).__name__}; a checkpoint holds tensors"
            )
        if name in adapter_tensors or _identity(tensor) in seen:
            continue
        seen.add(_identity(tensor))
        found[name] = tensor
    return found


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    place = tensor.data_ptr() if tensor.numel() else id(tensor)
    return (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())


@dataclass
class Checkpointer:
    """Writes checkpoints of one run and deletes old ones.

    Args:
        folder: the run's `checkpoints` folder.
        config: the resolved configuration as JSON values, stored with each checkpoint.
        keep: how many of the newest complete checkpoints stay.
        extra: further JSON values to store (what identifies the data, for one).
        damaged: names of folders that are known to be damaged and do not count as kept.
        pinned: the step of one that stays, however old.
        built: the model before the adapter came, where a run that goes on can build it again; None where it cannot.
    """

    folder: Path
    model: nn.Module
    adapter: Adapter
    optimizer: Optimizer
    config: Mapping[str, Any]
    keep: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict)
    damaged: frozenset[str] = frozenset()
    last: Path | None = None
    pinned: int | None = None
    built: AsBuilt | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` completed steps lies."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int) -> Path:
        """Write the state after `step` completed steps; return the folder.

        Raises:
            CheckpointError: it could not be written. The temporary folder is gone then, and older
                checkpoints are as they were.
        """
        final = self.path(step)
        temporary = self.folder / f"{final.name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            temporary.mkdir()
            self._write(temporary, step)
            self._stand(temporary, final)
        except OSError as error:
            kept = f"the last good one is {self.last}" if self.last else "there is no earlier one"
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {final}: {error.strerror or error}; {kept}. "
                "Free some space or mend the folder, then continue with --resume"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.last = final
        self.damaged = self.damaged - {final.name}
        self._prune(step)
        return final

    def _write(self, folder: Path, step: int) -> None:
        state = self.adapter.state_dict()
        optimizer_tensors, packed = optimstate.pack(self.optimizer)
        base = base_tensors(self.model, state.tensors)
        rebuilt = {name: fingerprint(t) for name, t in base.items() if self.built is not None and t in self.built}
        base = {name: tensor for name, tensor in base.items() if name not in rebuilt}
        contents = (base, state.tensors, optimizer_tensors)
        digests = {name: write_tensors(folder / name, tensors) for name, tensors in zip(FILES, contents, strict=True)}
        body = {
            "format": FORMAT,
            "step": step,
            "config": dict(self.config),
            "extra": dict(self.extra),
            "adapter": state.meta,
            "optimizer": packed,
            "random": randomstate.capture(),
            "rebuilt": rebuilt,
            "files": digests,
        }
        _write_text(folder / "state.json", json.dumps({"sha256": _digest(body), "state": body}, allow_nan=False))
        _sync_folder(folder)
        _verified(folder)

    def _stand(self, temporary: Path, final: Path) -> None:
        """Put the written folder in its place, past a damaged or outdated one of the same step."""
        old = final.with_name(f"{final.name}.old")
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed run left under a temporary name."""
        for path in self.folder.iterdir():
            if path.name.endswith((".tmp", ".old")) and _NAME.fullmatch(path.name[:-4]):
                shutil.rmtree(path)

    def _prune(self, step: int) -> None:
        """Delete what is older than the newest `keep` complete checkpoints up to `step`."""
        steps = sorted((n, p) for n, p in _listed(self.folder) if n <= step)
        good = [n for n, path in steps if path.name not in self.damaged]
        oldest = good[-self.keep :][0]
        for n, path in steps:
            if n < oldest and n != self.pinned:
                shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    step: int
    state: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration it was written under, as JSON values."""
        return dict(self.state["config"])

    @property
    def extra(self) -> dict[str, Any]:
        """The further values it was written with."""
        return dict(self.state["extra"])

    def load_model(self, model: nn.Module, adapter: Adapter) -> None:
        """Bring a freshly attached adapter and its model to this state, before the optimizer is built.

        Raises:
            CheckpointError: tensors are missing, unexpected, or of another shape or dtype; or those that were built
                again are not as they were.
        """
        adapter.load_state_dict(AdapterState(read_tensors(self.path / FILES[1]), dict(self.state["adapter"])))
        base = base_tensors(model, adapter.state_dict().tensors)
        rebuilt = self.state.get("rebuilt", {})
        others = [name for name, known in rebuilt.items() if name not in base or fingerprint(base[name]) != known]
        if others:
            more = f" and {len(others) - 1} more tensors" if len(others) > 1 else ""
            raise CheckpointError(
                f"{self.path} is of another base than model.name has now: {others[0]}{more} changed; put the model "
                "back that the run was begun with, or start a new run"
            )
        copy_into(self.path / FILES[0], {name: tensor for name, tensor in base.items() if name not in rebuilt})

    def load_optimizer(self, optimizer: Optimizer) -> None:
        """Give the state to an optimizer built from `adapter.parameter_groups` after `load_model`.

        Raises:
            CheckpointError: it trains other parameters.
        """
        with TensorFile(self.path / FILES[2]) as tensors:
            optimstate.unpack(optimizer, tensors, self.state["optimizer"])

    def load_random(self) -> None:
        """Set all random generators; do it last, right before the first step."""
        randomstate.restore(dict(self.state["random"]))


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: something in it is missing or damaged, or a newer version wrote it.
    """
    body = _verified(path)
    return Checkpoint(path, int(body["step"]), body)


def newest(folder: Path, report: Callable[[str, str], None]) -> Checkpoint | None:
    """The newest complete checkpoint in a `checkpoints` folder, or None when it holds none at all.

    `report` is called with the name and the fault of each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and each of them is damaged.
    """
    faults: list[str] = []
    for _, path in sorted(_listed(folder), reverse=True):
        try:
            return load(path)
        except CheckpointError as error:
            faults.append(str(error))
            report(path.name, str(error))
    if faults:
        raise CheckpointError(f"no checkpoint in {folder} is whole; the newest: {faults[0]}")
    return None


def _listed(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_dir():
                yield int(match.group(1)), path


def _verified(path: Path) -> dict[str, Any]:
    """The contents of state.json, after every file was compared with its checksum."""
    try:
        outer = json.loads((path / "state.json").read_text())
        body, digest = outer["state"], outer["sha256"]
        if _digest(body) != digest:
            raise CheckpointError(f"{path / 'state.json'} is damaged: its checksum does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: {error}") from error
    if body["format"] not in _READ:
        raise CheckpointError(
            f"{path} has the checkpoint format {body['format']}, this version reads up to {FORMAT}; "
            "use the version that wrote it"
        )
    for name in FILES:
        verify(path / name, body["files"][name])
    return dict(body)


def _digest(body: Mapping[str, Any]) -> str:
    return sha256(optimstate.dump(body).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
