"""The chat on a terminal, with a fake one: turns, commands, what is forgotten, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chats_for_tests import CHATML, MISTRAL
from generate_for_tests import METHODS, save_adapter, save_llama
from transformers import AutoModelForCausalLM

from trimtab.errors import ConfigError, DataError
from trimtab.generate import Conversation, Generator, Message, Sampling, open_generator

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base with a chat template and two adapters."""
    path = tmp_path_factory.mktemp("models")
    found = {"base": save_llama(path / "base", CHATML, max_position_embeddings=160)}
    model = AutoModelForCausalLM.from_pretrained(found["base"])
    for seed, name in enumerate("ab"):
        found[name] = save_adapter(model, METHODS["lora"], path / name, seed)
    return found


@pytest.fixture
def generator(folders: dict[str, str]) -> Generator:
    return open_generator(folders["base"], {name: folders[name] for name in "ab"}, device="cpu")


class Terminal:
    """Lines that somebody types, exceptions that the terminal raises, and what is shown."""

    def __init__(self, lines: Iterable[Any], shown: Callable[[str], None] = lambda text: None) -> None:
        self.lines: Iterator[Any] = iter(lines)
        self.shown: list[str] = []
        self._also = shown

    def read(self, prompt: str) -> str:
        self.shown.append(prompt)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def write(self, text: str) -> None:
        self.shown.append(text)
        self._also(text)

    @property
    def text(self) -> str:
        return "".join(self.shown)


def talk(generator: Generator, *lines: Any, sampling: Sampling = SHORT, **settings: Any) -> tuple[Conversation, str]:
    """A chat of these lines, and what was shown."""
    terminal = Terminal(lines)
    chat = Conversation(generator, sampling, read=terminal.read, write=terminal.write, **settings)
    chat.run()
    return chat, terminal.text


def test_what_was_said_is_remembered(generator: Generator) -> None:
    """Each answer is the model's to all turns before it, with the system prompt; it is shown as it is made."""
    chat, shown = talk(generator, "Hi", "", "//Who?", system="Be short.")
    system = Message("system", "Be short.")
    first = generator.answer([system, Message("user", "Hi")], SHORT).text
    turns = [Message("user", "Hi"), Message("assistant", first), Message("user", "/Who?")]
    second = generator.answer([system, *turns], SHORT).text
    assert chat.history == [*turns, Message("assistant", second)]
    assert f"> {first}\n" in shown and shown.endswith(f"> {second}\n> \n")


def test_adapters_are_switched(generator: Generator) -> None:
    """Each answers for itself, and none is the base; a wrong name lists the right ones and changes nothing."""
    sampling, answers = SHORT, {}
    for name in ("a", "b", "none"):
        chat, _ = talk(generator, f"/adapter {name}", "Hi")
        answers[name] = chat.history[-1].content
    for name in ("a", "b", None):
        generator.use(name)
        assert answers[name or "none"] == generator.answer([Message("user", "Hi")], sampling).text
    assert len(set(answers.values())) == 3
    _, shown = talk(generator, "/adapter b", "/adapter c", "/adapter", "/adapters")
    assert "b answers\n" in shown
    assert "error: no adapter is called 'c'; those on the model: a, b (none is the base alone)\n" in shown
    assert "error: /adapter wants a name" in shown
    assert "  a\n* b\n  none (the base alone)\n" in shown and generator.active == "b"


def test_commands(generator: Generator) -> None:
    """System prompts come and go, what was said is forgotten, unknown commands are named, /quit leaves."""
    chat, shown = talk(generator, "Hi", "/system Rhyme.", "/help", "/nonsense", "/reset", "Ho", "/quit", "never read")
    assert chat.system == "Rhyme." and chat.history[0].content == "Ho" and len(chat.history) == 2
    assert "the system prompt is set" in shown and "/adapter NAME" in shown and "forgotten\n" in shown
    assert "error: there is no command /nonsense; /help lists them" in shown
    assert (
        chat.history[-1].content == generator.answer([Message("system", "Rhyme."), Message("user", "Ho")], SHORT).text
    )
    chat, shown = talk(generator, "/system", system="Rhyme.")
    assert chat.system is None and "there is no system prompt" in shown


def test_the_oldest_turns_are_forgotten_when_positions_end(generator: Generator) -> None:
    """It says how many; the system prompt stays, and a message that is too long alone changes nothing."""
    lines = [f"Question {n}: what is it?" for n in range(9)]
    chat, shown = talk(generator, *lines, "a b c " * 60, system="Be short.")
    assert "(the 2 oldest messages are forgotten: the model has 160 positions)" in shown
    assert chat.history[0].role == "user" and chat.history[0].content != lines[0]
    assert len(chat.history) > 2 and chat.history[-2].content == lines[-1]
    assert "error: the prompt is" in shown and "the model has 160 positions" in shown
    kept = generator.encode([Message("system", "Be short."), *chat.history[:-1]], chat=True)
    assert len(kept) + 4 <= 160


def test_an_answer_that_fills_the_positions_says_so(generator: Generator) -> None:
    _, shown = talk(generator, "Hi", sampling=Sampling(max_new_tokens=400))
    assert shown.endswith("\n(the model has no positions left)\n> \n")


def test_ctrl_c_ends_the_answer_and_not_the_chat(generator: Generator) -> None:
    """What is there of the answer stays; at the prompt it says how to leave; the handler is given back."""
    before = signal.getsignal(signal.SIGINT)
    count = 0

    def interrupt(text: str) -> None:
        nonlocal count
        if answering and text.strip():
            count += 1
            if count == 2:
                signal.raise_signal(signal.SIGINT)

    answering = True
    terminal = Terminal(["Hi", KeyboardInterrupt(), "/adapters"], interrupt)
    chat = Conversation(generator, Sampling(max_new_tokens=60), read=terminal.read, write=terminal.write)
    chat.run()
    whole = generator.answer([Message("user", "Hi")], Sampling(max_new_tokens=60)).text
    assert 0 < len(chat.history[-1].content) < len(whole) and whole.startswith(chat.history[-1].content)
    assert "Ctrl-D or /quit ends the chat" in terminal.text and "* a" in terminal.text
    assert signal.getsignal(signal.SIGINT) is before


def test_what_could_not_be_answered_was_not_said(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of an answer leaves the chat as it was before."""
    with monkeypatch.context() as patch:
        patch.setattr(generator, "answer", lambda *_, **__: (_ for _ in ()).throw(ConfigError("no memory")))
        chat, shown = talk(generator, "Hi")
    assert "error: no memory" in shown and chat.history == []


def test_without_a_template_each_line_stands_alone(tmp_path: Path) -> None:
    """The model goes on from it as it is; a system prompt has no place, and --chat is an error."""
    generator = open_generator(save_llama(tmp_path / "base"), device="cpu")
    chat, shown = talk(generator, "The capital", "The capital", "/system Rhyme.")
    answer = generator.answer("The capital", SHORT).text
    assert shown.count(f"> {answer}\n") == 2 and chat.history == []
    assert "no chat template is in use" in shown and "error: a system prompt has its place in a chat template" in shown
    with pytest.raises(ConfigError, match="no chat template"):
        talk(generator, chat=True)
    with pytest.raises(ConfigError, match="a system prompt has its place"):
        talk(generator, system="Rhyme.")


def test_a_system_prompt_that_the_template_refuses_is_not_set(tmp_path: Path) -> None:
    generator = open_generator(save_llama(tmp_path / "base", MISTRAL), device="cpu")
    chat, shown = talk(generator, "/system Rhyme.", "Hi")
    assert "error: the chat template refuses the chat" in shown and chat.system is None and len(chat.history) == 2
    with pytest.raises(DataError, match="refuses the chat"):
        talk(generator, system="Rhyme.")
