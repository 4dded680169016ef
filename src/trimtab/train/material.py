"""What a fine-tuning run trains on, ready before any weight is read: tokens, batches, and the number of steps.

Whatever is wrong with the task, the tokenizer, the model's kind or the method is found here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from trimtab.config import DTYPES, Misfit
from trimtab.errors import CannotSave, ConfigError, DataError
from trimtab.finetuneconfig import ExamplesConfig, FinetuneConfig, ScoreConfig
from trimtab.loadconfig import unused_settings
from trimtab.methods.base import Method
from trimtab.methods.registry import attach
from trimtab.models.load import read_config
from trimtab.models.taskmodel import (
    build_task_model,
    fitting_length,
    head_settings,
    reading_of,
    shadow_task_model,
    task_tokenizer,
)
from trimtab.naming import named
from trimtab.settings import given
from trimtab.tasks.base import Example, Labelled, Loaded, Task
from trimtab.tasks.batches import Collate, ExampleBatches, LayCausal, PadHead, PadPairs
from trimtab.tasks.encode import Encoder, Reading
from trimtab.train import randomstate
from trimtab.train.cached import check_place
from trimtab.train.headobjective import HeadObjective
from trimtab.train.objective import Objective
from trimtab.train.packed import packing_fault
from trimtab.train.scoring import Scorer, as_written

Config = TypeVar("Config", FinetuneConfig, ScoreConfig)

#: Keys of a configuration that tell where it was read, and by what.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Material:
    """All of a run that does not depend on its weights.

    Attributes:
        config: with its number of steps.
        method: with the defaults of fine-tuning.
        loaded: the task's examples.
        tokenizer: of the model.
        reading: how the model reads them.
        settings: what the model's config says of a new head.
        batches: of the training split.
        scorer: of the other splits.
        notes: what a user should know, one sentence each.
        faults: why examples are not packed that were to be; known once there is a model.
        drawn: parameters that the checkpoint does not have; known once there is a model.
        exact: tensors of the model that are held in all their bits, those that train; None is all of them, for a method
            that writes into the others later.
    """

    config: FinetuneConfig
    method: Method
    loaded: Loaded
    tokenizer: Any
    reading: Reading
    settings: dict[str, Any]
    batches: ExampleBatches
    scorer: Scorer
    notes: list[str]
    faults: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    exact: frozenset[str] | None = None

    def model(self) -> Any:
        """The model, drawn and read anew; it seeds all generators.

        What stays frozen to the end is in the dtype of the run already, so that nobody keeps what that rounds away:
        it is neither trained against nor scored, and would be merged into a model that was not.
        """
        config, dtype = self.config, DTYPES[self.config.dtype]
        randomstate.seed_all(config.seed)
        model, self.drawn[:] = build_task_model(config.model, self.reading, self.settings, config.seed, dtype)
        self._keep_apart(model)
        if self.exact is not None:
            for name, parameter in model.named_parameters():
                if name not in self.exact and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _keep_apart(self, model: Any) -> None:
        """Pad examples, where the model would let packed ones see each other."""
        collate = self.batches.collate
        if not isinstance(collate, LayCausal) or not collate.packing:
            return
        if fault := packing_fault(model, collate, self.batches.data):
            self.faults.append(fault)
            padded = replace(collate, packing=False)
            self.batches.lay(padded, grouped=self.config.data.group_by_length)
            self.scorer.collate = padded

    @staticmethod
    def shape(model: Any) -> str:
        """What tells two models apart whose tensors are the same: their configurations."""
        told = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """What tells the tokens of two tasks apart."""
        parts = [part.digest for part in (self.batches.data, *self.scorer.encoded.values())]
        return hashlib.sha256(json.dumps([*parts, *self.loaded.labels]).encode()).hexdigest()

    def objective(self, model: nn.Module) -> Objective | HeadObjective:
        """The loss of a model on this task."""
        if self.reading == "head":
            return HeadObjective(model, len(self.loaded.labels))
        return Objective(model, self.config.loss.chunked, self.config.loss.chunk)


def prepare(config: FinetuneConfig) -> Material:
    """Read the task, make its tokens, and put the method on a shadow of the model to see that it fits.

    Raises:
        TrimtabError: what is wrong, in one line.
    """
    given_by_user = config
    check_place(config.train.cache_hidden)
    config, hf, reading, tokenizer = open_parts(config, config.method)
    with named("task", config.task):
        loaded = config.task.load()  # runs with other seeds are scored on the same examples
    settings = head_settings(reading, config.task.form, loaded.labels, tokenizer.pad_token_id)
    method = config.method.for_finetuning(config.seed, new_head=reading == "head")
    trained = _check_method(config, method, shadow_task_model(config.model, hf, reading, settings))

    encoder = Encoder(tokenizer, reading, config.data.length, config.data.too_long)
    collate = collate_for(reading, tokenizer, hf, config.model.name, config.data)
    packed = reading == "causal" and config.data.packing
    if config.train.cache_hidden is not None and packed:
        raise Misfit(
            "train.cache_hidden",
            f"{config.train.cache_hidden}: packed sequences are others in each epoch, so that nothing stored would be "
            "read again; set data.packing=false",
        )
    train: list[Example] = list(loaded.splits["train"])
    written = as_written(config.task, reading, loaded, train)
    encoded = encoder(written, "train", loaded.places.get("train", ()))
    if reading != "head" and config.task.has_sources:
        _check_words(config.task, loaded, tokenizer)
        longest = config.task.decoding.get("max_new_tokens", int(encoded.due.max()))
        if config.eval.max_new_tokens is None:  # in the run's folder it stands, so that others score alike
            config = config.model_copy(update={"eval": config.eval.model_copy(update={"max_new_tokens": int(longest)})})
    scorer = Scorer(config.task, loaded, reading, encoder, collate, config.eval)
    laid = collate
    if isinstance(collate, LayCausal) and config.train.cache_hidden is not None:
        laid = replace(collate, masked=True)  # which positions hold tokens is part of what is stored
    grouped = config.data.group_by_length and not packed
    batches = ExampleBatches(encoded, laid, config.train.batch, config.seed, grouped=grouped)
    full = config.resolved(batches.per_epoch)
    notes = [*loaded.notes, *(f"split train: {note}" for note in encoded.notes), *scorer.notes]
    notes += [*unused_settings(full), *_idle(given_by_user, reading, len(encoded))]
    if skipped := [f"{count} of {split}" for split, count in loaded.skipped.items() if count]:
        notes.append(f"task.skip_bad_rows: rows passed over: {', '.join(skipped)}.")
    exact = None if full.restarts() or method.switch_step else trained
    return Material(full, method, loaded, tokenizer, reading, settings, batches, scorer, notes, exact=exact)


def open_parts(config: Config, method: Method | None) -> tuple[Config, Any, Reading, Any]:
    """The configuration with its `data.seq_len`, the config of the model, how it reads the task, and its tokenizer.

    `method` is the one that the model is to have.

    Raises:
        TrimtabError: one of them is missing, or they do not go together.
    """
    hf = read_config(config.model.name)
    reading = reading_of(config.model, hf, config.task.form)
    tokenizer = task_tokenizer(config.model)
    taken = 0 if method is None else method.virtual_tokens
    length = fitting_length(config.model, hf, tokenizer, config.data.seq_len, taken)
    data = config.data.model_copy(update={"seq_len": length})
    if reading != "head" and tokenizer.eos_token_id is None:
        raise DataError("model.tokenizer: it has no token that ends a text, which a model that writes has to learn")
    return config.model_copy(update={"data": data}), hf, reading, tokenizer


def collate_for(reading: Reading, tokenizer: Any, hf: Any, name: str, data: ExamplesConfig) -> Collate:
    """Who makes tensors of examples, for a model that reads so."""
    pad = int(tokenizer.pad_token_id)
    if reading == "head":
        return PadHead(pad)
    if reading == "causal":
        return LayCausal(pad, data.length, data.packing)
    start = getattr(hf, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(f"model.name: the config of {name} has no decoder_start_token_id, its decoder's first token")
    return PadPairs(pad, int(start))


def _idle(config: FinetuneConfig, reading: Reading, examples: int) -> list[str]:
    """Settings that were given and have no effect on this task with this model, a line each."""
    notes = idle_in_scoring(config, reading)
    if reading != "causal":
        notes += [f"data.{key} has no effect: only causal models are packed" for key in given(config.data, "packing")]
    elif config.data.packing:
        notes += [f"data.{key} has no effect: data.packing is on" for key in given(config.data, "group_by_length")]
    if config.train.batch > examples:
        notes.append(
            f"train.batch = {config.train.batch} is more than the {examples} examples, which are all of a step"
        )
    return notes


def idle_in_scoring(config: FinetuneConfig | ScoreConfig, reading: Reading) -> list[str]:
    """Those of them that say how answers are asked for and reported."""
    notes = []
    writes = reading != "head" and config.task.has_sources
    if not writes:
        why = "has no effect: the model writes no answers"
        notes += [f"eval.{key} {why}" for key in given(config.eval, "beams", "max_new_tokens")]
        if "prompt" in type(config.task).model_fields:
            notes += [f"task.{key} {why}" for key in given(config.task, "prompt")]
    if type(config.task).headline is Task.headline:
        why = f"has no effect: the task {config.task.name} is reported in one way"
        notes += [f"eval.{key} {why}" for key in given(config.eval, "report")]
    return notes


def _check_words(task: Task, loaded: Loaded, tokenizer: Any) -> None:
    """See that the tokenizer can write the words of the labels.

    Raises:
        DataError: it cannot.
    """
    for number, name in enumerate(loaded.labels):
        (word,) = task.as_text(Labelled("", "", float(number)), loaded.labels).references
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if back != word.strip():
            raise DataError(
                f"task: the label {name!r} would be written as {word!r}, of which the tokenizer keeps {back!r}; rename "
                "it, or put a head on the model with model.head=classes"
            )


def _check_method(config: FinetuneConfig, method: Method, shadow: nn.Module) -> frozenset[str]:
    """The names of what trains at first, if the method fits."""
    dtype = DTYPES[config.dtype]
    try:
        with named("method", method):
            adapter = attach(shadow, method, dtype=dtype, pure=config.pure)
    except ConfigError as error:
        if config.model.quantize is None:
            raise
        raise ConfigError(f"{error} (model.quantize = {config.model.quantize})") from error
    if adapter.no_merge:  # then what was learned is saved beside the model
        try:
            adapter.check_save()
        except CannotSave as error:
            raise ConfigError(f"method.train_also: {error}") from None
    return frozenset(entry.name for entry in adapter.trainable())
