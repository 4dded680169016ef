"""`eval`: the scores of a checkpoint, with or without an adapter, or of what a fine-tuning run left, on a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from trimtab.config import DTYPES
from trimtab.errors import CheckpointError, ConfigError
from trimtab.finetuneconfig import FinetuneConfig, ScoreConfig, TaskEvalConfig, is_finetuning
from trimtab.loadconfig import load_tree
from trimtab.methods.base import Method
from trimtab.methods.folder import read_adapter_folder
from trimtab.methods.registry import load_adapter, method_of
from trimtab.models.taskmodel import LABELS, build_task_model, head_settings
from trimtab.naming import named
from trimtab.settings import given
from trimtab.tasks.base import Loaded
from trimtab.tasks.encode import Encoder, Reading
from trimtab.tasks.files import FileTask
from trimtab.train.headobjective import HeadObjective
from trimtab.train.material import collate_for, idle_in_scoring, open_parts
from trimtab.train.objective import Objective
from trimtab.train.scoring import Scorer, Scores
from trimtab.train.session import device_of

#: What of `eval` decides about a training alone.
_OF_TRAINING = ("every", "patience", "keep_best")


def score(config: ScoreConfig, note: Callable[[str], None] = lambda text: None) -> Scores:
    """Score a model as `config` says; nothing is written.

    Args:
        config: what is scored on what.
        note: gets what a user should know, a sentence each.

    Raises:
        TrimtabError: whatever a user can mend, in one line.
    """
    config, hf, reading, tokenizer = open_parts(config, _method(config))
    for key in given(config.eval, *_OF_TRAINING):
        note(f"eval.{key} has no effect: nothing is trained")
    for text in idle_in_scoring(config, reading):
        note(text)
    with named("task", config.task):
        loaded = config.task.load(training=False)
    if config.task.form == "plain":
        note(f"texts are read in pieces of at most {config.data.length} tokens (data.seq_len)")
    if not loaded.scored:
        raise ConfigError("task: there is no split to score; give task.validation or task.test")
    settings = head_settings(reading, config.task.form, loaded.labels, tokenizer.pad_token_id)
    order = head_order(config, hf, loaded) if reading == "head" and loaded.labels else None
    model = _model(config, reading, settings)
    encoder = Encoder(tokenizer, reading, config.data.length, config.data.too_long)
    collate = collate_for(reading, tokenizer, hf, config.model.name, config.data)
    scorer = Scorer(config.task, loaded, reading, encoder, collate, config.eval)
    objective = (
        HeadObjective(model, len(loaded.labels), order)
        if reading == "head"
        else Objective(model, config.loss.chunked, config.loss.chunk)
    )
    return scorer(model, objective, examples=config.eval.examples)


def build(config: ScoreConfig) -> nn.Module:
    """The language model of a `ScoreConfig`, with its adapter, in eval mode.

    Raises:
        TrimtabError: it cannot be built.
    """
    config, _, reading, _ = open_parts(config, _method(config))
    return _model(config, reading, {})


def _method(config: ScoreConfig) -> Method | None:
    """The method of the adapter; None where there is none, or where loading it will say what is wrong."""
    if config.adapter is None:
        return None
    try:
        return method_of(read_adapter_folder(Path(config.adapter)))
    except CheckpointError:
        return None


def of_run(folder: Path) -> dict[str, Any]:
    """The tree of a `ScoreConfig` for what a fine-tuning run left, to be changed and read.

    Raises:
        CheckpointError: the folder is no finished fine-tuning run.
    """
    config = run_config(folder)
    model, adapter = config.model.model_dump(mode="json"), folder / "adapter"
    if not adapter.is_dir():
        if not (folder / "model").is_dir():
            raise CheckpointError(
                f"{folder} holds neither adapter/ nor model/: the run is not finished; go on with it by "
                f"trimtab finetune --resume {folder}"
            )
        model |= {"name": str(folder / "model"), "tokenizer": None}
    kept = ("task", "data", "loss", "eval", "device", "dtype", "seed")
    dumped = config.model_dump(mode="json")
    found: dict[str, Any] = {key: dumped[key] for key in kept}
    for key in ("examples", *_OF_TRAINING):  # those are for evaluations while training
        found["eval"][key] = TaskEvalConfig.model_fields[key].default
    return found | {"model": model, "adapter": str(adapter) if adapter.is_dir() else None}


def refuse_trained_rows(folder: Path, config: ScoreConfig) -> None:
    """Where validation is drawn from `task.train`, it has to be drawn as the run did: other rows were trained on.

    Raises:
        ConfigError: rows that the run in `folder` was trained on would be scored as held out.
    """
    run, task = run_config(folder), config.task
    own = run.task
    if not (isinstance(own, FileTask) and isinstance(task, FileTask)) or task.validation is not None:
        return
    if not any(_overlap(mine, other) for mine in _places(task.train) for other in _places(own.train)):
        return
    # A row is drawn by a hash of what the settings make of it, and of the seed.
    before, now = own.model_dump(), task.model_dump()
    changed = [f"task.{key}" for key in now if key not in _SAME_ROWS and before.get(key) != now[key]]
    changed += ["seed"] if run.seed != config.seed else []
    if changed:
        raise ConfigError(
            f"task.validation = null: rows drawn from task.train would be scored, on which {folder} was trained; leave "
            f"{' and '.join(changed)} as in the run, or name other rows"
        )


#: Settings that do not decide which rows are drawn; the files are compared by where they lie.
_SAME_ROWS = frozenset({"train", "test", "max_train", "max_eval"})


def _places(sources: Any) -> list[str | Path]:
    """Where sources lie, whatever they were called; a dataset of a hub by its name."""
    several = sources if isinstance(sources, list | tuple) else [sources]
    return [
        Path(source).expanduser().resolve()
        if isinstance(source, str) and not source.startswith("package:")
        else str(source)
        for source in several
    ]


def _overlap(one: str | Path, other: str | Path) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one == other or one in other.parents or other in one.parents
    return one == other


def run_config(folder: Path) -> FinetuneConfig:
    """The configuration in the folder of a fine-tuning run.

    Raises:
        CheckpointError: it is none.
        ConfigError: its configuration cannot be used.
    """
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not is_finetuning(tree):
        raise CheckpointError(
            f"{folder} is a run of `trimtab pretrain`; name its model, {folder / 'model'}, and a task"
        )
    return load_tree(FinetuneConfig, path)


def _model(config: ScoreConfig, reading: Reading, settings: dict[str, Any]) -> nn.Module:
    """The model with its adapter, in the compute dtype.

    Raises:
        ConfigError: its head is neither among its own tensors nor among the adapter's.
    """
    dtype = DTYPES[config.dtype]
    model, new = build_task_model(config.model, reading, settings, config.seed, dtype)
    model.to(device_of(config.device))
    if config.model.quantize is None:  # codes of 4 bits know what they compute in
        for parameter in model.parameters():  # as in training; rotary frequencies, which are buffers, stay exact
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    of_adapter: set[str] = set()
    if config.adapter is not None:
        adapter = load_adapter(model, config.adapter)
        of_adapter = {entry.name for entry in adapter.trainable()}
    if lacking := [name for name in new if name not in of_adapter]:
        where = config.model.name if config.adapter is None else f"{config.model.name} with {config.adapter}"
        raise ConfigError(
            f"model.name: {where} has no head for this task ({lacking[0]} would be random); fine-tune it first, or "
            "give the adapter or the model that a run left"
        )
    if model.config.pad_token_id is None and "pad_token_id" in settings:
        model.config.pad_token_id = settings["pad_token_id"]
    found: nn.Module = model.eval()
    return found


def head_order(config: ScoreConfig, hf: Any, loaded: Loaded) -> list[int] | None:
    """For each class of the task its number in the head, by their names; None where the head has no names.

    Raises:
        ConfigError: the two have other names.
    """
    if config.adapter is not None:
        where, names = str(config.adapter), adapter_labels(config.adapter)
    else:
        where, names = config.model.name, [str(n) for _, n in sorted((getattr(hf, "id2label", None) or {}).items())]
    if names is None or all(name.startswith("LABEL_") for name in names):
        return None
    known = {name.casefold(): number for number, name in enumerate(names)}
    wanted = [name.casefold() for name in loaded.labels]
    if sorted(known) == sorted(wanted):
        return [known[name] for name in wanted]
    raise ConfigError(
        f"task: its classes are {', '.join(loaded.labels)}, and those of the head of {where} are {', '.join(names)}; "
        "give files with these, or list them in task.labels"
    )


def adapter_labels(adapter: Path) -> list[str] | None:
    """The classes that a run's adapter was trained for, in the order of its head; None where it does not say."""
    path = adapter / LABELS
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path} is no list of names")
    return names
