import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trimtab.errors import DataError
from trimtab.settings import HubSource
from trimtab.tasks.rows import Layout, Row, Rows, read_rows, text_of

ROWS = [{"text": 'say "é", then\ngo\u2028on', "label": "a"}, {"text": "two", "label": "b"}, {"text": "", "label": "c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    lines = [["text", "label"], *([row["text"], row["label"]] for row in ROWS)]
    quoted = [delimiter.join('"' + field.replace('"', '""') + '"' for field in line) for line in lines]
    return ("\ufeff" + "\r\n".join(quoted)).encode()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


FILES: dict[str, bytes] = {
    "a.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.csv": table(","),
    "a.csv.gz": gzip.compress(table(",")),
    "A.TSV": table("\t"),
    "a.tsv.gz": gzip.compress(table("\t")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_holds_the_same_rows(name: str, tmp_path: Path) -> None:
    """Text with quotes, newlines and non-ASCII letters comes through each format; columns select."""
    path = write(tmp_path / name, FILES[name])
    assert [row.values for row in read_rows(path, "task.train").rows] == ROWS
    picked = read_rows(path, "task.train", columns=["label"])
    assert [row.values for row in picked.rows] == [{"label": row["label"]} for row in ROWS] and picked.skipped == 0


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    """Parquet and a folder of `save_to_disk` hold the same rows; a folder of several splits names them."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    found = read_rows(str(tmp_path / "a.parquet"), "task.train", columns=["text"]).rows
    assert found[1] == Row(f"{tmp_path / 'a.parquet'}, row 1", {"text": "two"}) and len(found) == 3
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    assert [row.values for row in read_rows(str(tmp_path / "saved"), "task.train").rows] == ROWS
    datasets.DatasetDict({"train": saved, "dev": saved}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"^task\.train: the folder .* several splits \(dev, train\)"):
        read_rows(str(tmp_path / "both"), "task.train")
    assert len(read_rows(str(tmp_path / "both" / "dev"), "task.train").rows) == 3


def test_places_name_the_line_where_a_row_begins(tmp_path: Path) -> None:
    """Blank lines and newlines within quotes count."""
    path = write(tmp_path / "a.csv", b'text,label\n"a\nb",x\n\nc,y\n')
    assert [row.where for row in read_rows(path, "s").rows] == [f"{path}:2", f"{path}:5"]
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": 2}')
    assert [row.where for row in read_rows(path, "s").rows] == [f"{path}:1", f"{path}:3"]


def test_folders_packages_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a folder come by name, sources in their order; `package:` finds files of a package."""
    (tmp_path / "pack" / "deep").mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    write(tmp_path / "pack" / "b.jsonl", b'{"n": 2}\n')
    write(tmp_path / "pack" / "a.csv", b"n\n1\n")
    write(tmp_path / "pack" / "deep" / "c.json", b'[{"n": 3}]')
    write(tmp_path / "pack" / "notes.md", b"no rows")
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = ["1", 2, 3]
    assert [row.values["n"] for row in read_rows("package:pack", "s").rows] == whole
    sources = ("package:pack/deep/c.json", str(tmp_path / "pack"))
    assert [row.values["n"] for row in read_rows(sources, "s").rows] == [3, *whole]
    assert "pack" not in sys.modules


def test_layouts(tmp_path: Path) -> None:
    """A delimiter, plain quotes, a header of one's own, and .txt files where they are wanted."""
    assert read_rows(write(tmp_path / "a.csv", b'a;b\n1;"2;3"\n'), "s", layout=Layout(delimiter=";")).rows[
        0
    ].values == {
        "a": "1",
        "b": "2;3",
    }
    plain = Layout(quotes=False, header=("x", "y"))
    rows = read_rows(write(tmp_path / "a.tsv", b'"a\tb"\n"c" d\t"\n'), "s", layout=plain).rows
    assert [row.values for row in rows] == [{"x": '"a', "y": 'b"'}, {"x": '"c" d', "y": '"'}]
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo")
    assert read_rows(path, "s", layout=Layout(text_files="t")) == Rows([Row(path, {"t": "one\ntwo"})], 0)
    with pytest.raises(DataError, match="known kind"):
        read_rows(path, "s")


def test_a_long_field_is_read_and_the_limit_of_the_process_stays(tmp_path: Path) -> None:
    """Fields above the 128 KiB of the csv module are read; its limit is put back."""
    before = csv.field_size_limit(131_072)
    path = write(tmp_path / "a.csv", b"a\n" + b"x" * 200_000 + b"\n")
    assert len(read_rows(path, "s").rows[0].values["a"]) == 200_000
    assert csv.field_size_limit(before) == 131_072


BAD: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: this line is not JSON \("),
    "no object": ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: this line is not a JSON object but a list"),
    "not UTF-8": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 at byte 24 \(0xe9\)"),
    "no UTF-8 in a table": ("a.csv", b"text\nx\n\xe9\n", r"a\.csv:3: not UTF-8 at byte 7 \(0xe9\)"),
    "a column missing in a row": (
        "a.jsonl",
        b'{"text": "x"}\n{"texts": 1, "n": 2}\n',
        r"a\.jsonl:2: no column 'text'; the columns are 'texts', 'n'; did you mean 'texts'\?",
    ),
    "too many fields": ("a.csv", b"text,n\nx,1\ny,2,3\n", r"a\.csv:3: too many fields: 3 for 2 columns"),
    "too few fields": ("a.csv", b"text,n\nx,1\ny\n", r"a\.csv:3: too few fields: 1 for 2 columns"),
    "text after a quote": ("a.csv", b'text,n\nx,1\n"y"z,2\n', r"a\.csv:3: this row is no CSV .* task\.quotes=false"),
    "no object in an array": ("a.json", b'[{"text": "x"}, 3]', r"a\.json, row 1: is not an object but a int"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_passed_over_and_counted(case: str, tmp_path: Path) -> None:
    """The error begins with the setting and names file and line; with skip_bad the good row alone is left."""
    name, data, message = BAD[case]
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=rf"^task\.train: .*{message}"):
        read_rows(path, "task.train", columns=["text"])
    found = read_rows(path, "task.train", columns=["text"], skip_bad=True)
    assert [row.values for row in found.rows] == [{"text": "x"}] and found.skipped == 1


WRONG: dict[str, tuple[str, bytes, str]] = {
    "a column that no row has": ("a.jsonl", b'{"txt": 1}\n{"txt": 2}\n', r"a\.jsonl:1: no column 'text'.*mean 'txt'"),
    "a column that no table has": ("a.csv", b"txt\n1\n", r"a\.csv:1: no column 'text'; the columns are 'txt'"),
    "an empty table": ("a.csv", b"", r"a\.csv: its first line, where the names of the columns stand, is empty"),
    "a column that stands twice": ("a.csv", b"text,b,text\n1,2,3\n", r"a\.csv:1: two columns are called 'text'"),
    "a quote that stays open": ("a.csv", b'text\nx\n"y\nz\n', r"a\.csv:3: a double quote that opens .* never closed"),
    "lines named as an array": ("a.json", b'{"text": 1}\n{"text": 2}', r"a\.json: is not JSON .* named \.jsonl"),
    "no array": ("a.json", b'{"text": 1}', r"a\.json: holds no array of objects but a dict"),
    "torn gzip": ("a.csv.gz", gzip.compress(b"text\n" * 99)[:-9], r"a\.csv\.gz: damaged or cut short"),
    "no Parquet": ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read as Parquet"),
    "an unknown kind": ("a.xls", b"", r"a\.xls' is no file of a known kind \(\.jsonl, .*\.parquet\)"),
}


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_an_error_whether_or_not_bad_rows_are_passed_over(
    case: str, skip_bad: bool, tmp_path: Path
) -> None:
    """What is wrong with a whole file is never a bad row."""
    name, data, message = WRONG[case]
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=rf"^task\.test: .*{message}"):
        read_rows(path, "task.test", columns=["text"], skip_bad=skip_bad)


def test_missing_sources(tmp_path: Path) -> None:
    """A missing file, an empty folder and an absent package are each named with the setting, once."""
    for source, message in {
        str(tmp_path / "no.csv"): r"does not exist \(a dataset by name is written \{dataset: NAME\}\)",
        str(tmp_path): "holds no file of a known kind",
        "package:no_such_package/a.csv": "needs the Python package 'no_such_package'",
    }.items():
        with pytest.raises(DataError, match=rf"^task\.train: '|^task\.train: the folder '.*{message}") as caught:
            read_rows(source, "task.train", skip_bad=True)
        assert str(caught.value).count("task.train") == 1
        assert caught.match(message)


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, subset, split and revision are handed on; rows are numbered; a wrong column is named."""
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = HubSource(dataset="some/set", subset="sub", split="dev", revision="abc")
    found = read_rows(source, "task.train", columns=["label", "text"]).rows
    assert asked == [(("some/set", "sub"), {"split": "dev", "revision": "abc", "streaming": False})]
    assert found[1] == Row("dataset 'some/set/sub/dev', row 1", {"label": "b", "text": "two"})
    with pytest.raises(DataError, match=r"^task\.train: dataset 'some/set/sub/dev': no column 'Text'.*mean 'text'\?"):
        read_rows(source, "task.train", columns=["Text"])


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the dataset and the way out, without a word of tokenizing."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"^task\.test: dataset 'a/b' .*ConnectionError: no route\).*local files$") as e:
        read_rows(HubSource(dataset="a/b"), "task.test")
    assert "tokenized" not in str(e.value) and "\n" not in str(e.value)


def test_a_local_folder_of_datasets(tmp_path: Path) -> None:
    """`datasets` itself loads a folder by its name as it loads the hub's."""
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    source = HubSource(dataset=str(tmp_path / "data"))
    assert [row.values for row in read_rows(source, "s").rows] == ROWS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"holds nothing \(null\)"),
        (3, "holds int, not text"),
        (" \n", "is empty"),
        ("a\ud800", "character 1 .* half of a surrogate pair"),
    ],
)
def test_what_is_no_text(value: object, message: str) -> None:
    """Nothing, a number, white space and half a character are each refused by name."""
    with pytest.raises(DataError, match=rf"^task\.train: f:3: .*{message}"):
        text_of(Row("f:3", {"t": value}), "t", "task.train")
    assert text_of(Row("f:3", {"t": ""}), "t", "task.train", empty=True) == ""
