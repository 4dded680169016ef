"""The task of chats: layouts of files, what is refused and where, what is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab.errors import DataError
from trimtab.tasks import Chat, Message, parse_task

ASKED, ANSWER = "Name a colour.", "Blue."
SIMPLE = Chat((Message("user", ASKED), Message("assistant", ANSWER)))


def turns(*pairs: tuple[str, str], role: str = "role", words: str = "content") -> list[dict[str, str]]:
    return [{role: who, words: what} for who, what in pairs]


SIMPLE_TURNS = turns(("user", ASKED), ("assistant", ANSWER))


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, *rows: Any, **settings: Any) -> list[Chat]:
    """The chats of a file with these rows, as the validation split."""
    task = parse_task({"name": "chat", "train": "-", "validation": write(path / "rows.jsonl", *rows), **settings})
    return list(task.load(training=False).splits["validation"])  # type: ignore[arg-type]


ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": SIMPLE_TURNS},
    "messages under conversations": {"conversations": SIMPLE_TURNS},
    "messages with a copy": {"prompt": ASKED, "prompt_id": "1", "messages": SIMPLE_TURNS},
    "completion": {"prompt": ASKED, "completion": ANSWER},
    "response": {"prompt": ASKED, "response": ANSWER, "completion": None},
    "alpaca": {"instruction": ASKED, "input": "", "output": ANSWER, "text": "..."},
    "alpaca without input": {"instruction": ASKED, "output": ANSWER},
    "dolly": {"instruction": ASKED, "context": None, "response": ANSWER, "category": "qa"},
    "dolly in a table with an empty column": {"instruction": ASKED, "output": None, "response": ANSWER},
    "messages of OpenAI": {"messages": [SIMPLE_TURNS[0], {**SIMPLE_TURNS[1], "weight": 1, "tool_calls": None}]},
    "sharegpt": {"id": "7", "conversations": turns(("human", ASKED), ("gpt", ANSWER), role="from", words="value")},
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_layout_is_told_by_its_columns(row: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, row) == [SIMPLE]
    for system in (None, "", " "):
        assert read(tmp_path, {**row, "system": system}, system="Be kind.")[0].messages[0] == ("system", "Be kind.")
    assert read(tmp_path, {**row, "system": "Be short."}, system="Be kind.") == [
        Chat((Message("system", "Be short."), *SIMPLE.messages))
    ]


def test_an_instruction_and_what_it_is_about_are_one_message(tmp_path: Path) -> None:
    """An empty line is between them; white space alone is nothing."""
    about = {"instruction": "Sum up.", "input": "A long text.", "output": "Short."}
    assert read(tmp_path, about)[0].messages[0] == ("user", "Sum up.\n\nA long text.")
    dolly = {"instruction": "Sum up.", "context": "A long text.", "response": "Short."}
    assert read(tmp_path, dolly)[0].messages[0] == ("user", "Sum up.\n\nA long text.")
    assert read(tmp_path, {**dolly, "context": " \n"})[0].messages[0] == ("user", "Sum up.")


def test_chats_have_as_many_turns_as_they_have(tmp_path: Path) -> None:
    """A system prompt of the chat's own counts before a column and before the setting; an empty one is none."""
    pairs = [("system", "Rhyme."), ("human", "a"), ("chatgpt", "b"), ("user", "c"), ("assistant", "d"), ("human", "e")]
    own = turns(*pairs, role="from", words="value")
    (chat,) = read(tmp_path, {"conversations": own, "system": "Be short."}, system="Be kind.")
    assert chat == Chat(
        (Message("system", "Rhyme."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"),
         Message("assistant", "d"), Message("user", "e"))
    )  # fmt: skip
    empty = {"messages": turns(("system", ""), ("user", ASKED), ("assistant", ANSWER))}
    assert read(tmp_path, empty) == [SIMPLE]


BAD: dict[str, tuple[Any, str]] = {
    "no answer": ({"messages": turns(("user", "a"))}, r"no answer of the assistant"),
    "nothing but an empty system prompt": ({"messages": turns(("system", ""))}, r"the chat has no words in it"),
    "begins with an answer": ({"messages": turns(("assistant", "a"), ("user", "b"))}, r"begins with an answer"),
    "unknown role": (
        {"messages": turns(("user", "a"), ("tool", "b"))},
        r"turn 2 of 'messages': the role 'tool' is none of system, user, assistant",
    ),
    "unknown from": (
        {"conversations": turns(("narrator", "a"), role="from", words="value")},
        r"turn 1 of 'conversations': the from 'narrator' is none of .*human, gpt",
    ),
    "empty answer": (
        {"messages": turns(("user", "a"), ("assistant", " "))},
        r"turn 2 of 'messages': column 'content' is empty \(task.skip_bad_rows=true",
    ),
    "no text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        r"turn 1 of 'messages': column 'content' holds list, not text",
    ),
    "null answer": ({"instruction": "a", "input": "b", "output": 3}, r"column 'output' holds int, not text"),
    "empty completion": ({"prompt": "a", "completion": ""}, r"column 'completion' is empty"),
    "no turns": ({"messages": []}, r"column 'messages' holds an empty list, not a list of turns"),
    "no fields": ({"messages": [{"who": "user"}]}, r"a turn has 'role' and 'content', not 'who'"),
    "no turn": ({"messages": ["hi"]}, r"turn 1 of 'messages': .*, not 'hi'"),
    "tool calls": (
        {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "tool_calls": [{}]}]},
        r"turn 2 of 'messages': 'tool_calls' is not supported",
    ),
    "weight": (
        {"messages": [*turns(("user", "a")), {"role": "assistant", "content": "b", "weight": 0}]},
        r"turn 2 of 'messages': 'weight' is not supported",
    ),
    "nothing known": (
        {"question": "a", "answer": "b"},
        r"its columns \('question', 'answer'\) are of no known layout: messages .*Alpaca.*Dolly",
    ),
    "two layouts": (
        {"instruction": "a", "output": "b", "response": "c"},
        r"fit the layouts alpaca and dolly; choose by task.layout",
    ),
    "mixed": (ROWS["alpaca"], r"a row of the layout alpaca, in a file whose first \(.*:1\) is of the layout messages"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "error"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_counted(row: dict[str, Any], error: str, tmp_path: Path) -> None:
    """With its file and line; `skip_bad_rows` passes over it and says how many."""
    alike = [good for good in ROWS.values() if set(row) <= set(good)] if "a row of" not in error else []
    first = ROWS["sharegpt"] if "narrator" in str(row) else [*alike, ROWS["messages"]][0]
    with pytest.raises(DataError, match=rf"^task.validation: .*rows\.jsonl:2\b.*{error}"):
        read(tmp_path, first, row)
    source = str(tmp_path / "rows.jsonl")
    settings = {"name": "chat", "train": "-", "validation": source, "skip_bad_rows": True}
    found = parse_task(settings).load(training=False)
    assert found.splits["validation"] == [SIMPLE] and found.skipped["validation"] == 1


def test_a_file_in_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    """Passing over all rows would hide that the file is of another kind."""
    with pytest.raises(DataError, match=r"no chat in it: of 2 rows none can be used, .*:1: .*no known layout"):
        read(tmp_path, {"a": "b"}, {"a": "c"}, skip_bad_rows=True)
    with pytest.raises(DataError, match=r"task.validation: .*rows\.jsonl: there is no chat in it$"):
        read(tmp_path)


def test_a_layout_can_be_chosen(tmp_path: Path) -> None:
    """Then its columns must be there, and others do not matter."""
    row = {"instruction": "a", "output": "b", "response": "c"}
    assert read(tmp_path, row, layout="dolly")[0].messages[1].content == "c"
    assert read(tmp_path, row, layout="alpaca")[0].messages[1].content == "b"
    with pytest.raises(DataError, match=r"rows.jsonl:1: no column 'prompt'; the columns are 'instruction'"):
        read(tmp_path, row, layout="prompt")
    with pytest.raises(DataError, match=r"rows.jsonl:1: no column 'conversations'; the columns are 'instruction'"):
        read(tmp_path, row, layout="sharegpt")
    with pytest.raises(DataError, match=r"column 'messages' holds str, not a list of turns"):
        read(tmp_path, {"messages": "hi"}, layout="messages")
    with pytest.raises(ValidationError, match="layout"):
        read(tmp_path, row, layout="chatml")
    with pytest.raises(ValidationError, match="system"):
        read(tmp_path, row, system="")


def test_files_may_be_of_a_layout_each(tmp_path: Path) -> None:
    """Several files, and tables of prompts and responses."""
    (tmp_path / "b.csv").write_text(f"prompt,response\n{ASKED},{ANSWER}\n", encoding="utf-8")
    sources = [write(tmp_path / "a.jsonl", ROWS["sharegpt"]), str(tmp_path / "b.csv")]
    task = parse_task({"name": "chat", "train": "-", "validation": sources})
    assert task.load(training=False).splits["validation"] == [SIMPLE, SIMPLE]


def test_validation_is_drawn_and_chats_with_one_question_stay_together(tmp_path: Path) -> None:
    """By what is asked: two answers to one question are never on both sides."""
    rows = [{"prompt": f"Question {n // 2}?", "completion": f"Answer {n}."} for n in range(60)]
    task = parse_task({"name": "chat", "train": write(tmp_path / "rows.jsonl", *rows), "validation_share": 0.3})
    loaded = task.load(seed=1)
    train, validation = ({c.messages[0].content for c in loaded.splits[name]} for name in ("train", "validation"))  # type: ignore[union-attr]
    assert len(train) + len(validation) == 30 and not train & validation and len(validation) > 3
    assert loaded.notes == () and list(loaded.splits) == ["train", "validation"]
    assert len(task.model_copy(update={"max_train": 7}).load(seed=1).splits["train"]) == 7


def test_the_loss_alone_tells(tmp_path: Path) -> None:
    task = parse_task({"name": "chat", "train": "-"})
    assert task.form == "chat" and task.score("validation", [None], [SIMPLE]) == {}
    headline = task.headline({"validation": {"loss": 1.5}})
    assert (headline.name, headline.value, headline.rising) == ("loss", 1.5, False)
