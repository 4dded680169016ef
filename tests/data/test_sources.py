import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_for_tests import config, rows, write_jsonl

from trimtab.data.readers import BEGINNING, Cursor, Document, probe, read_documents
from trimtab.data.sources import Input, is_validation, resolve
from trimtab.errors import DataError
from trimtab.settings import HubSource


def read(*sources: Any, start: Cursor = BEGINNING, **changes: Any) -> list[Document]:
    return list(read_documents(resolve(config(*sources, **changes)), changes.get("text_field", "text"), start))


def ids(documents: list[Document]) -> list[str]:
    return [d.id for d in documents]


def every_kind(folder: Path) -> Path:
    """The same ten documents in each format, and a text file, in one tree."""
    lines = "".join(json.dumps(row) + "\n" for row in rows(10)).encode()
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[:900]) + gzip.compress(lines[900:]))
    packer = zstandard.ZstdCompressor()
    (folder / "c.jsonl.zst").write_bytes(packer.compress(lines[:500]) + packer.compress(lines[500:]))
    pq.write_table(pa.Table.from_pylist(rows(10)), folder / "deep" / "d.parquet", row_group_size=3)
    (folder / "deep" / "e.txt").write_text("one text é", encoding="utf-8")
    (folder / "notes.md").write_text("no source")
    (folder / ".hidden.txt").write_text("no source")
    return folder


def test_all_formats_hold_the_same_documents(tmp_path: Path) -> None:
    """Every format gives the same texts, in the sorted order of paths, with ids free of the machine's paths."""
    documents = read(every_kind(tmp_path / "x"))
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "deep/d.parquet"]
    assert ids(documents) == [f"{name}#{row}" for name in names for row in range(10)] + ["deep/e.txt#0"]
    for start in range(0, 40, 10):
        assert [d.data.decode() for d in documents[start : start + 10]] == [row["text"] for row in rows(10)]
    assert documents[-1].data.decode() == "one text é"
    assert ids(read(every_kind(tmp_path / "elsewhere" / "y"))) == ids(documents)
    assert sum(d.read for d in documents if d.id.startswith("a.")) == (tmp_path / "x" / "a.jsonl").stat().st_size


def test_c4s_own_file_names_are_read(tmp_path: Path) -> None:
    """`c4-train.00000-of-01024.json.gz` holds a JSON object a line."""
    lines = "".join(json.dumps(row) + "\n" for row in rows(4)).encode()
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(lines))
    assert [d.data.decode() for d in read(tmp_path)] == [row["text"] for row in rows(4)]


def test_reading_can_begin_at_any_document(tmp_path: Path) -> None:
    """From each document's place on, exactly the rest is read: what a resumed build relies on."""
    documents = read(every_kind(tmp_path))
    for i, document in enumerate(documents):
        assert read(tmp_path, start=document.place) == documents[i:]
        assert read(tmp_path, start=Cursor(document.place.input, document.place.row + 1)) == documents[i + 1 :]


def test_package_files_are_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`package:NAME/FOLDER` reads files of a package whose import would fail."""
    package = tmp_path / "breaks_on_import"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.txt").write_text("found")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ids(read("package:breaks_on_import/data")) == ["a.txt#0"]
    with pytest.raises(DataError, match="'no_such_package', which is not installed"):
        read("package:no_such_package/data")
    with pytest.raises(DataError, match="does not exist"):
        read("package:breaks_on_import/other")


def test_a_byte_order_mark_and_empty_rows_are_no_text(tmp_path: Path) -> None:
    """A mark at the start is dropped; blank lines and empty texts make no document but keep the row count."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\n{"text": ""}\n{"text": "y"}')
    (tmp_path / "c.txt").write_bytes(b"")
    assert [(d.id, d.data) for d in read(tmp_path)] == [("a.txt#0", b"text"), ("b.jsonl#0", b"x"), ("b.jsonl#3", b"y")]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """A folder that links back to itself is walked once."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "again").symlink_to(tmp_path)
    assert ids(read(tmp_path)) == ["a.txt#0"]


def test_the_split_depends_on_seed_and_id_alone() -> None:
    """The share is met, seeds differ, and nothing but the id matters."""
    chosen = [is_validation(1, f"a.jsonl#{i}", 0.1) for i in range(5000)]
    assert 0.08 < sum(chosen) / 5000 < 0.12
    assert chosen != [is_validation(2, f"a.jsonl#{i}", 0.1) for i in range(5000)]
    assert all(is_validation(1, f"a.jsonl#{i}", 0.2) for i in range(5000) if chosen[i])


def test_validation_sources_come_first_and_alone(tmp_path: Path) -> None:
    """With validation_sources set, these are held out and all of `sources` trains."""
    write_jsonl(tmp_path / "t.jsonl", rows(3))
    write_jsonl(tmp_path / "v.jsonl", rows(2))
    documents = read(tmp_path / "t.jsonl", validation_sources=(str(tmp_path / "v.jsonl"),))
    assert [d.part for d in documents] == ["validation"] * 2 + ["train"] * 3
    assert {d.part for d in read(tmp_path / "t.jsonl")} == {"split"}


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "text that is not UTF-8": ("a.txt", b"abc\xffdef", r"a\.txt: not UTF-8 at byte 3 \(0xff\)"),
    "a line that is not UTF-8": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "\xe9"}\n',
        r"a\.jsonl: not UTF-8 at byte 24 \(0xe9\)",
    ),
    "a line that is not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: this line is not JSON"),
    "a line that is a list": ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: this line is not a JSON object but a list"),
    "a missing field": (
        "a.jsonl",
        b'{"content": "x", "id": 1}\n',
        r"l:1: no field data\.text_field='text'; the fields are 'content', 'id'",
    ),
    "a field of another type": ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' holds NoneType, not text"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl:1: character 2 of field 'text'"),
    "a deep line": ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: this line is not JSON"),
    "a cut gzip file": (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "x"}\n' * 99)[:-9],
        r"a\.jsonl\.gz: damaged or cut short",
    ),
    "no gzip file": ("a.jsonl.gz", b'{"text": "x"}\n', r"a\.jsonl\.gz: damaged or cut short"),
    "a cut zstd file": (
        "a.jsonl.zst",
        zstandard.compress(b'{"text": "x"}\n' * 99)[:-3],
        r"a\.jsonl\.zst: damaged or cut short",
    ),
    "no zstd file": ("a.jsonl.zst", b'{"text": "x"}\n', r"a\.jsonl\.zst: damaged or cut short"),
    "no Parquet file": ("a.parquet", b"PAR1 and nothing", r"a\.parquet: cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    """Each names the file and the place in it."""
    name, data, message = BROKEN[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    """In Parquet the field is looked for in the schema, and `probe` finds it missing before anything is done."""
    pq.write_table(pa.Table.from_pylist([{"content": "x", "n": 1}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the fields are 'content', 'n'"):
        probe(resolve(config(tmp_path)), "text")


def test_a_missing_source_is_one_clear_line(tmp_path: Path) -> None:
    """A path that is not there, an empty folder and an unknown kind of file are named."""
    (tmp_path / "a.csv").write_text("x")
    for source, message in {
        tmp_path / "gone": "gone' does not exist",
        tmp_path: "holds no file of a known kind",
        tmp_path / "a.csv": "no file of a known kind",
    }.items():
        with pytest.raises(DataError, match=message):
            read(source)


def test_zst_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out is the extra to install."""
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}\n'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"pip install 'trimtab\[zst\]'"):
        read(tmp_path)


def test_a_dataset_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library on a local folder: rows in order, and from any row on."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "set" / "train.jsonl", rows(6))
    source = HubSource(dataset=str(tmp_path / "set"))
    documents = read(source)
    assert [d.data.decode() for d in documents] == [row["text"] for row in rows(6)]
    assert read(source, start=Cursor(0, 4)) == documents[4:]
    with pytest.raises(DataError, match=r"no field data\.text_field='body'; the fields are 'text', 'n'"):
        read(source, text_field="body")


class Stream:
    """A dataset of three rows whose connection breaks after `good` of them."""

    def __init__(self, first: int = 0, good: int = 3) -> None:
        self.first, self.good = first, good

    def skip(self, n: int) -> "Stream":
        return Stream(n, self.good)

    def __iter__(self) -> Any:
        for i in range(self.first, 3):
            if i >= self.good:
                raise ConnectionError("the line went dead\nhere")
            yield {"text": f"row {i}"}


def test_a_dataset_is_pinned_to_the_commit_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked once which commit a name stands for; the stream is opened at that commit."""
    opened: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, *, split: str, revision: str, streaming: bool) -> Stream:
        opened.append((name, subset, split, revision, streaming))
        return Stream()

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    source = HubSource(dataset="owner/name", subset="en")
    (found,) = resolve(config(source))
    assert (found.name, found.revision) == ("owner/name/en/train", "c0ffee")
    assert ids(read(source)) == [f"owner/name/en/train#{i}" for i in range(3)]
    assert opened == [("owner/name", "en", "train", "c0ffee", True)]
    (kept,) = resolve(config(source), {"owner/name/en/train": "earlier"})
    assert kept.revision == "earlier"


def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline at the start and a connection that breaks midway both name the dataset and what to do."""

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline mode is on\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match=r"'owner/name' could not be had.*offline mode is on\).*run again") as caught:
        read(HubSource(dataset="owner/name"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream(good=2))
    stream = read_documents([Input("hub", "owner/name/train", "split", "owner/name")], "text")
    assert [next(stream).data for _ in range(2)] == [b"row 0", b"row 1"]
    with pytest.raises(DataError, match=r"'owner/name': reading stopped at row 2 .*run again") as caught:
        next(stream)
    assert "\n" not in str(caught.value)
