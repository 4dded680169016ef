"""The whole configuration tree of a pre-training run, and how it is read.

One strict tree: an unknown key is an error that names its nearest neighbour, and a value error names
the file and the key. Methods come in through their registry, as a union by `method.name`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trimtab.methods import MethodField
from trimtab.settings import Settings

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]


class HubSource(Settings):
    """A Hugging Face dataset by name, read as a stream."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class TokenizerConfig(Settings):
    """Exactly one of `path` (a Hugging Face tokenizer's folder or name) and `bpe_vocab_size`."""

    path: str | None = None
    bpe_vocab_size: Annotated[int, Field(ge=257)] | None = None


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
    """A preset (`llama-9m` ... `llama-7b`, random weights), or a folder or hub name of a causal LM."""

    name: str
    gradient_checkpointing: bool = False


class OptimConfig(Settings):
    """The optimizer and its rates. `warm_start_lr` holds in the full-rank phase; None takes `lr`."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
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
    """How long, and how much a step: `batch_tokens` a step in micro-batches of `micro_batch` sequences."""

    steps: PositiveInt
    batch_tokens: PositiveInt
    micro_batch: PositiveInt | None = None
    clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    stop_at: PositiveInt | None = None


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

    every: NonNegativeInt = 0
    keep: PositiveInt = 2


class LogConfig(Settings):
    """One line of metrics.jsonl every `every` steps; TensorBoard events beside it when asked."""

    every: PositiveInt = 10
    tensorboard: bool = False


class PretrainConfig(Settings):
    """Everything that decides a run of `trimtab pretrain`.

    `dtype` is the compute dtype and the storage dtype of frozen weights; what trains is held in fp32.
    `pure` holds what trains in `dtype`, too (to reproduce papers; small updates are lost in bf16).
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    out: Path = Path("runs")
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    pure: bool = False
    model: ModelConfig
    data: DataConfig
    method: MethodField
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    loss: LossConfig = LossConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
