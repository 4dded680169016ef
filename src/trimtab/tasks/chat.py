"""Instruction tuning: chats, or instructions and their answers, from files of one's own in the layouts of the field.

    messages   messages (or conversations): a list of {role, content} with the roles system, user and assistant
    sharegpt   conversations: a list of {from, value}, from human (user), gpt (assistant, chatgpt) or system
    prompt     prompt, and completion or response
    alpaca     instruction, output, and where there is one an input
    dolly      instruction, response, and where there is one a context

In the last two the user's message is the instruction and, after an empty line, the input or the context. A text in a
column `system` is the chat's system prompt in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from trimtab.errors import DataError
from trimtab.tasks.base import Chat, Example, Form, Message, Prediction
from trimtab.tasks.files import FileTask, Item, same
from trimtab.tasks.rows import Row, Sources, no_column, read_rows, skippable, text_of, told

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
#: What a message may hold beside its role and its words that changes what it means.
_MORE_THAN_WORDS = ("tool_calls", "function_call", "weight")


class ChatTask(FileTask):
    """Chats, of which each answer of the assistant is learned; the loss alone tells.

    Args:
        layout: how the rows hold a chat: see the head of this file. "auto" tells it from the columns, for each file.
        system: a system prompt for the chats that bring none.
    """

    name: Literal["chat"] = "chat"

    layout: Literal["auto", "messages", "prompt", "alpaca", "dolly", "sharegpt"] = "auto"
    system: Annotated[str, Field(min_length=1)] | None = None

    @property
    def form(self) -> Form:
        return "chat"

    @property
    def system_prompt(self) -> str | None:
        return self.system

    def _columns(self) -> list[str]:
        return []

    def _read(self, split: str, source: Sources) -> tuple[list[Item], int]:
        setting = f"task.{split}"
        rows, skipped = read_rows(source, setting, skip_bad=self.skip_bad_rows, layout=self._layout())
        items: list[Item] = []
        seen: dict[str, tuple[str, str]] = {}
        first_bad: DataError | None = None
        for row in rows:
            try:
                if self.layout == "auto":
                    _one_layout(row, seen, setting)
                items.append(self._item(row, setting))
            except DataError as error:
                if not self.skip_bad_rows:
                    raise skippable(error) from error
                first_bad = first_bad or error
                skipped += 1
        if not items:
            why = f": of {skipped} rows none can be used, the first one for this: {first_bad}" if first_bad else ""
            raise DataError(f"{setting}: {told(source)}: there is no chat in it{why}")
        return items, skipped

    def _item(self, row: Row, setting: str) -> Item:
        layout = recognise(row, setting) if self.layout == "auto" else self.layout
        messages = _READERS[layout](row, setting)
        if messages[0].role != "system":
            own = text_of(row, "system", setting, empty=True) if row.values.get("system") is not None else ""
            if system := own if own.strip() else self.system:
                messages.insert(0, Message("system", system))
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise _bad(row, setting, "the chat has no answer of the assistant")
        if answers[0] == 0:
            raise _bad(row, setting, "the chat begins with an answer, and nothing is before it that it answers")
        asked = "\n".join(message.content for message in messages[: answers[-1]] if message.role != "system")
        return Item(row.where, same(asked), Chat(tuple(messages)))

    def _example(self, item: Item, setting: str, labels: Sequence[str]) -> Example:
        example: Chat = item.value
        return example

    def score(self, split: str, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        return {}


def recognise(row: Row, setting: str) -> str:
    """The layout of a row, by its columns; one that holds null is none.

    Raises:
        DataError: no layout has these columns, or two have.
    """
    there = {name for name, value in row.values.items() if value is not None}
    listed = next((name for name in _LISTS if isinstance(row.values.get(name), list)), None)
    if listed is not None:  # such rows often have a copy of the first message in a column `prompt`
        turns = [turn for turn in row.values[listed] if isinstance(turn, Mapping)]
        first = turns[0] if turns else {}
        return "sharegpt" if first.get("from") is not None and first.get("role") is None else "messages"
    fits = [layout for layout, needed in _NEEDED.items() if all(there & set(names) for names in needed)]
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(repr(name) for name in list(row.values)[:20]) or "none"
    if fits:
        raise _bad(row, setting, f"its columns ({columns}) fit the layouts {' and '.join(fits)}; choose by task.layout")
    raise _bad(
        row,
        setting,
        f"its columns ({columns}) are of no known layout: messages or conversations (a list of turns); prompt with "
        "completion or response; instruction with output (Alpaca) or with response (Dolly)",
    )


_LISTS = ("messages", "conversations")
#: By layout, of each group of columns the one that must be there.
_NEEDED = {
    "prompt": (("prompt",), ("completion", "response")),
    "alpaca": (("instruction",), ("output",)),
    "dolly": (("instruction",), ("response",)),
}
_PLACE = re.compile(r"(:\d+|, row \d+)$")


def _one_layout(row: Row, seen: dict[str, tuple[str, str]], setting: str) -> None:
    """Note the layout of a file's first row, and refuse a later one of another."""
    layout, file = recognise(row, setting), _PLACE.sub("", row.where)
    first, where = seen.setdefault(file, (layout, row.where))
    if layout != first:
        raise _bad(
            row,
            setting,
            f"a row of the layout {layout}, in a file whose first ({where}) is of the layout {first}; split the file, "
            "a layout each",
        )


def messages_of(row: Row, setting: str) -> list[Message]:
    """The messages of a row of the layout "messages".

    Raises:
        DataError: there is no such column, or a turn lacks something, has an unknown role or no words.
    """
    return _turns(row, setting, _LISTS, "role", "content", _ROLES)


def _sharegpt(row: Row, setting: str) -> list[Message]:
    return _turns(row, setting, _LISTS[::-1], "from", "value", _SHAREGPT_ROLES)


def _prompt(row: Row, setting: str) -> list[Message]:
    return _pair(row, setting, text_of(row, _column(row, setting, "prompt"), setting), "completion", "response")


def _alpaca(row: Row, setting: str) -> list[Message]:
    return _pair(row, setting, _instruction(row, setting, "input"), "output")


def _dolly(row: Row, setting: str) -> list[Message]:
    return _pair(row, setting, _instruction(row, setting, "context"), "response")


_READERS: dict[str, Callable[[Row, str], list[Message]]] = {
    "messages": messages_of,
    "prompt": _prompt,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "sharegpt": _sharegpt,
}


def _pair(row: Row, setting: str, asked: str, *answers: str) -> list[Message]:
    answer = text_of(row, _column(row, setting, *answers), setting)
    return [Message("user", asked), Message("assistant", answer)]


def _instruction(row: Row, setting: str, more: str) -> str:
    """The instruction and, after an empty line, what it is about."""
    text = text_of(row, _column(row, setting, "instruction"), setting)
    about = text_of(row, more, setting, empty=True) if row.values.get(more) is not None else ""
    return f"{text}\n\n{about}" if about.strip() else text


def _column(row: Row, setting: str, *names: str) -> str:
    """The first of these columns that the row has, with something in it if one has."""
    there = [name for name in names if name in row.values]
    if not there:
        raise no_column(f"{setting}: {row.where}", names[0], row.values)
    return next((name for name in there if row.values[name] is not None), there[0])


def _turns(
    row: Row, setting: str, columns: Sequence[str], role: str, words: str, roles: Mapping[str, str]
) -> list[Message]:
    """The messages of a row with a list of turns, each with these two fields."""
    column = _column(row, setting, *columns)
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else "nothing (null)" if turns is None else type(turns).__name__
        raise _bad(row, setting, f"column {column!r} holds {what}, not a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"{row.where}, turn {number} of {column!r}"
        if not isinstance(turn, Mapping) or role not in turn or words not in turn:
            fields = ", ".join(map(repr, turn)) if isinstance(turn, Mapping) else repr(turn)[:40]
            raise DataError(f"{setting}: {where}: a turn has {role!r} and {words!r}, not {fields or 'nothing'}")
        who = turn[role]
        if not isinstance(who, str) or who not in roles:
            raise DataError(f"{setting}: {where}: the {role} {who!r} is none of {', '.join(roles)}")
        for field in _MORE_THAN_WORDS:
            if turn.get(field) is not None and not (field == "weight" and turn[field] == 1):
                raise DataError(
                    f"{setting}: {where}: {field!r} is not supported: the words of each answer are learned, and no more"
                )
        content = text_of(Row(where, {words: turn[words]}), words, setting, empty=roles[who] == "system")
        if content.strip():  # an empty system prompt is none
            messages.append(Message(roles[who], content))
    if not messages:
        raise _bad(row, setting, "the chat has no words in it")
    return messages


def _bad(row: Row, setting: str, what: str) -> DataError:
    return DataError(f"{setting}: {row.where}: {what}")
