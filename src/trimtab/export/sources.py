"""Where the weights of a start or an end come from: a checkpoint, a preset's seed, or a run's start.safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.config import PretrainConfig
from trimtab.errors import CheckpointError, ConfigError
from trimtab.export.checkpoint import Checkpoint, mapped_model, meta_model, model_names, open_checkpoint, ties
from trimtab.methods.folder import CONFIG_FILE, SAMPLE, base_sample, encode_sample
from trimtab.models.load import drawn_weight
from trimtab.models.presets import PRESETS
from trimtab.nn.weights import is_conv1d


class Weights(Protocol):
    """Tensors of a model, one at a time, under the model's own names."""

    #: What an adapter's config names as its base; None for what lies in no checkpoint.
    name: str | None

    def names(self) -> set[str]:
        """The tensors that are there."""

    def read(self, name: str) -> Tensor:
        """One of them, as the model stores it."""

    def fingerprint(self) -> dict[str, str]:
        """What an adapter folder says of its base, beside its name; empty where only a part of it is there."""


class InCheckpoint:
    """The weights of a checkpoint.

    Raises:
        CheckpointError: it lacks a weight of the model, or has one of another shape.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.name: str | None = checkpoint.name
        self._checkpoint = checkpoint
        self._stored = {name: key for key, name in model_names(checkpoint, model).items()}
        for group in ties(model):
            held = next((name for name in group if name in self._stored), None)
            if held is not None:
                self._stored.update({name: self._stored[held] for name in group if name not in self._stored})
        missing = [name for name, _ in model.named_parameters() if name not in self._stored]
        if missing:
            raise CheckpointError(f"{checkpoint.name} lacks {len(missing)} tensors of its model, {missing[0]} first")

    def names(self) -> set[str]:
        return set(self._stored)

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._stored[name])

    def fingerprint(self) -> dict[str, str]:
        sample = base_sample(mapped_model(self._checkpoint))
        return {SAMPLE: encode_sample(sample)} if sample.numel() else {}


class Drawn:
    """The random weights that a preset's run began with, drawn again from its seed."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.name: str | None = None
        self._seed = seed
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def names(self) -> set[str]:
        return set(self._shapes)

    def read(self, name: str) -> Tensor:
        return drawn_weight(name, self._shapes[name], self._seed)

    def fingerprint(self) -> dict[str, str]:
        return {}


class InStartFile:
    """The adapted matrices as they were when a run's adapters came into being; the other weights are not in it."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.name: str | None = None
        self._path = path
        self._turned = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}
        try:
            with safe_open(path, framework="pt") as file:
                self._names = set(file.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        unknown = sorted(self._names - {name for name, _ in model.named_parameters()})
        if unknown:
            raise CheckpointError(f"{path} is of another model: it holds {unknown[0]}, which the end does not have")

    def names(self) -> set[str]:
        return self._names

    def read(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            value: Tensor = file.get_tensor(name).clone()
        return value.t().contiguous() if name in self._turned else value

    def fingerprint(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Update:
    """A start and an end of one training: the end's model as shapes, and the weights of both.

    Attributes:
        model: on the meta device.
        start: the weights before; it may lack some.
        end: the weights after.
        switch: steps of full training before the adapter came into being, which are part of the update; else 0.
    """

    model: nn.Module
    start: Weights
    end: Weights
    switch: int = 0


def find_update(source: str, base: str | None) -> Update:
    """What a training changed.

    Args:
        source: a run folder of `trimtab pretrain`, or the checkpoint at the end (a folder or a hub name).
        base: what it began with: a checkpoint, or a run's start.safetensors. None takes, for a run folder, the
            model that its config.yaml names.

    Raises:
        ConfigError: `base` is missing, or there is no such thing.
        CheckpointError: something is damaged, or the two are of different models.
    """
    run = Path(source).expanduser()
    if (run / CONFIG_FILE).is_file() and not (run / "config.json").is_file():
        raise ConfigError(
            f"{source} is an adapter folder, which is low-rank already; --delta-rank is for a run or a model. Merge it "
            "with trimtab merge, or write it for llama.cpp with --gguf"
        )
    config = _run_config(run)
    if config is not None and not (run / "model").is_dir():
        raise ConfigError(
            f"{source} has no model/ yet, since the run has not ended; go on with trimtab pretrain --resume {source}"
        )
    if config is not None:
        refuse_unmerged(run, "model/ lacks it, and no LoRA could stand for it")
    checkpoint = open_checkpoint(source if config is None else str(run / "model"))
    model = meta_model(checkpoint.folder, checkpoint.name)
    end = InCheckpoint(checkpoint, model)
    if base is not None:
        return Update(model, _start(base, model), end)
    if config is None:
        raise ConfigError(f"{source} is no run folder, so its start is not known; name it with --base")
    switch = config.method.switch_step
    if config.model.name in PRESETS:
        return Update(model, Drawn(model, config.seed), end, switch)
    return Update(model, _start(config.model.name, model), end, switch)


def refuse_unmerged(run: Path, why: str) -> None:
    """Refuse a run whose method has no merged form: it left its adapter beside the model.

    Raises:
        ConfigError: `run` holds adapter/.
    """
    if (run / "adapter").is_dir():
        raise ConfigError(
            f"{run}: the run's adapter has no merged form, so {why}; use trimtab.load_adapter(model, "
            f"'{run / 'adapter'}') on the model in {run / 'model'}"
        )


def _start(base: str, model: nn.Module) -> Weights:
    path = Path(base).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        return InStartFile(path, model)
    checkpoint = open_checkpoint(base)
    start = meta_model(checkpoint.folder, base)
    theirs, ours = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (start, model))
    odd = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if odd:
        name = odd[0]
        raise CheckpointError(
            f"{base} is another model than the end: {name} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} at the end"
        )
    return InCheckpoint(checkpoint, start)


def _run_config(folder: Path) -> PretrainConfig | None:
    """The configuration of a run folder; None for a folder that is none."""
    if not (folder / "config.yaml").is_file() or (folder / "config.json").is_file():
        return None
    try:
        return PretrainConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / 'config.yaml'} cannot be used: {line}; name the start with --base") from None
