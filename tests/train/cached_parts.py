"""A tiny checkpoint, a text of a dozen sequences, and runs over them that keep hidden states."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models_for_tests import tiny_llama
from rich.console import Console
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimtab.config import PretrainConfig
from trimtab.train.run import RunResult, pretrain

SEQ_LEN = 16
#: Layers and width of `tiny_llama`.
LAYERS, WIDTH = 2, 32


def write_inputs(folder: Path) -> None:
    """model/, a LLaMA of 300 words, and text.jsonl."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(40)]
    texts = (" ".join(draw.choices(words, k=12)) for _ in range(13))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tiny_llama(vocab_size=300).save_pretrained(folder / "model")


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of READ with 4 sequences a step in 2 micro-batches; changes are given as section__key=value."""
    found: dict[str, Any] = {
        "name": "a",
        "out": str(folder / "runs"),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"name": str(folder / "model")},
        "data": {
            "sources": [str(folder / "text.jsonl")], "tokenizer": {"bpe_vocab_size": 300}, "seq_len": SEQ_LEN,
            "validation_share": 0.3, "store": str(folder / "store"),
        },
        "method": {"name": "read", "size": 8, "init": "drawn"},
        "optim": {"lr": 5e-3},
        "train": {"steps": 10, "batch_tokens": 4 * SEQ_LEN, "micro_batch": 2},
        "eval": {"tokens": 20},
        "log": {"every": 1},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        found[section] = {**found.get(section, {}), key: value} if key else value
    return found


def config(folder: Path, **changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate(tree(folder, **changes))


def trained(asked: PretrainConfig, **more: Any) -> tuple[RunResult, str]:
    """A run's result, and what it printed."""
    console = Console(file=io.StringIO(), width=200)
    result = pretrain(asked, console=console, **more)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def records(folder: Path) -> list[dict[str, Any]]:
    """Steps and evaluations, without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in found if record["event"] in ("step", "eval")]
    return [{k: v for k, v in record.items() if k not in ("time", "tokens_per_second")} for record in kept]


@contextmanager
def counting_blocks() -> Iterator[list[int]]:
    """The rows of each call of a block meanwhile."""
    rows: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden))
        return forward(self, hidden, *args, **kwargs)

    LlamaDecoderLayer.forward = counted
    try:
        yield rows
    finally:
        LlamaDecoderLayer.forward = forward
