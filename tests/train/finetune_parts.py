"""What the tests of fine-tuning share: small checkpoints and sets, and short runs on them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints_for_tests import labelled_rows, save_checkpoints, sentences, write_rows
from rich.console import Console

from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.train.finetune import FinetuneResult, finetune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints and sets."""
    folder = save_checkpoints(tmp_path_factory.mktemp("finetune"), "bert", "llama", "t5")
    write_rows(folder / "labelled.jsonl", labelled_rows(120))
    write_rows(folder / "held-out.jsonl", labelled_rows(40, seed=1))
    pairs = [{"source": text, "target": text.split()[0]} for text in sentences(60)]
    write_rows(folder / "pairs.jsonl", pairs)
    chats = [{"prompt": text, "completion": text.split()[-1]} for text in sentences(60)]
    write_rows(folder / "chats.jsonl", chats)
    write_rows(folder / "texts.jsonl", [{"text": text} for text in sentences(60)])
    return folder


def labelled(place: Path) -> dict[str, Any]:
    return {
        "name": "classification",
        "train": str(place / "labelled.jsonl"),
        "validation": str(place / "held-out.jsonl"),
    }


def config(
    place: Path, out: Path, family: str, task: dict[str, Any], method: str = "lora", **changes: Any
) -> FinetuneConfig:
    """`method` is a name, or a section in braces."""
    words = {
        "name": "run",
        "out": out,
        "model.name": place / family,
        "data.seq_len": 120,
        "dtype": "fp32",
        "optim.lr": 3e-3,
        "train.steps": 12,
        "train.batch": 8,
        "log.every": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    given = [f"task={json.dumps(task)}", f"method={method if '{' in method else f'{{name: {method}}}'}"]
    told = [f"{key}={'null' if value is None else value}" for key, value in words.items()]
    return load_tree(FinetuneConfig, None, [*given, *told])


def quiet() -> Console:
    return Console(file=io.StringIO())


def run(*arguments: Any, **changes: Any) -> FinetuneResult:
    return finetune(config(*arguments, **changes), console=quiet())


def again(folder: Path, *words: str) -> FinetuneResult:
    """Go on with the run in a folder, with some words changed."""
    return finetune(load_tree(FinetuneConfig, folder / "config.yaml", words), resume=folder, console=quiet())


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == kind]
