"""What a fine-tuning run is asked: the source of its task, as in training; chats in the chat template."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints_for_tests import labelled_rows, save_checkpoints, sentences, write_rows
from rich.console import Console

from trimtab.cli import main
from trimtab.errors import ConfigError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.generate import Conversation, Generator, Message, Sampling, open_generator, read_prompts
from trimtab.loadconfig import load_tree
from trimtab.tasks.registry import parse_task
from trimtab.train.finetune import finetune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints whose tokenizers have a chat template, and sets."""
    folder = save_checkpoints(tmp_path_factory.mktemp("asked"), "llama", "t5")
    pairs = [{"source": text, "target": text.split()[0]} for text in sentences(40)]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "labelled.jsonl", labelled_rows(40))
    write_rows(folder / "chats.jsonl", [{"prompt": text, "completion": text.split()[-1]} for text in sentences(20)])
    return folder


def trained(place: Path, out: Path, family: str, task: dict[str, Any], *more: str) -> Path:
    words = [f"model.name={place / family}", f"task={json.dumps(task)}", "method={name: lora}", f"out={out}"]
    words += ["train.steps=3", "optim.lr=0.01", "dtype=fp32", "data.seq_len=120", "eval.max_new_tokens=6", *more]
    finetune(load_tree(FinetuneConfig, None, words), console=Console(file=io.StringIO()))
    return out / "run"


@pytest.mark.parametrize("save", ["adapter", "merged"])
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", ["seq2seq", "classification"])
def test_a_run_is_asked_as_it_was_scored(family: str, name: str, save: str, place: Path, tmp_path: Path) -> None:
    """What is typed is the source, whatever template the tokenizer has; the answers are those of the scoring."""
    column = {"seq2seq": "source", "classification": "text"}[name]
    file = place / {"seq2seq": "pairs.jsonl", "classification": "labelled.jsonl"}[name]
    task = {"name": name, "train": str(file), "validation": str(file), "max_eval": 5, "prompt": f"Say: {{{column}}}."}
    folder = trained(place, tmp_path, family, task, f"save={save}")
    generator = open_generator(str(folder), device="cpu")
    assert not generator.chats
    found = [json.loads(line) for line in (folder / "answers-validation.jsonl").read_text().splitlines()]
    assert len(found) == 5
    for row in found:
        typed = row["source"].removeprefix("Say: ").removesuffix(".")
        answer = generator.answer(typed, Sampling(max_new_tokens=6, temperature=0, beams=1))
        assert answer.text.strip() == row["answer"], row


@pytest.mark.parametrize("save", ["adapter", "merged"])
@pytest.mark.parametrize("name", ["classification", "regression"])
def test_a_run_with_a_head_writes_nothing(name: str, save: str, place: Path, tmp_path: Path) -> None:
    """It is said before the base is taken for a model that lacks a head."""
    labels = {"classification": "yes", "regression": 2.5}
    rows = [{"text": text, "label": labels[name]} for text in sentences(8)] + [{"text": "other words", "label": "0"}]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    task = {"name": name, "train": file, "validation": file}
    folder = trained(place, tmp_path, "llama", task, "model.head=classes", "data.packing=false", f"save={save}")
    with pytest.raises(ConfigError, match=r"^BASE: \S+/run is a run whose model has a head and writes nothing; score"):
        open_generator(str(folder), device="cpu")


def test_raw_gives_it_as_it_stands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "seq2seq", "train": str(place / "pairs.jsonl"), "prompt": "Say: {source}."}
    folder = str(trained(place, tmp_path, "llama", task))
    asked, raw = open_generator(folder, device="cpu"), open_generator(folder, device="cpu", raw=True)
    assert asked.encode("the cat") == raw.encode("Say: the cat.\n") != raw.encode("the cat")
    assert raw.tokenizer.decode(raw.encode("the cat")) == "the cat"
    assert "im_start" in raw.tokenizer.decode(asked.encode("the cat", chat=True))

    def told(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["generate", folder, "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0", *words])
        seen = capsys.readouterr()
        return seen.err if ended.value.code else seen.out

    assert told("--prompt", "the cat") == told("--raw", "--prompt", "Say: the cat.\n")
    assert "--raw and --chat exclude each other" in told("--raw", "--chat", "--prompt", "the cat")
    before, sys.stdin = sys.stdin, io.StringIO("Say: the cat.\n")
    try:
        assert told("--raw", "-") == told("--prompt", "the cat")
    finally:
        sys.stdin = before


def test_a_chat_run_keeps_its_template(place: Path, tmp_path: Path) -> None:
    folder = trained(place, tmp_path, "llama", {"name": "chat", "train": str(place / "chats.jsonl")})
    generator = open_generator(str(folder), device="cpu")
    assert generator.chats and "im_start" in generator.tokenizer.decode(generator.encode("the cat"))
    raw = open_generator(str(folder), device="cpu", raw=True)
    assert raw.tokenizer.decode(raw.encode("the cat")) == "the cat"


def test_a_chat_run_is_given_the_system_prompt_of_its_task(place: Path, tmp_path: Path) -> None:
    """As in training, unless the chat, or the user, brings another."""
    task = {"name": "chat", "train": str(place / "chats.jsonl"), "system": "the sun"}
    folder = str(trained(place, tmp_path, "llama", task))
    own, raw = open_generator(folder, device="cpu"), open_generator(folder, device="cpu", raw=True)
    system, asked, other = Message("system", "the sun"), Message("user", "the cat"), Message("system", "the moon")
    whole = raw.encode([system, asked], chat=True)
    assert own.encode("the cat") == own.encode([asked]) == whole != raw.encode([asked], chat=True)
    assert own.encode([other, asked]) == raw.encode([other, asked], chat=True)
    assert own.encode([asked], chat=False) == raw.encode([system, asked], chat=False)
    assert own.encode("the cat", chat=False) == raw.encode("the cat")
    shown: list[str] = []
    lines = iter(["/system the moon", "/system", "the cat", "/quit"])
    sampling = Sampling(max_new_tokens=4, temperature=0)
    Conversation(own, sampling, read=lambda _: next(lines), write=shown.append).run()
    assert "the system prompt is the task's own" in "".join(shown)
    assert raw.answer([system, asked], sampling, chat=True).text in "".join(shown)


@pytest.mark.parametrize(
    ("task", "column"),
    [
        ({"name": "seq2seq", "train": "a", "source": "article", "prompt": "{source}"}, "article"),
        ({"name": "classification", "train": "a", "text": "review"}, "review"),
        ({"name": "regression", "train": "a"}, "text"),
        ({"name": "language", "train": "a", "text": "body"}, "body"),
        ({"name": "glue", "subset": "cola"}, "sentence"),
        ({"name": "e2e"}, "mr"),
        ({"name": "e2e", "folder": "a"}, "meaning_representation"),
        ({"name": "classification", "train": "a", "pair": "b"}, "prompt"),
        ({"name": "glue", "subset": "rte"}, "prompt"),
        ({"name": "chat", "train": "a"}, "prompt"),
    ],
)
def test_a_file_of_the_task_is_read_by_its_own_column(task: dict[str, Any], column: str, tmp_path: Path) -> None:
    rows = [{column: "the cat", "label": 1}, {column: "a dog"} | ({} if column == "prompt" else {"prompt": "other"})]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    assert [prompt.asked for prompt in read_prompts(file, parse_task(task).asked_columns)] == ["the cat", "a dog"]


def test_prompts_of_a_file_need_not_be_renamed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"name": "seq2seq", "train": str(place / "pairs.jsonl"), "prompt": "Say: {source}."}
    folder = str(trained(place, tmp_path, "llama", task))
    rows = write_rows(tmp_path / "rows.jsonl", [{"source": "the cat"}, {"prompt": "the dog"}])
    with pytest.raises(SystemExit) as ended:
        main(["generate", folder, "--device", "cpu", "--max-new-tokens", "2", "--file", str(rows)])
    shown = capsys.readouterr().out
    assert not ended.value.code and "> the cat\n" in shown and "> the dog\n" in shown
    write_rows(rows, [{"sourze": "the cat"}])
    with pytest.raises(SystemExit) as ended:
        main(["generate", folder, "--device", "cpu", "--file", str(rows)])
    assert ended.value.code == 2
    assert "no column 'source'; the columns are 'sourze'; did you mean 'sourze'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "typed", "source"),
    [
        ({"name": "seq2seq", "train": "a", "prompt": "sum: {source}"}, "x {y}", "sum: x {y}"),
        ({"name": "classification", "train": "a"}, "x", "x\nLabel:"),
        ({"name": "regression", "train": "a", "prompt": "{text}?"}, "x", "x?"),
        ({"name": "glue", "subset": "sst2"}, "x", "sst2 sentence: x"),
        ({"name": "e2e"}, "name[Blue Spice], priceRange[£20-25]", "name : Blue Spice | price : £ 20 - 25"),
        ({"name": "e2e"}, "name : Blue Spice | food : Thai", "name : Blue Spice | food : Thai"),
        ({"name": "e2e", "source_form": "official"}, "name[A], food[B]", "name[A], food[B]"),
    ],
)
def test_a_text_becomes_a_source(task: dict[str, Any], typed: str, source: str) -> None:
    assert parse_task(task).as_source(typed) == source


@pytest.mark.parametrize(
    ("task", "typed", "says"),
    [
        ({"name": "classification", "train": "a", "pair": "other"}, "x", "reads two texts, and one is given.*--raw"),
        ({"name": "glue", "subset": "rte"}, "x", "the task glue rte reads two texts"),
        ({"name": "e2e"}, "name[A], nonsense", "' nonsense' is no list of"),
    ],
)
def test_a_text_that_is_no_source_is_refused(task: dict[str, Any], typed: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_task(task).as_source(typed)


def test_a_task_is_taken_up_by_the_generator_alone_that_it_is_given(place: Path) -> None:
    """A checkpoint by itself is asked as before."""
    plain = open_generator(str(place / "llama"), device="cpu")
    assert plain.chats and plain.task is None
    task = parse_task({"name": "seq2seq", "train": "a", "prompt": "sum: {source}"})
    assert Generator(plain.model, plain.tokenizer, task).encode("x") == plain.encode("sum: x\n", chat=False)


def test_in_a_conversation_each_line_is_a_source(place: Path) -> None:
    plain = open_generator(str(place / "llama"), device="cpu")
    task = parse_task({"name": "seq2seq", "train": "a", "prompt": "> {source}"})
    generator = Generator(plain.model, plain.tokenizer, task)
    shown: list[str] = []
    lines = iter(["the cat", "/quit"])
    sampling = Sampling(max_new_tokens=4, temperature=0)
    Conversation(generator, sampling, read=lambda _: next(lines), write=shown.append).run()
    assert "each line by itself is a source of the task seq2seq" in "".join(shown)
    assert plain.answer("> the cat\n", sampling, chat=False).text in "".join(shown)
