"""Rows of files and datasets for tasks: each a mapping of columns to values, with the place where it stands.

A file is .jsonl (or .jsonl.gz, .jsonl.zst), .json (one array), .csv or .tsv (or .csv.gz, .tsv.gz), or .parquet.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from trimtab.data.readers import decode, json_lines, json_object, one_line, opening, unpack_gzip
from trimtab.data.sources import hub_error, package_file, walk
from trimtab.errors import DataError
from trimtab.settings import HubSource

#: One source: a file, a folder, `package:NAME/PATH`, or a dataset of the hub.
Source = str | HubSource
#: A setting that names one source, or several that are read one after the other.
Sources = Source | tuple[Source, ...]

_KINDS: Final = {
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


class Rows(NamedTuple):
    """All rows in order, and how many bad ones were passed over."""

    rows: list[Row]
    skipped: int


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


def read_rows(
    source: Source | Sequence[Source],
    setting: str,
    *,
    skip_bad: bool = False,
    columns: Sequence[str] | None = None,
    layout: Layout | None = None,
) -> Rows:
    """Every row of the sources, one source after the other, the files of a folder by name.

    Args:
        source: files, folders (all files of known kinds in it, or a dataset saved by `datasets`), `package:NAME/PATH`,
            datasets of the hub.
        setting: where the source was given, for errors: "task.train".
        skip_bad: pass over rows that are not UTF-8, not JSON, no object, lack a column or have too many or too few
            fields, and count them.
        columns: what each row must have; `values` then holds these alone. None: whatever there is.
        layout: of .csv, .tsv and .txt files.

    Raises:
        DataError: a source is missing or of no known kind; a file is damaged; no row has a column of `columns`; the
            hub cannot be reached; without `skip_bad`, a row is bad. The message begins with `setting` and names the
            file and the line.
    """
    rows: list[Row] = []
    sink = _Sink(rows, list(dict.fromkeys(columns)) if columns is not None else None, skip_bad)
    try:
        for one in [source] if isinstance(source, str | HubSource) else source:
            if isinstance(one, HubSource):
                sink.read(_hub(one, sink.columns))
            else:
                for path, kind in _files(one, setting, layout or Layout()):
                    sink.read(_open(path, kind, sink.columns, layout or Layout(), skip_bad))
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(f"{setting}:") else f"{setting}: {text}") from error
    return Rows(rows, sink.skipped)


def no_column(where: str, column: str, there: Collection[str]) -> DataError:
    """The error for a column that is not there: names those that are, and the nearest."""
    near = difflib.get_close_matches(column, there, n=1)
    names = ", ".join(repr(name) for name in list(there)[:20]) or "none"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{where}: no column {column!r}; the columns are {names}{hint}")


def text_of(row: Row, column: str, setting: str, *, empty: bool = False) -> str:
    """The text in a column of a row.

    Raises:
        DataError: it is no text, half of a surrogate pair, or, without `empty`, holds nothing but white space.
    """
    value = row.values[column]
    if not isinstance(value, str):
        what = "nothing (null)" if value is None else f"{type(value).__name__}, not text"
        raise DataError(f"{setting}: {row.where}: column {column!r} holds {what}")
    if not empty and not value.strip():
        raise DataError(
            f"{setting}: {row.where}: column {column!r} is empty (task.skip_bad_rows=true passes over such rows)"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{setting}: {row.where}: character {error.start} of column {column!r} is half of a surrogate pair, "
                "which is no text"
            ) from error
    return value


class _Bad(NamedTuple):
    """A row that cannot be read; what comes in its place from a reader."""

    error: DataError


class _Sink:
    """Gathers the rows of one file after the other, and judges them."""

    def __init__(self, rows: list[Row], columns: list[str] | None, skip_bad: bool) -> None:
        self.rows, self.columns, self.skip_bad = rows, columns, skip_bad
        self.skipped = 0

    def read(self, found: Iterable[Row | _Bad]) -> None:
        columns, rows, before = self.columns, self.rows, len(self.rows)
        lacking: dict[str, DataError] = {}
        seen: set[str] = set()
        for row in found:
            if isinstance(row, _Bad):
                self._bad(row.error)
                continue
            where, values = row
            if columns is not None:
                try:
                    row = Row(where, {name: values[name] for name in columns})
                except KeyError as error:
                    missing = no_column(where, error.args[0], values)
                    self._bad(missing)
                    lacking.setdefault(error.args[0], missing)
                    seen.update(values)
                    continue
            rows.append(row)
        if len(rows) == before:
            for name, missing in lacking.items():
                if name not in seen:
                    raise missing

    def _bad(self, error: DataError) -> None:
        if not self.skip_bad:
            raise error
        self.skipped += 1


def _files(source: str, setting: str, layout: Layout) -> Iterator[tuple[Path, str]]:
    """The files of a source and their kinds."""
    path = package_file(source, setting) if source.startswith("package:") else Path(source).expanduser()
    known = ", ".join([*_KINDS, ".txt"] if layout.text_files else _KINDS)
    if path.is_file():
        kind = _kind(path, layout)
        if kind is None and layout.text_files and not path.name.lower().endswith((".gz", ".zst")):
            kind = "txt"  # a file that is named by itself is a text whatever its ending; in a folder it may be anything
        if kind is None:
            raise DataError(f"{source!r} is no file of a known kind ({known})")
        yield path, kind
    elif (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise DataError(f"the folder {source!r} holds several splits ({splits}); name one of them, as {source}/NAME")
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield path, "saved"
    elif path.is_dir():
        files = sorted(walk(path), key=lambda p: p.relative_to(path).as_posix())
        found = [(file, kind) for file in files if (kind := _kind(file, layout)) is not None]
        if not found:
            raise DataError(f"the folder {source!r} holds no file of a known kind ({known})")
        yield from found
    else:
        raise DataError(f"{source!r} does not exist (a dataset by name is written {{dataset: NAME}})")


def _kind(path: Path, layout: Layout) -> str | None:
    name = path.name.lower()
    if layout.text_files and name.endswith(".txt"):
        return "txt"
    return next((kind for ending, kind in _KINDS.items() if name.endswith(ending)), None)


def _open(path: Path, kind: str, columns: list[str] | None, layout: Layout, skip_bad: bool) -> Iterable[Row | _Bad]:
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
    return decode(_bytes(path), path, 0, first=True)


def _json_lines(path: str, kind: str) -> Iterator[Row | _Bad]:
    for number, offset, line in json_lines(path, kind):
        where = f"{path}:{number + 1}"
        try:
            row = Row(where, json_object(decode(line, where, offset, first=number == 0), where))
        except DataError as error:
            yield _Bad(error)
        else:
            yield row


def _json_array(path: str) -> Iterator[Row | _Bad]:
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
            yield _Bad(DataError(f"{where}: is not an object but a {type(item).__name__}"))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of 128 KiB a field while a file is read: it is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(path: str, kind: str, columns: list[str] | None, layout: Layout, skip_bad: bool) -> Iterator[Row | _Bad]:
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
            raise DataError(f"{path}: is empty, or its first line is: the names of the columns stand there")
        _check_header(names, f"{path}:{max(1, reader.line_num)}", columns)
        while True:
            line = reader.line_num + 1
            where = f"{path}:{line}"
            try:
                fields = _next(reader, path, None)
            except _Torn as error:
                yield _Bad(DataError(str(error)))
                continue
            if fields is None:
                return
            if len(fields) == len(names) and not torn:
                yield Row(where, dict(zip(names, fields, strict=True)))
            elif not fields:
                continue  # a blank line
            elif torn and any("\udc80" <= c <= "\udcff" for field in fields for c in field):
                yield _Bad(DataError(f"{where}: not UTF-8"))
            elif len(fields) == len(names):
                yield Row(where, dict(zip(names, fields, strict=True)))
            else:
                yield _Bad(_wrong_count(where, fields, names, delimiter))


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


def _hub(source: HubSource, columns: list[str] | None) -> Iterator[Row]:
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
