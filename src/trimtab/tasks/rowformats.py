"""The formats that rows stand in: JSON, tables, Parquet, datasets; each row comes with the place where it stands.

What cannot be read comes as `Bad` in its place, as far as the rest can be read; whether that matters is `rows`' affair.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from trimtab.data.readers import decode, json_lines, json_object, one_line, opening, unpack_gzip
from trimtab.data.sources import hub_error
from trimtab.errors import DataError
from trimtab.settings import HubSource

KINDS: Final = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",  # as C4 names its files, which hold an object a line
    ".jsonl.zst": "jsonl.zst",
    ".json": "json",
    ".csv": "csv",
    ".csv.gz": "csv.gz",
    ".tsv": "tsv",
    ".tsv.gz": "tsv.gz",
    ".parquet": "parquet",
}


class Row(NamedTuple):
    """One row: `where` is FILE:LINE, or a file or dataset and the row's number from 0; `values` are by column."""

    where: str
    values: dict[str, Any]


class Bad(NamedTuple):
    """A row that cannot be read; what comes in its place from a reader."""

    error: DataError


class Layout(NamedTuple):
    """How files without a grammar of their own are read.

    Attributes:
        delimiter: between the fields of a .csv or .tsv; None is a comma for .csv and a tab for .tsv.
        quotes: whether a double quote at the beginning of a field encloses it (RFC 4180), or is a character.
        header: names of the columns of a .csv or .tsv whose first line is a row; None where that names them.
        text_files: read .txt files too, each as one row with this column; and a file of no known kind that is named
            by itself.
    """

    delimiter: str | None = None
    quotes: bool = True
    header: tuple[str, ...] | None = None
    text_files: str | None = None


def kind_of(path: Path, layout: Layout) -> str | None:
    """By the end of its name; None where that says nothing."""
    name = path.name.lower()
    if layout.text_files and name.endswith(".txt"):
        return "txt"
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), None)


def no_column(where: str, column: str, there: Collection[str]) -> DataError:
    """The error for a column that is not there: names those that are, and the nearest."""
    near = difflib.get_close_matches(column, there, n=1)
    names = ", ".join(repr(name) for name in list(there)[:20]) or "none"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{where}: no column {column!r}; the columns are {names}{hint}")


def open_rows(path: Path, kind: str, columns: list[str] | None, layout: Layout, skip_bad: bool) -> Iterable[Row | Bad]:
    """The rows of a file, or of a folder that `datasets` saved, and what cannot be read; see `rows.read_rows`."""
    if kind.startswith("jsonl"):
        return _json_lines(str(path), kind)
    if kind == "json":
        return _json_array(str(path))
    if kind == "parquet":
        return _parquet(str(path), columns)
    if kind == "saved":
        return _saved(str(path), columns)
    if kind == "txt":
        assert layout.text_files is not None
        return [Row(str(path), {layout.text_files: _text(str(path))})]
    return _table(str(path), kind, columns, layout, skip_bad)


def _bytes(path: str, kind: str = "") -> bytes:
    if kind.endswith(".gz"):
        return b"".join(unpack_gzip(path))
    with opening(path), open(path, "rb") as file:
        return file.read()


def _text(path: str) -> str:
    found = decode(_bytes(path), path, 0, first=True)
    if not found.strip():
        raise DataError(f"{path}: is empty")
    return found


def _json_lines(path: str, kind: str) -> Iterator[Row | Bad]:
    for number, offset, line in json_lines(path, kind):
        where = f"{path}:{number + 1}"
        try:
            row = Row(where, json_object(decode(line, where, offset, first=number == 0), where))
        except DataError as error:
            yield Bad(error)
        else:
            yield row


def _json_array(path: str) -> Iterator[Row | Bad]:
    try:
        items = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is not JSON ({error}); a .json file holds one array of objects (one with an object a line "
            "is named .jsonl)"
        ) from error
    if not isinstance(items, list):
        raise DataError(f"{path}: holds no array of objects but a {type(items).__name__}")
    for number, item in enumerate(items):
        where = f"{path}, row {number}"
        if isinstance(item, dict):
            yield Row(where, item)
        else:
            yield Bad(DataError(f"{where}: is not an object but a {type(item).__name__}"))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 128 KiB a field while a file is read: it is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(path: str, kind: str, columns: list[str] | None, layout: Layout, skip_bad: bool) -> Iterator[Row | Bad]:
    text, torn = _table_text(path, kind, skip_bad)
    delimiter = layout.delimiter or ("\t" if kind.startswith("tsv") else ",")
    with _long_fields():
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if layout.quotes else csv.QUOTE_NONE,
            strict=True,
        )
        names = list(layout.header or _next(reader, path, []) or [])
        if not names:
            raise DataError(f"{path}: its first line, where the names of the columns stand, is empty")
        _check_header(names, f"{path}:{max(1, reader.line_num)}", columns)
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                fields = _next(reader, path, None)
            except _Torn as error:
                yield Bad(DataError(str(error)))
                continue
            if fields is None:
                return
            if len(fields) == len(names) and not torn:
                yield Row(where, dict(zip(names, fields, strict=True)))
            elif not fields:
                continue  # a blank line
            elif torn and any("\udc80" <= c <= "\udcff" for field in fields for c in field):
                yield Bad(DataError(f"{where}: not UTF-8"))
            elif len(fields) == len(names):
                yield Row(where, dict(zip(names, fields, strict=True)))
            else:
                yield Bad(_wrong_count(where, fields, names, delimiter))


class _Torn(DataError):
    """A row whose quotes do not fit."""


def _next(reader: Any, path: str, end: list[str] | None) -> list[str] | None:
    """The next row's fields; `end` after the last."""
    line = reader.line_num + 1
    try:
        fields: list[str] | None = next(reader, end)
        return fields
    except csv.Error as error:
        if "end of data" in str(error):  # all rows to the end of the file are in it: none is passed over so
            raise DataError(
                f"{path}:{line}: a double quote that opens a field here is never closed; set task.quotes=false for "
                "a file in which quotes are plain characters"
            ) from error
        raise _Torn(
            f"{path}:{line}: this row is no CSV ({error}); set task.quotes=false for a file in which quotes are plain "
            "characters"
        ) from error


def _table_text(path: str, kind: str, skip_bad: bool) -> tuple[str, bool]:
    """The text of a table, and whether it holds bytes that are no UTF-8, as lone surrogates."""
    data = _bytes(path, kind)
    try:
        return data.decode("utf-8-sig"), False
    except UnicodeDecodeError as error:
        if skip_bad:
            return data.decode("utf-8-sig", "surrogateescape"), True
        start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        at = start + error.start
        line = data.count(b"\n", 0, at) + 1
        decode(data[at:], f"{path}:{line}", at, first=False)
        raise


def _check_header(names: list[str], where: str, columns: list[str] | None) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: two columns are called {twice[0]!r}")
    for name in columns or []:
        if name not in names:
            raise no_column(where, name, names)


def _wrong_count(where: str, fields: list[str], names: list[str], delimiter: str) -> DataError:
    many = "many" if len(fields) > len(names) else "few"
    return DataError(
        f"{where}: too {many} fields: {len(fields)} for {len(names)} columns "
        f"(delimiter {delimiter!r}; a field that holds one is put in double quotes)"
    )


def _parquet(path: str, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_header(list(file.schema_arrow.names), path, columns)
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for values in batch.to_pylist():
                    yield Row(f"{path}, row {number}", values)
                    number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8 ({error.reason})") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({one_line(error)})") from error


def hub_rows(source: HubSource, columns: list[str] | None) -> Iterator[Row]:
    """The rows of a dataset of the hub."""
    import datasets

    try:
        found = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=False
        )
    except Exception as error:  # the library raises a dozen kinds
        raise hub_error(source.dataset, error, "run again, or give local files") from error
    name = "/".join(x for x in (source.dataset, source.subset, source.split) if x)
    yield from _dataset(found, f"dataset {name!r}", columns)


def _saved(path: str, columns: list[str] | None) -> Iterator[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except Exception as error:  # the library raises a dozen kinds
        raise DataError(f"{path}: cannot be read as a saved dataset ({one_line(error)})") from error
    yield from _dataset(found, path, columns)


def _dataset(found: Any, name: str, columns: list[str] | None) -> Iterator[Row]:
    _check_header(list(found.column_names), name, columns)
    if columns is not None:
        found = found.select_columns(columns)
    number = 0
    for batch in found.iter(batch_size=1000):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield Row(f"{name}, row {number}", dict(zip(names, values, strict=True)))
            number += 1
