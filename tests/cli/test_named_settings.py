"""Errors name a setting of a method or a task as it stands on the command line, with its section."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints_for_tests import labelled_rows, save_checkpoints, write_rows
from runs import run, write_project


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of width 32 and a labelled set."""
    folder = save_checkpoints(tmp_path_factory.mktemp("named"), "bert", "llama")
    write_rows(folder / "train.jsonl", labelled_rows(40))
    return folder


@pytest.mark.parametrize(
    ("words", "begins", "says"),
    [
        (["method={name: lora, rank: 0}"], "command line: method.rank: 0 is too small", ""),
        (["method={name: lora, rank: 500}"], "method.rank = 500 is above the size of", " or method.exclude=["),
        (
            ["method={name: bottleneck}"],
            "method.size = 64 is above the width of bert.",
            "(method.size=8 is a quarter of it)",
        ),
        (
            ["method={name: ladder, reduction: 20}"],
            "method.reduction=20: hidden_size = 32 of BertConfig is no multiple",
            "use a divisor of 32, such as method.reduction=8\n",
        ),
        (
            ["method={name: ladder, reduction: 16}"],
            "method.reduction=16: ",
            "smaller reduction, such as method.reduction=8\n",
        ),
        (
            ["method={name: lora, dora: true, targets: [word_embeddings]}"],
            "method.dora = true is for linear layers, and bert.embeddings.word_embeddings is an embedding",
            "",
        ),
        (["method={name: lora, targets: [nix]}"], "method.targets: 'nix' matches no linear layer", ""),
        (["task.labels=[warm]"], "command line: task.labels: ['warm']: give the names of two classes", ""),
        (["task.delimiter=;;"], "command line: task.delimiter: ';;' is no delimiter: give one character", ""),
        (["schedule.warmup_steps=9"], "command line: schedule.warmup_steps: 9 is longer", "or lengthen the run\n"),
        (["task.pair=text"], "command line: task.pair: 'text': is the column of the text already", ""),
        (["task.prompt=abc"], "command line: task.prompt: 'abc': lacks {text}", ""),
        (
            ["task.validation=x.csv", "task.validation_share=0.2"],
            "command line: task.validation_share: 0.2 draws what",
            "",
        ),
    ],
)
def test_a_setting_is_named_with_its_section(
    words: list[str], begins: str, says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"name": "classification", "train": str(place / "train.jsonl")}
    given = [f"model.name={place / 'bert'}", f"task={json.dumps(task)}", "method={name: lora}", f"out={place}"]
    ended = run(capsys, "finetune", *given, "train.steps=1", *words)
    assert ended.status == 2
    assert ended.err.startswith(f"trimtab: {begins}")
    assert says in ended.err


def test_pretraining_names_them_so_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_project(tmp_path)
    words = (f"data.sources=[{tmp_path / 'text.jsonl'}]", f"out={tmp_path}", "method.rank=5000")
    ended = run(capsys, "pretrain", str(path), *words)
    assert ended.err.startswith("trimtab: method.rank = 5000 is above the size of")


def test_a_metric_that_misses_something_names_the_task_s_setting(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e2e").mkdir()
    words = (f"task={{name: e2e, folder: {tmp_path / 'e2e'}, meteor_jar: /nowhere.jar}}", "method={name: lora}")
    ended = run(capsys, "finetune", f"model.name={place / 'llama'}", *words, f"out={tmp_path}")
    assert ended.err.startswith("trimtab: task.meteor_jar = '/nowhere.jar': no such file")


def test_a_word_that_the_next_one_would_undo_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind the section it holds."""
    task = f"task={{name: classification, train: {place / 'train.jsonl'}}}"
    words = (f"model.name={place / 'bert'}", "method={name: lora}", "train.steps=1", f"out={tmp_path}")
    ended = run(capsys, "finetune", *words, "task.max_eval=2", task)
    assert ended.status == 2 and ended.err.startswith("trimtab: command line: task.max_eval=2: task=... behind it")
    assert run(capsys, "finetune", *words, task, "task.max_eval=2").status == 0
    assert "max_eval: 2" in (tmp_path / "run" / "config.yaml").read_text()
