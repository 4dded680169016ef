"""Rows of files and datasets for tasks: each a mapping of columns to values, with the place where it stands.

A file is .jsonl (or .jsonl.gz, .jsonl.zst), .json (one array), .csv or .tsv (or .csv.gz, .tsv.gz), or .parquet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trimtab.data.sources import package_file, walk
from trimtab.errors import DataError
from trimtab.settings import HubSource
from trimtab.tasks.rowformats import KINDS, Bad, Layout, Row, hub_rows, kind_of, no_column, open_rows

__all__ = ["Layout", "Row", "Rows", "Source", "Sources", "no_column", "read_rows", "skippable", "text_of", "told"]

#: One source: a file, a folder, `package:NAME/PATH`, or a dataset of the hub.
Source = str | HubSource
#: A setting that names one source, or several that are read one after the other.
Sources = Source | tuple[Source, ...]


class Rows(NamedTuple):
    """All rows in order, and how many bad ones were passed over."""

    rows: list[Row]
    skipped: int


def read_rows(
    source: Source | Sequence[Source],
    setting: str,
    *,
    skip_bad: bool | None = None,
    columns: Sequence[str] | None = None,
    layout: Layout | None = None,
) -> Rows:
    """Every row of the sources, one source after the other, the files of a folder by name.

    Args:
        source: files, folders (all files of known kinds in it, or a dataset saved by `datasets`), `package:NAME/PATH`,
            datasets of the hub.
        setting: where the source was given, for errors: "task.train".
        skip_bad: pass over rows that are not UTF-8, not JSON, no object, lack a column or have too many or too few
            fields, and count them. None: refuse them, where there is no such setting to speak of.
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
                sink.read(hub_rows(one, sink.columns))
            else:
                for path, kind in _files(one, setting, layout or Layout()):
                    sink.read(open_rows(path, kind, sink.columns, layout or Layout(), bool(skip_bad)))
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(f"{setting}:") else f"{setting}: {text}") from error
    return Rows(rows, sink.skipped)


def told(source: Sources) -> str:
    """Sources as an error names them."""
    each = [source] if isinstance(source, str | HubSource) else source
    return ", ".join(one if isinstance(one, str) else f"{one.dataset} ({one.split})" for one in each)


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
        raise DataError(f"{setting}: {row.where}: column {column!r} is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{setting}: {row.where}: character {error.start} of column {column!r} is half of a surrogate pair, "
                "which is no text"
            ) from error
    return value


def skippable(error: DataError) -> DataError:
    """The error of a bad row, with the setting that would pass over it."""
    return DataError(f"{error} (task.skip_bad_rows=true passes over such rows)")


class _Sink:
    """Gathers the rows of one file after the other, and judges them."""

    def __init__(self, rows: list[Row], columns: list[str] | None, skip_bad: bool | None) -> None:
        self.rows, self.columns, self.skip_bad = rows, columns, skip_bad
        self.skipped = 0

    def read(self, found: Iterable[Row | Bad]) -> None:
        columns, rows, before = self.columns, self.rows, len(self.rows)
        lacking: dict[str, DataError] = {}
        seen: set[str] = set()
        for row in found:
            if isinstance(row, Bad):
                self._bad(row.error)
                continue
            where, values = row
            if columns is not None:
                try:
                    row = Row(where, {name: values[name] for name in columns})
                except KeyError as error:
                    missing = no_column(where, error.args[0], values)
                    self._bad(missing, helps=len(rows) > before)
                    lacking.setdefault(error.args[0], missing)
                    seen.update(values)
                    continue
            rows.append(row)
        if len(rows) == before:
            for name, missing in lacking.items():
                if name not in seen:
                    raise missing

    def _bad(self, error: DataError, *, helps: bool = True) -> None:
        """Count a bad row, or raise; `helps`: whether the file is known to hold others."""
        if not self.skip_bad:
            raise skippable(error) if helps and self.skip_bad is not None else error
        self.skipped += 1


def _files(source: str, setting: str, layout: Layout) -> Iterator[tuple[Path, str]]:
    """The files of a source and their kinds."""
    path = package_file(source, setting) if source.startswith("package:") else Path(source).expanduser()
    known = ", ".join([*KINDS, ".txt"] if layout.text_files else KINDS)
    if path.is_file():
        kind = kind_of(path, layout)
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
        found = [(file, kind) for file in files if (kind := kind_of(file, layout)) is not None]
        if not found:
            raise DataError(f"the folder {source!r} holds no file of a known kind ({known})")
        yield from found
    else:
        raise DataError(f"{source!r} does not exist (a dataset by name is written {{dataset: NAME}})")
