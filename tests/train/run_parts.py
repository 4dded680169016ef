"""A tiny run of `pretrain`: its configuration, and what it logged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.config import PretrainConfig


def config(text: Path, out: Path, **changes: Any) -> PretrainConfig:
    """14 steps with a warm start of 3 and restarts at 7 and 11; changes are given as section__key=value."""
    tree: dict[str, Any] = {
        "name": "a",
        "out": str(out),
        "device": "cpu",
        "model": {"name": "llama-9m"},
        "data": {
            "sources": [str(text)], "tokenizer": {"bpe_vocab_size": 300}, "seq_len": 16, "validation_share": 0.1,
        },
        "method": {"name": "relora", "rank": 4, "restart_every": 4, "warm_start_steps": 3, "dropout": 0.1},
        "optim": {"lr": 4e-3, "warm_start_lr": 2e-3},
        "schedule": {"warmup_steps": 2, "rewarm_steps": 2},
        "train": {"steps": 14, "batch_tokens": 64, "micro_batch": 2},
        "eval": {"every": 5, "tokens": 100},
        "checkpoint": {"every": 4},
        "log": {"every": 1},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return PretrainConfig.model_validate(tree)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("time", "tokens_per_second", "seconds")}
        for record in found
        if record["event"] == event
    ]
