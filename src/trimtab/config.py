"""The whole configuration tree of a pre-training run.

One strict tree: an unknown key is an error, a pair of settings that cannot work together is one, too.
Methods come in through their registry, as a union by `method.name`. `trimtab.loadconfig` reads the
tree from a file and the command line.
"""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator

from trimtab.errors import ConfigError
from trimtab.methods import Method, MethodField
from trimtab.optim.schedule import Schedule
from trimtab.settings import HubSource, Settings, given

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
#: What is computed in, by its name in a configuration.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: How hidden states are stored.
Storage = Literal["bf16", "int8", "exact"]


class Misfit(ConfigError):
    """A setting that is right by itself and wrong beside another; `key` is its dotted name below the section."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class TokenizerConfig(Settings):
    """Exactly one of `path` (a Hugging Face tokenizer's folder or name) and `bpe_vocab_size`."""

    path: str | None = None
    bpe_vocab_size: Annotated[int, Field(ge=257)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerConfig:
        if self.path is None and self.bpe_vocab_size is None:
            raise Misfit("path", "give a tokenizer's folder or name here, or bpe_vocab_size to train one on the text")
        if self.path is not None and self.bpe_vocab_size is not None:
            raise Misfit(
                "path", f"{self.path!r} and bpe_vocab_size = {self.bpe_vocab_size} exclude each other; set one to null"
            )
        return self


class DataConfig(Settings):
    """Where text comes from, and how it becomes a memory-mapped store of tokens.

    A source is a file or folder (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), `package:NAME/FOLDER`
    for files inside an installed Python package, or a `HubSource`.
    """

    sources: tuple[str | HubSource, ...] = Field(min_length=1)
    validation_sources: tuple[str | HubSource, ...] = ()
    text_field: str = "text"
    tokenizer: TokenizerConfig
    store: Path | None = None
    seq_len: Annotated[int, Field(ge=2)] = 256
    document_mask: bool = False
    validation_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.01
    max_tokens: PositiveInt | None = None
    workers: NonNegativeInt = 0


class ModelConfig(Settings):
    """A preset (`llama-9m` ... `llama-7b`, random weights), or a folder or hub name of a causal LM.

    Args:
        gradient_checkpointing: keep nothing of a block, and run it again in the backward pass.
        selective_recompute: keep no results that operations without a matrix product can give again (see
            `trimtab.recomputing`); None does so unless blocks are checkpointed.
    """

    name: str
    gradient_checkpointing: bool = False
    selective_recompute: bool | None = None

    @property
    def recomputes(self) -> bool:
        """Whether the forward pass of a step is `trimtab.recomputing`."""
        return not self.gradient_checkpointing if self.selective_recompute is None else self.selective_recompute


class OptimConfig(Settings):
    """The optimizer and its rates. `warm_start_lr` holds in the full-rank phase; None takes `lr`."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"] = "adamw"
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    warm_start_lr: Annotated[float, Field(gt=0.0)] | None = None
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0


class ScheduleConfig(Settings):
    """The shape of the learning rate; the restarts come from the method. See `trimtab.Schedule`."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    rewarm_steps: NonNegativeInt = 0
    floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    after_warm_start: Literal["restart", "continue"] = "restart"
    reference: bool = False


class TrainConfig(Settings):
    """How long, and how much a step: `batch_tokens` a step in micro-batches of `micro_batch` sequences.

    `cache_hidden` is a folder for the hidden states that a method like READ reads, so that later epochs need not run
    the backbone; `cache_storage` is how they are stored (see `trimtab.HiddenCache`).
    """

    steps: PositiveInt
    batch_tokens: PositiveInt
    micro_batch: PositiveInt | None = None
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    stop_at: PositiveInt | None = None
    cache_hidden: Path | None = None
    cache_storage: Storage = "bf16"


class LossConfig(Settings):
    """`chunked` never holds all logits; `chunk` is the number of tokens whose logits exist at once."""

    chunked: bool = True
    chunk: PositiveInt = 1024


class EvalConfig(Settings):
    """Evaluate on `tokens` validation tokens every `every` steps (0: at the end alone)."""

    every: NonNegativeInt = 0
    tokens: PositiveInt = 100_000
    final_tokens: PositiveInt | None = None


class CheckpointConfig(Settings):
    """Write a checkpoint every `every` steps (0: at the end alone) and keep the newest `keep`."""

    every: NonNegativeInt = 1000
    keep: PositiveInt = 2


class LogConfig(Settings):
    """One line of metrics.jsonl every `every` steps; TensorBoard events beside it when asked."""

    every: PositiveInt = 10
    tensorboard: bool = False


class RunConfig(Settings, abc.ABC):
    """What every run has, whatever it trains for.

    `dtype` is the compute dtype and the storage dtype of frozen weights; what trains is held in fp32.
    `pure` holds what trains in `dtype`, too (to reproduce papers; small updates are lost in bf16).
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    out: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    pure: bool = False
    model: ModelConfig
    method: MethodField
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    @abc.abstractmethod
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    @abc.abstractmethod
    def stop_at(self) -> int | None:
        """Completed steps after which to stop, without any effect on the schedule."""

    @property
    @abc.abstractmethod
    def clip(self) -> float | None:
        """The bound of the gradient's norm."""

    @abc.abstractmethod
    def without_stop(self) -> Self:
        """The same run, going on past `train.stop_at`."""

    def check_method(self) -> None:
        """Refuse settings of the method that do not go with the length of the run, or with checkpointing.

        Raises:
            Misfit: one of them does not.
        """
        total, method = self.total_steps, self.method
        if self.stop_at is not None and self.stop_at > total:
            raise Misfit("train.stop_at", f"{self.stop_at} lies beyond train.steps = {total}")
        if method.switch_step >= total:
            raise Misfit(
                "method.warm_start_steps",
                f"{method.switch_step} leaves nothing of train.steps = {total} for the adapter",
            )
        if self.model.gradient_checkpointing and (why := method.no_checkpointing):
            raise Misfit("model.gradient_checkpointing", f"true: {why}; set it to false, or take another method")
        if self.model.gradient_checkpointing and self.model.selective_recompute:
            raise Misfit(
                "model.selective_recompute",
                "true: with model.gradient_checkpointing whole blocks are run again, and nothing is left to save; "
                "leave it out, or set model.gradient_checkpointing to false",
            )
        if (misfit := method.check_length(total)) is not None:
            raise Misfit(f"method.{misfit[0]}", misfit[1])
        if (bare := method.restarts(total)) and not self.restarts():
            left = total - bare[0]
            raise Misfit(
                "schedule.rewarm_steps",
                f"{self.schedule.rewarm_steps} is longer than the {left} steps that follow the first restart (step "
                f"{bare[0]} of {total}), so that none would be made; at most {left} fit",
            )
        self.multiplier()

    def cautions(self) -> list[str]:
        """What a user should know before this run, beside its figures."""
        if self.pure and self.dtype != "fp32":
            return [f"pure = true holds what trains in {self.dtype}, too: small updates are rounded away and lost"]
        return []

    def places(self) -> tuple[str, ...]:
        """Settings that say where something lies, which a run that goes on may find elsewhere: it is known again."""
        return ("train.cache_hidden",)

    def own_unused(self) -> list[str]:
        """Of the settings that runs of this kind alone have: those that were given and have no effect, a line each."""
        return []

    def restarts(self) -> tuple[int, ...]:
        """The completed-step counts after which the method restarts."""
        return self.method.restarts(self.total_steps, self.schedule.rewarm_steps)

    def multiplier(self) -> Schedule:
        """The learning rate's multiplier of this run, from the same list of restarts that the method follows.

        Raises:
            Misfit: a warm-up or re-warm is longer than the stretch that it opens.
        """
        try:
            return Schedule(
                total_steps=self.total_steps,
                shape=self.schedule.shape,
                warmup_steps=self.schedule.warmup_steps,
                floor=self.schedule.floor,
                warm_start_steps=self.method.switch_step,
                after_warm_start=self.schedule.after_warm_start,
                restarts=self.restarts(),
                rewarm_steps=self.schedule.rewarm_steps,
                reference=self.schedule.reference,
            )
        except ConfigError as error:
            # The schedule speaks of its own arguments; two of them are keys of this tree.
            text = str(error)
            for key in ("warmup_steps", "rewarm_steps"):
                if text.startswith(f"{key} = "):
                    raise Misfit(f"schedule.{key}", text.removeprefix(f"{key} = ")) from None
            raise Misfit("schedule", text) from None


class PretrainConfig(RunConfig):
    """Everything that decides a run of `trimtab pretrain`."""

    data: DataConfig
    train: TrainConfig
    eval: EvalConfig = EvalConfig()

    @property
    def total_steps(self) -> int:
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
    def _fits_together(self) -> PretrainConfig:
        """What no section can see alone. A wrong pair is refused here, before any work is done."""
        if self.name == "tokens":
            raise Misfit("name", "'tokens' is the folder of the token stores beside the runs; take another name")
        train, seq_len = self.train, self.data.seq_len
        sequences, rest = divmod(train.batch_tokens, seq_len)
        if rest or not sequences:
            whole = " or ".join(str(n * seq_len) for n in (sequences, sequences + 1) if n)
            raise Misfit(
                "train.batch_tokens",
                f"{train.batch_tokens} is not a multiple of data.seq_len = {seq_len}; the nearest is {whole}",
            )
        if train.micro_batch is not None and sequences % train.micro_batch:
            fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
            near = min(fits, key=lambda n: abs(n - (train.micro_batch or 1)))
            raise Misfit(
                "train.micro_batch",
                f"{train.micro_batch} does not divide the {sequences} sequences of a step "
                f"(train.batch_tokens / data.seq_len); the nearest that does is {near}",
            )
        check_cacheable(train.cache_hidden, self.method)
        self.check_method()
        return self

    def own_unused(self) -> list[str]:
        notes = unused_storage(self.train)
        if self.data.validation_sources:
            why = "has no effect: data.validation_sources is given"
            notes += [f"data.{key} {why}" for key in given(self.data, "validation_share")]
        return notes

    def cautions(self) -> list[str]:
        return [*super().cautions(), *rounding(self.train.cache_hidden, self.train.cache_storage, self.dtype)]


def check_cacheable(folder: Path | None, method: Method) -> None:
    """Refuse a folder for hidden states with a method that has none to keep.

    Raises:
        Misfit: it has none.
    """
    if folder is not None and (why := method.no_hidden_cache):
        raise Misfit(
            "train.cache_hidden",
            f"{folder}: hidden states cannot be kept for the method {method.name}: {why}; leave it out",
        )


def unused_storage(train: BaseModel) -> list[str]:
    """That `cache_storage` was given without a cache."""
    idle = given(train, "cache_storage") if getattr(train, "cache_hidden", None) is None else []
    return [f"train.{key} has no effect: train.cache_hidden is null" for key in idle]


def rounding(folder: Path | None, storage: Storage, dtype: str) -> list[str]:
    """What a user should know of hidden states that are stored in another precision than they are computed in."""
    if folder is None or storage in ("exact", dtype):
        return []
    return [
        f"train.cache_storage = {storage} rounds the hidden states, which are computed in {dtype}, in the first epoch "
        "as in later ones; exact keeps them as they are"
    ]
