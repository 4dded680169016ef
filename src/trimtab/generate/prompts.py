"""Prompts from a file: a line each of a text, or rows with a prompt or the messages of a chat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trimtab.data.readers import decode, opening
from trimtab.errors import DataError
from trimtab.generate.generator import Asked
from trimtab.tasks.chat import messages_of
from trimtab.tasks.rows import no_column, read_rows, text_of

_SETTING = "--file"


class Prompt(NamedTuple):
    """What is asked, and where it stands."""

    where: str
    asked: Asked


def read_prompts(file: str, columns: Sequence[str] = ()) -> list[Prompt]:
    """All prompts of a file, in its order.

    Args:
        file: .txt with one a line; a file of rows (.jsonl, .json, .csv, .tsv, .parquet) with a column `prompt` or
            `messages`; or "-", lines from standard input.
        columns: of rows, columns that are read before these, where a row has one of them: those of a task.

    Raises:
        DataError: the file cannot be read or holds nothing; a line is not UTF-8 or empty; a row has neither column, or
            its messages are none. The message names the file and the line.
    """
    if file == "-":
        found = _lines(sys.stdin.buffer.read(), "standard input")
    elif not (path := Path(file).expanduser()).is_file():
        what = "is a folder; give a file" if path.is_dir() else "there is no such file"
        raise DataError(f"{_SETTING} {file}: {what}")
    elif path.name.lower().endswith(".txt"):
        with opening(file), open(path, "rb") as opened:
            data = opened.read()
        found = _lines(data, file)
    else:
        found = _rows(file, columns)
    if not found:
        raise DataError(f"{_SETTING}: {file}: there is no prompt in it")
    return found


def _lines(data: bytes, name: str) -> list[Prompt]:
    found = []
    for number, line in enumerate(data.rstrip().split(b"\n"), start=1):
        where = f"{name}:{number}"
        text = decode(line, where, 0, first=number == 1).rstrip("\r")
        if data.strip() and not text.strip():
            raise DataError(f"{_SETTING}: {where}: the line is empty; a prompt stands on each")
        if text:
            found.append(Prompt(where, text))
    return found


def _or(columns: Sequence[str]) -> str:
    return "".join(f", or {name}" for name in columns if name != "prompt")


def _rows(file: str, columns: Sequence[str]) -> list[Prompt]:
    found = []
    for row in read_rows(file, _SETTING).rows:
        own = next((name for name in columns if name in row.values), None)
        if own is None and row.values.get("messages") is not None:
            asked: Asked = messages_of(row, _SETTING)
        elif own is not None or "prompt" in row.values:
            asked = text_of(row, own or "prompt", _SETTING)
        else:
            lacking = no_column(f"{_SETTING}: {row.where}", [*columns, "prompt"][0], row.values)
            raise DataError(f"{lacking} (the column of the prompts is called prompt{_or(columns)})")
        found.append(Prompt(row.where, asked))
    return found
