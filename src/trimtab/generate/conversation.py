"""A chat on a terminal: turns, commands that begin with a slash, and Ctrl-C, which ends an answer and not the chat."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from trimtab.errors import ConfigError, TrimtabError
from trimtab.generate.generator import Asked, Generator, Sampling
from trimtab.tasks.base import Message

HELP = """\
/adapter NAME   let this adapter answer from now on; /adapter none: the base alone
/adapters       the adapters there are
/system TEXT    the system prompt from now on; without TEXT there is none, or that of the run's task
/reset          forget what was said
/quit           leave (or Ctrl-D)
/help           this list
Ctrl-C ends an answer. A line that is meant to begin with a slash begins with two."""


class Conversation:
    """A chat with a model, which remembers what was said.

    Without a chat template each line is a prompt of its own that the model goes on from.

    Args:
        generator: the model.
        sampling: how tokens are chosen.
        read: gives the next line, as `input` does: EOFError ends the chat.
        write: gets all that is shown, without a line's end of its own.
        system: the system prompt.
        chat: use the chat template; None: where there is one.

    Attributes:
        history: the turns so far, without the system prompt.
        system: the system prompt that was set; None leaves it to the generator.

    Raises:
        ConfigError: a template or a system prompt is asked for, and the model has no template.
        DataError: the template refuses the system prompt.
    """

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        *,
        read: Callable[[str], str],
        write: Callable[[str], object],
        system: str | None = None,
        chat: bool | None = None,
    ) -> None:
        self.generator, self.sampling = generator, sampling
        self._read, self._write = read, write
        self._chat, self._asked = generator.chats if chat is None else chat, chat
        self.history: list[Message] = []
        self.system: str | None = None
        self._stopped = False
        if chat:
            generator.encode("a", chat=True)
        if system is not None:
            self._set_system(system)

    def run(self) -> None:
        """Talk until the input ends."""
        self._say("/help lists the commands, Ctrl-D ends the chat")
        if not self._chat and self.generator.task is not None:
            self._say(f"each line by itself is a source of the task {self.generator.task.name}; none is remembered")
        elif not self._chat:
            self._say("no chat template is in use: the model goes on from each line by itself, and remembers none")
        while True:
            try:
                line = self._read("> ")
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit ends the chat")
                continue
            if not line.strip():
                continue
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self._command(line) == "quit":
                        return
                else:
                    self._turn(line[1:] if line.startswith("//") else line)
            except TrimtabError as error:
                self._say(f"error: {error}")

    def _say(self, text: str) -> None:
        self._write(f"{text}\n")

    # -- commands ------------------------------------------------------------------------------

    def _command(self, line: str) -> str:
        """Do what a line with a slash says; the command's name."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name == "adapter":
            self._use(rest)
        elif name == "adapters":
            self._list()
        elif name == "system":
            self._set_system(rest or None)
            none = (
                "there is no system prompt" if self.generator.system is None else "the system prompt is the task's own"
            )
            self._say("the system prompt is set" if rest else none)
        elif name == "reset":
            self.history.clear()
            self._say("forgotten")
        elif name == "help":
            self._say(HELP)
        elif name != "quit":
            raise ConfigError(f"there is no command /{name}; /help lists them")
        return name

    def _use(self, name: str) -> None:
        if not name:
            raise ConfigError("/adapter wants a name: /adapter NAME, or /adapter none for the base alone")
        self.generator.use(None if name == "none" else name)
        self._say("the base alone answers" if name == "none" else f"{name} answers")

    def _list(self) -> None:
        active = self.generator.active
        for name in [*self.generator.adapters, None]:
            self._say(f"{'*' if name == active else ' '} {name or 'none (the base alone)'}")

    def _set_system(self, text: str | None) -> None:
        if text is not None:
            if not self._chat:
                raise ConfigError(
                    "a system prompt has its place in a chat template, and none is in use; put it into the prompt"
                )
            self.generator.encode([Message("system", text), Message("user", "a")], chat=True)  # some refuse one
        self.system = text

    # -- turns ---------------------------------------------------------------------------------

    def _turn(self, line: str) -> None:
        asked: Asked = line
        if self._chat:
            self._remember(Message("user", line))
            asked = self._messages(self.history)
        try:
            with self._interruptible():
                answer = self.generator.answer(
                    asked, self.sampling, chat=self._asked, write=self._write, stopped=lambda: self._stopped
                )
        except BaseException:
            del self.history[-1:]  # what was not answered was not said
            raise
        self._write("\n")
        if answer.stop == "positions":
            self._say("(the model has no positions left)")
        if self._chat:
            self.history.append(Message("assistant", answer.text))

    def _messages(self, history: list[Message]) -> list[Message]:
        return [*([Message("system", self.system)] if self.system is not None else []), *history]

    def _remember(self, message: Message) -> None:
        """Add a message; turns are dropped from the beginning until the rest leaves positions for an answer.

        Raises:
            ConfigError: the message alone has too many tokens; then nothing is changed.
            DataError: the template refuses the chat; likewise.
        """
        positions = self.generator.positions
        history = [*self.history, message]
        self.generator.room(self.generator.encode(self._messages([message]), chat=True))
        while positions is not None and len(history) > 1:
            ids = self.generator.encode(self._messages(history), chat=True)
            if len(ids) + self.generator.reserve(self.sampling) <= positions:
                break
            del history[:2]
        if dropped := len(self.history) + 1 - len(history):
            self._say(f"(the {dropped} oldest messages are forgotten: the model has {positions} positions)")
        self.history = history

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Within, Ctrl-C ends the answer after the token that is being made; a second one raises."""
        self._stopped = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stopped:
                raise KeyboardInterrupt
            self._stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
