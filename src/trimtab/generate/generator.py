"""Writing with a model: prompts and chats in, text out, with one of several adapters at work."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from trimtab.errors import ConfigError
from trimtab.methods import activate, adapters, load_adapter
from trimtab.nn.virtual import position_limit
from trimtab.quiet import quiet_libraries
from trimtab.settings import check_whole
from trimtab.tasks.base import Message, Task, Written
from trimtab.tasks.chattokens import encode_prompt, end_of_turn, plain_chat
from trimtab.tasks.encode import Encoder

#: Tokens of an answer, where neither the user nor the model says how many.
MAX_NEW_TOKENS = 256
#: Of a prompt, which is measured against the model's positions later, and not cut.
_ANY_LENGTH = 2**62
#: Why an answer ended: by itself, after `max_new_tokens`, for want of positions, because somebody stopped it.
Stop = Literal["end", "length", "positions", "interrupted"]
#: What is answered: a text that is gone on from, or the messages of a chat.
Asked = str | Sequence[Message]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves it to the model's generation config, and what that does not say to us.

    Attributes:
        max_new_tokens: of an answer; at last 256.
        temperature: 0 takes the likeliest token each time. Without it, and without `top_p` and `top_k`, the model's
            config says whether tokens are drawn; at last they are not.
        top_p: draw from the likeliest tokens that have this share together.
        top_k: draw from this many of the likeliest tokens; 0 from all.
        repetition_penalty: above 1, tokens that were there already become less likely.
        beams: of a beam search; 1 is none.
        seed: of what is drawn, anew for each answer; None draws another each time.

    Raises:
        ConfigError: a value is out of range, or has no effect beside another.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    beams: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("beams", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        _check_number("temperature", self.temperature, "a number, at least 0", lambda x: x >= 0)
        _check_number("top_p", self.top_p, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        _check_number("repetition_penalty", self.repetition_penalty, "a number above 0", lambda x: x > 0)
        if self.seed is not None and self.seed >= 2**63:
            raise ConfigError(f"seed = {self.seed}: give a number below 2^63")
        if self.temperature == 0:
            for name in ("top_p", "top_k", "seed"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} = {getattr(self, name)}: has no effect with temperature = 0, which draws nothing; "
                        "drop one of them"
                    )

    def arguments(self) -> dict[str, Any]:
        """What `generate` is given; the model's generation config holds for the rest."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": self.beams,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        if self.temperature == 0:
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if {"temperature", "top_p", "top_k"} & set(chosen):
            chosen["do_sample"] = True
        return chosen

    def check(self, stored: Any) -> None:
        """Refuse a seed for what is not drawn.

        Args:
            stored: the model's generation config.

        Raises:
            ConfigError: as said.
        """
        if self.seed is not None and not self.arguments().get("do_sample", getattr(stored, "do_sample", False)):
            raise ConfigError(
                f"seed = {self.seed}: has no effect, since this model takes the likeliest token each time; give a "
                "temperature, top_p or top_k"
            )


class Answer(NamedTuple):
    """What a model wrote: the text without special tokens, how many tokens it took, and why it ended."""

    text: str
    tokens: int
    stop: Stop


class Generator:
    """A model, its tokenizer, and the adapters on it.

    Args:
        model: a causal or an encoder-decoder model of transformers.
        tokenizer: its tokenizer.
        task: what the model was fine-tuned for: a text is given to it as this task gives a source. None for others.
        raw: give texts as they stand, with neither the task's prompt nor, unless it is asked for, a chat template.

    Attributes:
        system: the system prompt of chats that bring none, as the task has it; None for none.
        chats: whether chats are put into the tokenizer's chat template where nothing else is said: there is one, and
            the model was not fine-tuned for something else.
        task: the task whose prompt is put around a text; None for none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, task: Task | None = None, *, raw: bool = False) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._templated = bool(tokenizer.chat_template)
        self.chats = self._templated and not raw and (task is None or task.form == "chat")
        self.task = task if task is not None and task.has_sources and not raw else None
        self.system = None if task is None or raw else task.system_prompt
        self._pair = bool(model.config.is_encoder_decoder)
        stored = getattr(model, "generation_config", None)
        ends = getattr(stored, "eos_token_id", None)
        self._max_new = getattr(stored, "max_new_tokens", None) or MAX_NEW_TOKENS
        own = ends if isinstance(ends, list) else [ends]
        # A base model's config does not know the end of a turn, which an adapter for chats has learned.
        turn = end_of_turn(tokenizer) if self._templated else None
        self._ends = sorted({int(end) for end in (*own, tokenizer.eos_token_id, turn) if end is not None})
        model.eval()

    # -- adapters ------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return list(adapters(self.model))

    @property
    def active(self) -> str | None:
        """The adapter at work; None for the base alone."""
        mine = adapters(self.model)
        name = next(iter(mine.values())).record.active if mine else ""
        return name or None

    def load(self, name: str, path: str | Path) -> None:
        """Put an adapter folder on the model, and let it be at work.

        Raises:
            CheckpointError: the folder cannot be used, or is of another base.
            ConfigError: the name is taken, or the adapters would change the same base.
        """
        if name == "none":
            raise ConfigError("an adapter called 'none' could not be told from the base alone; give it another name")
        load_adapter(self.model, path, name=name)
        self.model.eval()

    def use(self, name: str | None) -> None:
        """Let this adapter be at work, or with None the base alone.

        Raises:
            ConfigError: no adapter has that name.
            CannotDetach: the one at work wrote into the base.
        """
        if name is not None and name not in self.adapters:
            there = ", ".join(self.adapters) or "there is none"
            raise ConfigError(f"no adapter is called {name!r}; those on the model: {there} (none is the base alone)")
        activate(self.model, name)

    # -- writing -------------------------------------------------------------------------------

    @property
    def positions(self) -> int | None:
        """Tokens that prompt and answer together may have (of an encoder-decoder each); None for no limit."""
        limit = position_limit(self.model)
        at_work = adapters(self.model).get(self.active or "")
        return limit if limit is None else limit - (at_work.config.virtual_tokens if at_work else 0)

    def encode(self, asked: Asked, *, chat: bool | None = None) -> list[int]:
        """The tokens that an answer goes on from.

        Args:
            asked: a text, or the messages of a chat; these get `system` if they bring no system prompt.
            chat: put it into the model's chat template, a text as the user's message. None: as `chats` says. Outside
                of a template, a text is the source of the task that the model was fine-tuned for, if there is one;
                with False, it has no system prompt before it.

        Raises:
            ConfigError: there is no template, nothing is asked, or the task makes no source of one text.
            DataError: the template refuses the chat.
        """
        if chat and not self._templated:
            raise ConfigError(
                "the model's tokenizer has no chat template; leave --chat out, and the prompt is gone on from as it is"
            )
        texts = [asked] if isinstance(asked, str) else [m.content for m in asked if m.role != "system"]
        if not any(text.strip() for text in texts):
            raise ConfigError("the prompt is empty; give a text")
        template = self.chats if chat is None else chat
        if not isinstance(asked, str) and asked[-1].role == "assistant":
            raise ConfigError("the chat ends with an answer of the assistant; end it with the message to be answered")
        if self.task is not None and isinstance(asked, str) and not template:
            source = Written(self.task.as_source(asked), ())
            return Encoder(self.tokenizer, "pair" if self._pair else "causal", _ANY_LENGTH).prompts([source])[0]
        messages = [Message("user", asked)] if isinstance(asked, str) else list(asked)
        if self.system is not None and messages[0].role != "system" and not (chat is False and isinstance(asked, str)):
            messages.insert(0, Message("system", self.system))
        if self._pair and not template:  # an encoder reads the end of a text, too
            return list(self.tokenizer(plain_chat(messages, self.tokenizer.eos_token or ""))["input_ids"])
        return encode_prompt(self.tokenizer, messages, template=template)

    def room(self, ids: Sequence[int]) -> int | None:
        """How many tokens an answer to a prompt may have; None for no limit.

        Raises:
            ConfigError: not one.
        """
        positions = self.positions
        if positions is None:
            return None
        left = positions if self._pair else positions - len(ids)
        if left < 1 or len(ids) > positions:
            raise ConfigError(
                f"the prompt is {len(ids)} tokens long, and the model has {positions} positions for prompt and answer; "
                "shorten it"
            )
        return left

    def reserve(self, sampling: Sampling) -> int:
        """Tokens that a chat leaves for the next answer: what may be written, and at most a quarter of all."""
        most = sampling.max_new_tokens or self._max_new
        return most if self.positions is None else max(1, min(most, self.positions // 4))

    def answer(
        self,
        asked: Asked,
        sampling: Sampling | None = None,
        *,
        chat: bool | None = None,
        write: Callable[[str], object] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Write an answer.

        Args:
            asked: as for `encode`.
            sampling: how tokens are chosen.
            chat: as for `encode`.
            write: gets the text piece by piece while it is made (all of it at once from a beam search).
            stopped: asked after each token whether to end.

        Raises:
            ConfigError: as `encode`; the prompt leaves no position for an answer; a seed is given and nothing drawn.
            DataError: as `encode`.
        """
        sampling = sampling or Sampling()
        sampling.check(self.model.generation_config)
        ids = self.encode(asked, chat=chat)
        room = self.room(ids)
        most = sampling.max_new_tokens or self._max_new
        written = self._generate(ids, sampling, most if room is None else min(most, room), write, stopped)
        text = str(self.tokenizer.decode(written, skip_special_tokens=True))
        if write is not None and self._beams(sampling) > 1:
            write(text)
        stop: Stop = "interrupted" if stopped() else "length"
        if written and written[-1] in self._ends:
            stop = "end"
        elif stop == "length" and room is not None and room < most:
            stop = "positions"
        return Answer(text, len(written), stop)

    def _beams(self, sampling: Sampling) -> int:
        return sampling.beams or getattr(self.model.generation_config, "num_beams", None) or 1

    @torch.no_grad()
    def _generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        most: int,
        write: Callable[[str], object] | None,
        stopped: Callable[[], bool],
    ) -> list[int]:
        """The tokens of an answer, its end included."""
        device = self.model.get_input_embeddings().weight.device
        given = torch.tensor([list(ids)], device=device)
        settings = sampling.arguments()
        if any(adapter.no_cache for name, adapter in adapters(self.model).items() if name == self.active):
            settings["use_cache"] = False
        streamed = write is not None and self._beams(sampling) == 1
        pad = self.tokenizer.pad_token_id
        with quiet_libraries(), _drawing(sampling.seed, device):
            out = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most,
                eos_token_id=self._ends or None,
                pad_token_id=self._ends[0] if pad is None and self._ends else pad,
                streamer=_Stream(self.tokenizer, write) if streamed and write else None,
                stopping_criteria=StoppingCriteriaList([_Stopping(stopped, device)]),
                **settings,
            )
        # What a decoder begins with is no part of an answer.
        return list(out[0, 1 if self._pair else len(ids) :].tolist())


class _Stopping:
    """Ends an answer when somebody asks for it."""

    def __init__(self, stopped: Callable[[], bool], device: torch.device) -> None:
        self._stopped, self._device = stopped, device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stopped(), dtype=torch.bool, device=self._device)


class _Stream(BaseStreamer):  # type: ignore[misc, unused-ignore]
    """Passes on text as soon as its characters are whole.

    All tokens are decoded each time: a tokenizer may write a token otherwise where it is the first.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written, self._begun = 0, False

    def put(self, value: torch.Tensor) -> None:
        if not self._begun:  # the prompt, or what a decoder begins with
            self._begun = True
            return
        self._ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\ufffd"):
            self._pass(text)

    def end(self) -> None:
        self._pass(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _pass(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


@contextlib.contextmanager
def _drawing(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from this seed within, and as if nothing had been drawn after."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_number(name: str, value: object, what: str, fits: Callable[[float], bool]) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and fits(value)):  # type: ignore[arg-type]
        raise ConfigError(f"{name} = {value!r}: give {what}")
