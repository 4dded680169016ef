"""`trimtab generate`: what it prints and writes, its words and its errors, and a chat on a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from chats_for_tests import CHATML
from generate_for_tests import METHODS, save_adapter, save_llama
from runs import run
from transformers import AutoModelForCausalLM

from trimtab.cligenerate import _named_folders
from trimtab.generate import Message, Sampling, open_generator

SHORT = ("--max-new-tokens", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A plain base, one with a chat template, and an adapter of the second."""
    path = tmp_path_factory.mktemp("models")
    found = {"plain": save_llama(path / "plain"), "chat": save_llama(path / "chat", CHATML)}
    model = AutoModelForCausalLM.from_pretrained(found["chat"])
    found["adapter"] = save_adapter(model, METHODS["lora"], path / "mine" / "adapter")
    return found


class Typed(io.StringIO):
    """Standard input that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_prompts_are_answered_on_the_terminal(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """One answer stands alone; of several each stands below what was asked."""
    generator = open_generator(folders["plain"], device="cpu")
    answers = [generator.answer(asked, Sampling(max_new_tokens=4)).text for asked in ("The capital", "Blue")]
    capsys.readouterr()
    one = run(capsys, "generate", folders["plain"], "--prompt", "The capital", *SHORT)
    assert (one.status, one.out) == (0, f"{answers[0]}\n")
    two = run(capsys, "generate", folders["plain"], "--prompt", "The capital", "--prompt", "Blue", *SHORT)
    assert two.out == f"> The capital\n{answers[0]}\n\n> Blue\n{answers[1]}\n"


def test_a_file_is_answered_into_a_file(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its order, with an adapter and a system prompt for what has none."""
    asked, out = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    turns = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Who?"}]
    asked.write_text(json.dumps({"prompt": "naïve"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    words = ("--adapter", folders["adapter"], "--file", str(asked), "--out", str(out), "--system", "Be short.")
    ended = run(capsys, "generate", folders["chat"], *words, *SHORT)
    assert ended.status == 0 and f"{out}: 2 answers" in ended.out
    one = tmp_path / "one.jsonl"
    assert (
        f"{one}: 1 answer\n" in run(capsys, "generate", folders["chat"], "--prompt", "a", "--out", str(one), *SHORT).out
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": ""}) + "\n")
    told = run(capsys, "generate", folders["chat"], "--file", str(empty)).err
    assert "column 'prompt' is empty" in told and "task." not in told  # there is no such setting here
    generator = open_generator(folders["chat"], {"x": folders["adapter"]}, device="cpu")
    chats = [[Message("system", "Be short."), Message("user", "naïve")], [Message(**turn) for turn in turns]]
    answers = [generator.answer(chat, Sampling(max_new_tokens=4)).text for chat in chats]
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [
        {"messages": [m._asdict() for m in chat], "answer": answer, "stop": "length", "tokens": 4}
        for chat, answer in zip(chats, answers, strict=True)
    ]
    again = run(capsys, "generate", folders["chat"], *words, *SHORT)
    assert again.status == 2 and "answers.jsonl: is there already" in again.err


def test_standard_input_is_one_prompt_or_one_a_line(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` takes all of it, `--file -` a line at a time."""
    generator = open_generator(folders["plain"], device="cpu")
    whole = generator.answer("Blue\nwaves", Sampling(max_new_tokens=4)).text
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Blue\nwaves\n")))
    assert run(capsys, "generate", folders["plain"], "-", *SHORT).out == f"{whole}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Blue\nwaves\n")))
    assert run(capsys, "generate", folders["plain"], "--file", "-", *SHORT).out.startswith("> Blue\n")


def test_a_chat_on_a_terminal(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are read from standard input until it ends; the adapter is called after its run."""
    monkeypatch.setattr(sys, "stdin", Typed("/adapters\nHi\n/adapter none\n"))
    ended = run(capsys, "generate", folders["chat"], "--adapter", folders["adapter"], *SHORT)
    generator = open_generator(folders["chat"], {"x": folders["adapter"]}, device="cpu")
    answer = generator.answer([Message("user", "Hi")], Sampling(max_new_tokens=4)).text
    assert ended.status == 0 and f"* mine\n  none (the base alone)\n> {answer}\n> the base alone answers" in ended.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--prompt", "a", "--file", "b"), "--prompt and --file exclude each other"),
        (("--prompt", "a", "-"), "--prompt and - exclude each other"),
        (("what",), "what: a prompt is given as --prompt TEXT"),
        ((), "give --prompt TEXT, --file F, - for one prompt from standard input, or --file - for one a line"),
        (("--prompt", " "), "--prompt: the prompt is empty"),
        (("--prompt", "a b c " * 60), "--prompt: the prompt is"),
        (("--prompt", "a", "--chat"), "the model's tokenizer has no chat template"),
        (("--prompt", "a", "--system", "b"), "--system has its place in a chat template"),
        (("--prompt", "a", "--temperature", "-1"), "--temperature = -1.0: give a number, at least 0"),
        (("--prompt", "a", "--temperature", "hot"), "'hot' is not a number"),
        (("--prompt", "a", "--beams", "2.5"), "'2.5' is not a whole number"),
        (("--prompt", "a", "--seed", "5"), "seed = 5: has no effect, since this model takes the likeliest"),
        (("--prompt", "a", "--device", "tpu"), "device = 'tpu'"),
        (("--prompt", "a", "--dtype", "int8"), "int8"),
        (("--prompt", "a", "--adapter", "/nowhere"), "/nowhere: there is no such folder"),
        (("--prompt", "a", "--adapter", "a=x", "--adapter", "b=y"), "several adapters are for a chat"),
        (("--prompt", "a", "--adapter", "x/adapter", "--adapter", "y/x"), "two are called 'x'; give them names"),
        (("--prompt", "a", "--adapter", "=y"), "an adapter's name is a text"),
        (("--file", "/nowhere.txt"), "--file /nowhere.txt: there is no such file"),
        (("--file", "/nowhere.csv"), "--file /nowhere.csv: there is no such file"),
        (("--file", "/"), "--file /: is a folder; give a file"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: tuple[str, ...],
    error: str,
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ended = run(capsys, "generate", folders["plain"], *words)
    last = ended.err.strip().splitlines()[-1]
    assert ended.status == 2 and last.startswith("trimtab: ") and error in last and ended.out == ""


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens = 0: give a whole number, at least 1"),
        (("--top-p", "1.5"), "--top-p = 1.5: give a number above 0, at most 1"),
        (("--top-k", "-1"), "--top-k = -1"),
        (("--temperature", "nan"), "--temperature = nan"),
        (("--repetition-penalty", "0"), "--repetition-penalty = 0.0"),
        (("--beams", "0"), "--beams = 0"),
        (("--seed", "-1"), "--seed = -1"),
        (("--seed", "1"), "give a temperature, --top-p or --top-k\n"),
        (("--device", "tpu"), "device = 'tpu'"),
        (("--adapter", "/nowhere"), "/nowhere: there is no such folder"),
        (("--out", "{folder}"), "is a folder; name a new file, such as"),
        (("--out", "{folder}/none/a.jsonl"), "there is no folder"),
    ],
)
def test_what_needs_no_weights_is_found_before_they_are_read(
    words: tuple[str, ...],
    error: str,
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("trimtab.generate.open.load_for_generation", read)
    given = [word.format(folder=tmp_path) for word in words]
    ended = run(capsys, "generate", folders["plain"], "--prompt", "a", *given)
    assert ended.status == 2 and error in ended.err


def test_a_base_without_a_tokenizer_is_told_in_words_of_this_command(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no setting model.tokenizer here."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(folders["plain"]) / name)
    ended = run(capsys, "generate", str(tmp_path), "--prompt", "a")
    assert ended.status == 2 and "BASE: the tokenizer of" in ended.err and "model.tokenizer" not in ended.err


def test_an_adapter_is_named_after_its_folder_or_its_run(tmp_path: Path) -> None:
    """A name may be given; a path that holds an equals sign is a path where it exists."""
    odd = tmp_path / "lr=3"
    odd.mkdir()
    assert _named_folders(["runs/first/adapter", "b=runs/second/adapter", "third/"]) == {
        "first": Path("runs/first/adapter"),
        "b": Path("runs/second/adapter"),
        "third": Path("third"),
    }
    assert _named_folders([str(odd)]) == {"lr=3": odd}
