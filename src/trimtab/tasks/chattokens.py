"""The tokens of a chat, and which of them are learned: the assistant's answers, each with the token that ends it.

A chat is rendered by the tokenizer's own template and tokenised once, as a whole, since pieces that are tokenised
apart need not give the tokens of the whole. An answer's place in the text is all that stands between

    P  the chat up to the answer, with the generation prompt: what the model is given when it answers, and
    E  the end-of-turn token, the first special token that follows the answer's words in the chat up to its turn.

Where the text up to E is not how the whole chat begins (a template that drops an answer's thoughts once a question
follows), nobody could answer from what was learned, and that is an error. A template with `{% generation %}` marks
says itself what is learned.

Rendering is the cost, a chat of T answers takes 2T of them. Templates are nearly all alike for chats of the same
roles, so a chat of placeholders is rendered in full once for each sequence of roles; where a real chat, rendered
once, is letter by letter that text with its own words in the places, the places are known. Else it goes the long way.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from trimtab.errors import DataError
from trimtab.tasks.base import Message

#: Token ids of a chat, and for each whether it is learned.
Encoded = tuple[list[int], list[bool]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_AT_ONCE = 512  # chats rendered and tokenised together: enough for all cores, and little memory


class _Span(NamedTuple):
    """Characters [start, stop) of a text."""

    start: int
    stop: int


def encode_chat(tokenizer: Any, messages: Sequence[Message], *, template: bool | None = None) -> Encoded:
    """The token ids of a chat and which of them are learned.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        messages: the turns; at least one answer of the assistant, and something before it.
        template: render with the tokenizer's chat template, or else in the form of `plain_chat`, after the tokens that
            the tokenizer begins a text with (bos, where it has one). None: with the template where there is one.

    Returns:
        All ids, none added or cut off, and as many flags. A special token that is written out in a message is read as
        that token, as by `apply_chat_template`. A token that lies across the edge of an answer is learned.

    Raises:
        DataError: there is no template, it refuses the chat or changes earlier turns when later ones come, it marks no
            answer; without a template, the tokenizer has no end-of-text token.
    """
    return ChatEncoder(tokenizer, template=template).encode([messages])[0]


def encode_chats(tokenizer: Any, chats: Sequence[Sequence[Message]], *, template: bool | None = None) -> list[Encoded]:
    """As `encode_chat` for the messages of many chats, a few times faster; an error says which chat it was.

    Raises:
        DataError: as `encode_chat`.
    """
    return ChatEncoder(tokenizer, template=template).encode(chats)


def plain_chat(messages: Sequence[Message], eos: str) -> str:
    """A chat as text without a template, up to the end of its last answer or, for a prompt, of its last message.

    A question and its answer stand together as they are, with a blank between them where neither brings white space;
    the blank belongs to the answer. `eos` follows each answer, and nothing follows `eos`. Other messages that come one
    after another (a system prompt and a question) have an empty line between them:

        SYSTEM

        QUESTION ANSWER<eos>QUESTION ANSWER<eos>

    So a prompt is a text that the model goes on from, as a plain language model does.
    """
    return _plain(messages, eos)[0]


def encode_prompt(tokenizer: Any, messages: Sequence[Message], *, template: bool | None = None) -> list[int]:
    """The token ids that an answer to these messages goes on from: the same as stand before it in `encode_chat`.

    Raises:
        DataError: there is no template, or it refuses the chat.
    """
    if template or (template is None and tokenizer.chat_template):
        text, lead = _Template(tokenizer).render(messages, prompt=True).text, []
    else:
        text, lead = plain_chat(messages, tokenizer.eos_token or ""), text_beginning(tokenizer)
    return lead + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token by which the tokenizer's chat template ends an answer; None where it has none."""
    messages = [Message("user", "a"), Message("assistant", "b")]
    try:
        ids, learned = encode_chat(tokenizer, messages, template=True)
    except DataError:
        return None
    last = max((number for number, is_learned in enumerate(learned) if is_learned), default=None)
    return ids[last] if last is not None and ids[last] in tokenizer.all_special_ids else None


class ChatEncoder:
    """`encode_chats` in pieces: what was learned of the template's chats of each sequence of roles is kept.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: as for `encode_chat`.

    Raises:
        DataError: as `encode_chat`, as far as the tokenizer alone shows it.
    """

    def __init__(self, tokenizer: Any, *, template: bool | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("the tokenizer has no fast form (tokenizer.json), which the places of answers need")
        self._tokenizer = tokenizer
        # Without transformers around it a third faster, and so without what that resets at each call.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._lead: list[int] = []
        self._skeletons: dict[tuple[str, ...], _Skeleton | None] = {}
        self._template: _Template | None = None
        if template or (template is None and tokenizer.chat_template):
            self._template = _Template(tokenizer)
        else:
            if tokenizer.eos_token is None:
                raise DataError("the tokenizer has no end-of-text token to end an answer with; set its eos_token")
            self._lead = text_beginning(tokenizer)

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[Encoded]:
        """The ids and flags of each chat."""
        return list(self.each(chats))

    def each(self, chats: Sequence[Sequence[Message]]) -> Iterator[Encoded]:
        """The ids and flags of one chat after the other: as lists, all of many chats would take 40 bytes a token."""
        for first in range(0, len(chats), _AT_ONCE):
            group = [tuple(messages) for messages in chats[first : first + _AT_ONCE]]
            located = self._located(group, first, len(chats))
            tokens = self._backend.encode_batch([text for text, _ in located], add_special_tokens=False)
            for (_, spans), found in zip(located, tokens, strict=True):
                learned = _inside(found.offsets, spans)
                yield self._lead + found.ids, [False] * len(self._lead) + learned

    def _located(
        self, group: Sequence[tuple[Message, ...]], first: int, total: int
    ) -> list[tuple[str, tuple[_Span, ...]]]:
        """The text of each chat and where its answers stand."""
        rendered = self._template.render_all(group) if self._template else [None] * len(group)
        located = []
        for number, (messages, text) in enumerate(zip(group, rendered, strict=True), start=first):
            try:
                located.append(self._locate(messages, text))
            except DataError as error:
                raise error if total == 1 else DataError(f"chat {number + 1} of {total}: {error}") from error
        return located

    def _locate(self, messages: tuple[Message, ...], text: _Rendered | None) -> tuple[str, tuple[_Span, ...]]:
        if not any(message.role == "assistant" for message in messages):
            raise DataError("the chat has no answer of the assistant")
        if messages[0].role == "assistant":
            raise DataError("the chat begins with an answer; put the message before it that is answered")
        if self._template is None:
            return _plain(messages, self._tokenizer.eos_token)
        if text is None:  # the batch had a chat that the template refuses; alone, this one may be
            text = self._template.render(messages)
        if self._template.marked:
            if not text.marks:
                raise DataError("the chat template's {% generation %} marks are around none of the answers")
            return text.text, text.marks
        roles = tuple(message.role for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = _skeleton(self._template, roles)
        skeleton = self._skeletons[roles]
        spans = skeleton.places(text.text, messages) if skeleton else None
        return text.text, _spans(self._template, messages, text.text) if spans is None else spans


class _Rendered(NamedTuple):
    """A rendered chat, and what its template's generation marks enclose."""

    text: str
    marks: tuple[_Span, ...] = ()


class _Template:
    """A tokenizer's chat template.

    Attributes:
        marked: whether it has generation marks.
        ends: what may end a turn, the tokens that surely do so first.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template")
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError as error:  # several templates by name, and none is the default
            raise DataError(f"the tokenizer's chat template cannot be chosen: {_first_line(error)}") from error
        self._tokenizer = tokenizer
        self.marked = _MARKS.search(self._source) is not None
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        others = {token.content for token in added if token.content.strip()} - special
        self.ends = [_any_of(words) for words in (special, others) if words]

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> _Rendered:
        """The text of a chat; with `prompt`, and the beginning of the answer to it."""
        return self._render([messages], prompt)[0]

    def render_all(self, chats: Sequence[Sequence[Message]]) -> Sequence[_Rendered | None]:
        """The texts of many chats; None for all of them if the template refuses one."""
        try:
            return self._render(chats, prompt=False)
        except DataError:
            return [None] * len(chats)

    def _render(self, chats: Sequence[Sequence[Message]], prompt: bool) -> list[_Rendered]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        turns = [[{"role": role, "content": content} for role, content in messages] for messages in chats]
        try:
            texts, marks = render_jinja_template(
                turns,
                chat_template=self._source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marked,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the chat: {_first_line(error)}") from error
        if not self.marked:
            return [_Rendered(text) for text in texts]
        return [
            _Rendered(text, tuple(_Span(a, b) for a, b in spans if a < b))
            for text, spans in zip(texts, marks, strict=True)
        ]


def _spans(template: _Template, messages: Sequence[Message], whole: str) -> tuple[_Span, ...]:
    """Where the answers stand in a rendered chat, from the chat up to each of them and through each of them."""
    spans = []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = template.render(messages[:number], prompt=True).text
        after = whole if number + 1 == len(messages) else template.render(messages[: number + 1]).text
        if not after.startswith(before):
            raise DataError(
                f"message {number + 1}: the chat template's generation prompt (it ends in {before[-30:]!r}) is not how "
                "the template begins that answer, so what is learned would not be what is asked for; give the "
                "template {% generation %} marks, or one that has the answers as they are"
            )
        stop = _end_of_turn(template, after, len(before), message.content)
        if not whole.startswith(after[:stop]):
            raise DataError(
                f"message {number + 1}: the chat template changes this answer, or what is before it, when later "
                "messages follow (as templates do that drop earlier thoughts), so the model would learn from a chat "
                "that it never sees when it answers; cut such chats after their first answer, or give the template "
                "{% generation %} marks"
            )
        spans.append(_Span(len(before), stop))
    return tuple(spans)


def _end_of_turn(template: _Template, text: str, start: int, answer: str) -> int:
    """Where the turn that begins at `start` ends: after the first special token behind the answer's words.

    A template that sets none ends the turn with its text.
    """
    words = answer.strip()
    place = text.find(words, start)
    behind = start if place < 0 else place + len(words)
    for ends in template.ends:
        if found := ends.search(text, behind):
            return found.end()
    return len(text)


@dataclass(frozen=True)
class _Skeleton:
    """How a template renders chats of one sequence of roles.

    Attributes:
        pieces: what stands before, between and after the messages' words.
        edges: for each message that is an answer, how far before its words and how far behind them its span reaches.
    """

    pieces: tuple[str, ...]
    edges: tuple[tuple[int, int] | None, ...]

    def places(self, text: str, messages: Sequence[Message]) -> tuple[_Span, ...] | None:
        """Where the answers stand; None if the text is not the pieces around the messages' words."""
        if not text.startswith(self.pieces[0]):
            return None
        at, spans = len(self.pieces[0]), []
        for (_, content), piece, edges in zip(messages, self.pieces[1:], self.edges, strict=True):
            for words in (content, content.strip()):  # many templates trim
                end = at + len(words)
                if text.startswith(words, at) and text.startswith(piece, end):
                    break
            else:
                return None
            if edges is not None:
                spans.append(_Span(at - edges[0], end + edges[1]))
            at = end + len(piece)
        return tuple(spans) if at == len(text) else None


def _skeleton(template: _Template, roles: Sequence[str]) -> _Skeleton | None:
    """The skeleton of chats of these roles; None where the template has none that placeholders show."""
    messages = [Message(role, f"zq{number:05d}qz") for number, role in enumerate(roles)]
    try:
        whole = template.render(messages).text
        spans = iter(_spans(template, messages, whole))
    except DataError:  # the chat itself will raise it, if it is one of that kind
        return None
    pieces, edges, at = [], [], 0
    for role, words in messages:
        place = whole.find(words)
        if place < at or whole.count(words) != 1:
            return None
        pieces.append(whole[at:place])
        at = place + len(words)
        span = next(spans) if role == "assistant" else None
        edges.append((place - span.start, span.stop - at) if span else None)
    return _Skeleton((*pieces, whole[at:]), tuple(edges))


def _plain(messages: Sequence[Message], eos: str) -> tuple[str, tuple[_Span, ...]]:
    """`plain_chat`, and where its answers stand."""
    text, spans, previous = "", [], "assistant"
    for role, content in messages:
        if role == "assistant":
            blank = "" if text[-1:].isspace() or content[:1].isspace() else " "
            start = len(text)
            text += f"{blank}{content}{eos}"
            spans.append(_Span(start, len(text)))
        else:
            text += content if previous == "assistant" else f"\n\n{content}"
        previous = role
    return text, tuple(spans)


def text_beginning(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text of its own accord."""
    bare, dressed = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[_Span]) -> list[bool]:
    """For each token whether any of its characters is in a span; offsets rise."""
    learned = [False] * len(offsets)
    for start, stop in spans:
        first = bisect_right(offsets, start, key=itemgetter(1))
        last = bisect_left(offsets, stop, key=itemgetter(0))
        learned[first:last] = [True] * (last - first)
    return learned


def _any_of(words: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
