"""The whole configuration tree of a fine-tuning run; its common part is `trimtab.config.RunConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trimtab.config import (
    LossConfig,
    Misfit,
    ModelConfig,
    NonNegativeInt,
    PositiveInt,
    RunConfig,
    ScheduleConfig,
    Storage,
    check_cacheable,
    rounding,
    unused_storage,
)
from trimtab.settings import Settings
from trimtab.tasks import TaskField
from trimtab.tasks.base import Convention

#: Epochs of a run that names neither epochs nor steps.
DEFAULT_EPOCHS = 3.0
#: The longest sequence where nothing else is said.
DEFAULT_LENGTH = 512


class TaskModelConfig(ModelConfig):
    """A folder or hub name of a checkpoint, its tokenizer, and how it answers a task with labels.

    Args:
        tokenizer: a folder or hub name; None takes the checkpoint's own.
        head: "classes" puts a new head on the model, "words" lets it write the label's word; "auto" is "classes" for
            encoders and "words" for models that write.
        quantize: hold the frozen linear layers in 4 bits: "nf4" with quantised scales, as `trimtab.quantize` does by
            default, "nf4-single" with plain ones. LoRA on it is QLoRA.
    """

    tokenizer: str | None = None
    head: Literal["auto", "classes", "words"] = "auto"
    quantize: Literal["nf4", "nf4-single"] | None = None


class ExamplesConfig(Settings):
    """How examples become sequences and batches.

    Args:
        seq_len: the longest sequence, in tokens; None is 512, or as many as the model has positions.
        too_long: what becomes of a longer one: "cut" (labelled texts lose the end of the longer text, answers their
            end), "skip" (and count), or "error".
        packing: examples of one micro-batch share sequences, and do not see each other; of causal models alone.
        group_by_length: batches hold examples of similar length, so that little is padded; the order stays random
            from epoch to epoch. It has no effect where examples are packed.
    """

    seq_len: Annotated[int, Field(ge=2)] | None = None
    too_long: Literal["cut", "skip", "error"] = "cut"
    packing: bool = True
    group_by_length: bool = True

    @property
    def length(self) -> int:
        """The longest sequence, once the model is known."""
        assert self.seq_len is not None
        return self.seq_len


class TaskScheduleConfig(ScheduleConfig):
    """The shape of the learning rate, as in pre-training; by default it falls to 0 in a line."""

    shape: Literal["cosine", "linear", "constant"] = "linear"
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class TaskTrainConfig(Settings):
    """How long, and how many examples a step: `batch` of them, in micro-batches of `micro_batch`.

    `steps` or `epochs`, not both; without either it is 3 epochs. The configuration in a run's folder has `steps`.
    `cache_hidden` and `cache_storage` are as in pre-training (`config.TrainConfig`).
    """

    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    batch: PositiveInt = 16
    micro_batch: PositiveInt | None = None
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    stop_at: PositiveInt | None = None
    cache_hidden: Path | None = None
    cache_storage: Storage = "bf16"

    @model_validator(mode="after")
    def _one_length(self) -> TaskTrainConfig:
        if self.steps is not None and self.epochs is not None:
            raise Misfit(
                "epochs", f"{self.epochs:g} and train.steps = {self.steps} exclude each other; set one to null"
            )
        return self


class TaskEvalConfig(Settings):
    """Score the task's splits every `every` steps (0: after each epoch) and at the end.

    Args:
        batch: examples scored at once.
        examples: at most so many of a split while training, the first ones; None takes all. The end takes all.
        keep_best: at the end, go back to the best step by the task's headline on the first scored split.
        patience: stop after so many evaluations without a better headline; None never stops early.
        report: whose way of reporting the headline follows (see docs/tasks.md).
        max_new_tokens: of a written answer; None takes the longest answer in training.
        beams: of the search for an answer; None takes the task's own way.
    """

    every: NonNegativeInt = 0
    batch: PositiveInt = 32
    examples: PositiveInt | None = None
    keep_best: bool = True
    patience: PositiveInt | None = None
    report: Convention = "official"
    max_new_tokens: PositiveInt | None = None
    beams: PositiveInt | None = None


class FinetuneConfig(RunConfig):
    """Everything that decides a run of `trimtab finetune`.

    `save` is what the run leaves: the adapter (with a new head, if there is one), the merged model, or both. Full
    training has no adapter, READ and its like have no merged form: each leaves what it has.
    """

    model: TaskModelConfig
    task: TaskField
    data: ExamplesConfig = ExamplesConfig()
    schedule: TaskScheduleConfig = TaskScheduleConfig()
    train: TaskTrainConfig = TaskTrainConfig()
    eval: TaskEvalConfig = TaskEvalConfig()
    save: Literal["adapter", "merged", "both"] = "adapter"

    @property
    def total_steps(self) -> int:
        if self.train.steps is None:
            raise ValueError("the number of steps is not known before the examples are counted; see `resolved`")
        return self.train.steps

    @property
    def stop_at(self) -> int | None:
        return self.train.stop_at

    @property
    def clip(self) -> float | None:
        return self.train.clip

    def without_stop(self) -> Self:
        return self.model_copy(update={"train": self.train.model_copy(update={"stop_at": None})})

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        train = self.train
        if train.micro_batch is not None and train.micro_batch > train.batch:
            raise Misfit("train.micro_batch", f"{train.micro_batch} is more than train.batch = {train.batch}")
        if self.eval.patience is not None and not self.eval.keep_best:
            raise Misfit(
                "eval.patience",
                f"{self.eval.patience} stops some evaluations after the best, and eval.keep_best = false would keep "
                "what came after it; set keep_best to true",
            )
        check_cacheable(train.cache_hidden, self.method)
        if train.steps is not None:
            self.check_method()
        return self

    def places(self) -> tuple[str, ...]:
        """Its model's and its task's, too: the base, its configuration and all tokens are compared."""
        of_task = (f"task.{key}" for key in self.task.places)
        return (*super().places(), "model.name", "model.tokenizer", *of_task)

    def own_unused(self) -> list[str]:
        return unused_storage(self.train)

    def cautions(self) -> list[str]:
        return [*super().cautions(), *rounding(self.train.cache_hidden, self.train.cache_storage, self.dtype)]

    def resolved(self, steps_per_epoch: int) -> FinetuneConfig:
        """This configuration with the number of steps in place of the number of epochs.

        Raises:
            Misfit: settings of the method or the schedule do not go with that number.
        """
        if self.train.steps is not None:
            return self
        epochs = DEFAULT_EPOCHS if self.train.epochs is None else self.train.epochs
        steps = max(1, round(epochs * steps_per_epoch))
        train = self.train.model_copy(update={"steps": steps, "epochs": None})
        full = self.model_copy(update={"train": train})
        full.check_method()
        return full


class ScoreConfig(Settings):
    """Everything that decides what `trimtab eval` measures: a model, perhaps an adapter on it, and a task."""

    model: TaskModelConfig
    adapter: Path | None = None
    task: TaskField
    data: ExamplesConfig = ExamplesConfig()
    loss: LossConfig = LossConfig()
    eval: TaskEvalConfig = TaskEvalConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


def is_finetuning(tree: object) -> bool:
    """Whether a configuration, as it stands in a run's folder, is of this kind."""
    return isinstance(tree, dict) and "task" in tree


__all__ = [
    "DEFAULT_EPOCHS",
    "ExamplesConfig",
    "FinetuneConfig",
    "ScoreConfig",
    "TaskEvalConfig",
    "TaskModelConfig",
    "TaskTrainConfig",
    "is_finetuning",
]
