"""A tiny encoder, three small files of labelled texts, and the configuration of a comparison over them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import BertConfig, BertForSequenceClassification

from trimtab.compare.child import Ended
from trimtab.compare.costs import costs
from trimtab.data.tokenizer import train_bpe
from trimtab.errors import TrimtabError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.train.finetune import finetune

GOOD, BAD = ["fine", "sunny", "sweet"], ["rotten", "gloomy", "bitter"]

CONFIG = """\
name: small
out: {folder}/runs
device: cpu
dtype: fp32
model:
  name: {folder}/model
task:
  name: classification
  train: {folder}/train.jsonl
  validation: {folder}/validation.jsonl
  test: {folder}/test.jsonl
optim:
  lr: 3.0e-3
train:
  steps: 6
  batch: 4
eval:
  every: 3
log:
  every: 1
"""


def texts(count: int, shift: int) -> list[dict[str, str]]:
    rows = []
    for n in range(count):
        words, label = (GOOD, "good") if (n + shift) % 2 else (BAD, "bad")
        rows.append({"text": f"The {n + 100 * shift}th was {words[n % 3]}", "label": label})
    return rows


def write_project(folder: Path, config: str = CONFIG) -> Path:
    """The config's path; beside it the model and the texts."""
    train_bpe((row["text"] for row in texts(60, 0)), 300).hf.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    plain = {"vocab_size": 300, "pad_token_id": 0, "max_position_embeddings": 512}
    BertForSequenceClassification(BertConfig(**sizes, **plain)).save_pretrained(folder / "model")
    for shift, (name, count) in enumerate({"train": 24, "validation": 12, "test": 12}.items()):
        lines = (json.dumps(row) + "\n" for row in texts(count, shift))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / "run.yaml"
    path.write_text(config.format(folder=folder))
    return path


class InProcess:
    """Takes the place of `Child`: the same commands, without the seconds that a process takes to begin.

    Attributes:
        calls: what was asked for.
        before: called with the words of each call; it may raise, or return how the call ends.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.before: Callable[[list[str]], Ended | None] = lambda words: None

    def __call__(self) -> InProcess:
        return self

    def run(self, module: str, words: Sequence[str]) -> Ended:
        self.calls.append(list(words))
        if (ended := self.before(list(words))) is not None:
            return ended
        if module == "trimtab.compare.costs":
            config, target = map(Path, words)
            target.write_text(json.dumps(costs(load_tree(FinetuneConfig, config))))
            return Ended(0, "")
        try:
            _, *rest = words
            folder = Path(rest[1]) if rest[0] == "--resume" else None
            path = folder / "config.yaml" if folder else Path(rest[0])
            result = finetune(load_tree(FinetuneConfig, path), resume=folder, console=Console(quiet=True))
        except TrimtabError as error:
            return Ended(2, str(error))
        return Ended(result.exit_status, "")
