"""Where a model to write with comes from: a checkpoint, or a run's folder, with adapters on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from pydantic import ValidationError
from transformers import GenerationConfig

from trimtab.errors import ConfigError, TrimtabError
from trimtab.finetuneconfig import TaskModelConfig, is_finetuning
from trimtab.generate.generator import Generator, Sampling
from trimtab.methods.folder import CONFIG_FILE, read_adapter_folder
from trimtab.models.load import load_for_generation, read_config
from trimtab.models.taskmodel import fitting_length, quantize_as, reading_of, task_tokenizer
from trimtab.quiet import quiet_libraries
from trimtab.tasks.base import Task
from trimtab.tasks.registry import parse_task

Found = TypeVar("Found")


class Base(NamedTuple):
    """A checkpoint as a configuration names it, a run's adapter on it, and the task that the run was for."""

    config: TaskModelConfig
    adapter: Path | None = None
    task: Task | None = None


def open_generator(
    base: str,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    raw: bool = False,
    sampling: Sampling | None = None,
) -> Generator:
    """Load a model with its tokenizer and adapters; the first of these is at work.

    Args:
        base: a folder or hub name of a causal or an encoder-decoder model, or the folder of a run of trimtab. A run's
            own adapter comes first, called "run".
        adapters: adapter folders by the names that they get.
        dtype: of the weights; None is bf16 on a GPU and fp32 on a CPU.
        device: "auto" (a GPU where there is one), "cpu", "cuda", or "cuda:1".
        raw: of a fine-tuning run, give texts as they stand, not as the source of its task (see `Generator`).
        sampling: how tokens are to be chosen: what is wrong with it is found before any weight is read.

    Raises:
        ConfigError: there is no such model, it cannot be reached or read or writes nothing; an adapter's name is taken.
        CheckpointError: an adapter folder cannot be used, or is of another base.
        DataError: there is no tokenizer.
    """
    found, where = find_base(base), _device(device)
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    with _named_base(base):
        hf = read_config(found.config.name)
        task = found.task
        if found.adapter is not None and task is not None and reading_of(found.config, hf, task.form) == "head":
            raise _has_head(base)
        tokenizer = task_tokenizer(found.config, "save one in that folder (tokenizer.save_pretrained)")
        fitting_length(found.config, hf, tokenizer, None)
    if sampling is not None:
        sampling.check(_generation_config(found.config.name, hf))
    for path in (adapters or {}).values():
        read_adapter_folder(Path(path).expanduser())
    with _named_base(base):
        model = load_for_generation(found.config.name, dtype)
        quantize_as(found.config, model, dtype)
        model.to(where)
    generator = Generator(model, tokenizer, found.task, raw=raw)
    wanted = {"run": found.adapter} if found.adapter is not None else {}
    for name in wanted.keys() & (adapters or {}).keys():
        raise ConfigError(f"the run's own adapter is called {name!r}; give the other one another name, NAME=PATH")
    for name, path in (wanted | dict(adapters or {})).items():
        generator.load(name, path)
    if generator.adapters and generator.active != generator.adapters[0]:
        generator.use(generator.adapters[0])
    return generator


def find_base(base: str) -> Base:
    """Which checkpoint a word on the command line means.

    Raises:
        ConfigError: it is an adapter folder, or a run without a model yet.
    """
    folder = Path(base).expanduser()
    if (folder / "config.json").is_file() or not folder.is_dir():
        return Base(TaskModelConfig(name=base))
    if (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"BASE: {base} is an adapter folder; give its base, and this one as --adapter {base}")
    if not (folder / "config.yaml").is_file():
        return Base(TaskModelConfig(name=base))  # what is wrong with it is said when it is read
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"BASE: {folder / 'config.yaml'} cannot be read: {' '.join(str(error).split())}") from error
    model, adapter = folder / "model", folder / "adapter"
    if is_finetuning(tree):
        if _classifies(model):
            raise _has_head(base)
        if (model / "config.json").is_file():  # merged, or trained in full
            return Base(TaskModelConfig(name=str(model)), task=_section(folder, tree, "task", parse_task))
        if adapter.is_dir():
            config = _section(folder, tree, "model", TaskModelConfig.model_validate)
            return Base(config, adapter, _section(folder, tree, "task", parse_task))
    elif (model / "config.json").is_file():
        return Base(TaskModelConfig(name=str(model)), adapter if adapter.is_dir() else None)
    raise ConfigError(
        f"BASE: {base} is a run that is not complete: it holds no model yet; go on with it by --resume {base}"
    )


def _has_head(base: str) -> ConfigError:
    return ConfigError(
        f"BASE: {base} is a run whose model has a head and writes nothing; score it: trimtab eval {base}"
    )


def _section(folder: Path, tree: dict[str, Any], key: str, read: Callable[[Any], Found]) -> Found:
    """A section of a run's configuration."""
    try:
        return read(tree.get(key))
    except ValidationError as error:
        said = error.errors()[0]
        where, text = ".".join(map(str, (key, *said["loc"]))), said["msg"]
    except ConfigError as error:
        where, text = key, str(error)
    raise ConfigError(f"BASE: {folder / 'config.yaml'}: {where}: {text}")


def _classifies(model: Path) -> bool:
    """Whether a model folder holds one with a head for classes or values."""
    try:
        tree = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any("SequenceClassification" in str(name) for name in tree.get("architectures") or ())


def _generation_config(name: str, hf: Any) -> GenerationConfig:
    """What a model will have when it is loaded."""
    folder = Path(name).expanduser()
    try:
        with quiet_libraries():
            return GenerationConfig.from_pretrained(str(folder) if folder.is_dir() else name)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(hf)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: give auto, cpu, cuda or cuda:NUMBER") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {name!r}: give auto, cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {name!r}: there are {torch.cuda.device_count()} GPUs here; give cpu, or leave it out"
        )
    return device


@contextlib.contextmanager
def _named_base(base: str) -> Iterator[None]:
    """Loaders speak of a configuration's keys; here the model is a word on the command line."""
    try:
        yield
    except TrimtabError as error:
        key, _, text = str(error).partition(": ")
        if key not in ("model.name", "model.tokenizer"):
            raise
        raise type(error)(f"BASE: {text}") from error
