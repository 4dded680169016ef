from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

import trimtab
from trimtab.cli import main

CONFIG = """\
name: small
model:
  name: llama-9m
data:
  sources: [text.jsonl]
  tokenizer:
    bpe_vocab_size: 300
  seq_len: 16
  validation_share: 0.1
method:
  name: relora
  rank: 4
  restart_every: 10
train:
  steps: 40
  batch_tokens: 64
"""


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Ended:
    """The exit status and what a user sees of `trimtab WORDS`."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    seen = capsys.readouterr()
    status = ended.value.code
    assert isinstance(status, int)
    return Ended(status, seen.out, seen.err)


def write_project(folder: Path, config: str = CONFIG) -> Path:
    """A folder with a text and a config; the config's path."""
    texts = (f"The {n}th year was a good one for the union." for n in range(400))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = folder / "run.yaml"
    path.write_text(config)
    return path


def environment() -> dict[str, str]:
    """Of a process in which trimtab is importable."""
    return {**os.environ, "PYTHONPATH": str(Path(trimtab.__file__).parents[1])}


def files_in(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
