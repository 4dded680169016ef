import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from trimtab.errors import ConfigError, DataError, TrimtabError
from trimtab.tasks import Classification, Labelled, Language, Plain, Regression, Seq2Seq, Task, Written, parse_task


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reviews(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"review {n}", "label": ("bad", "good", "so so")[n % 3]} for n in range(start, start + count)]


def texts(examples: Any) -> list[str]:
    return [example.text for example in examples]


def test_classification(tmp_path: Path) -> None:
    """Classes are numbered in sorted order; the splits are those of the files."""
    train, dev = jsonl(tmp_path / "t.jsonl", reviews(6)), jsonl(tmp_path / "d.jsonl", reviews(2, 10))
    task = parse_task({"name": "classification", "train": train, "validation": [dev, dev], "test": dev})
    loaded = task.load()
    assert task.form == "class" and loaded.labels == ("bad", "good", "so so")
    assert list(loaded.splits) == ["train", "validation", "test"] and loaded.scored == ["validation", "test"]
    assert loaded.splits["train"][:2] == [Labelled("review 0", None, 0.0), Labelled("review 1", None, 1.0)]
    assert texts(loaded.splits["validation"]) == ["review 10", "review 11"] * 2
    assert loaded.skipped == {"train": 0, "validation": 0, "test": 0} and loaded.notes == ()


def test_labels_of_any_kind(tmp_path: Path) -> None:
    """Whole numbers sort as numbers; `labels` orders them otherwise; switches are words."""
    rows = [{"text": f"t{n}", "label": n} for n in (10, 9, 2)] + [{"text": "t", "label": 9.0}]
    train = jsonl(tmp_path / "a.jsonl", rows)
    loaded = Classification(train=train, validation=train).load()
    assert loaded.labels == ("2", "9", "10")
    assert [e.label for e in loaded.splits["train"] if isinstance(e, Labelled)] == [2.0, 1.0, 0.0, 1.0]
    other = Classification(train=train, validation=train, labels=(10, "9", 2, 7)).load()
    assert other.labels == ("10", "9", "2", "7") and "no row that is trained on is labelled '7'" in other.notes
    switches = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    assert Classification(train=switches, validation=switches).load().labels == ("false", "true")


def test_pairs_from_a_table(tmp_path: Path) -> None:
    """Columns have the names that the settings say; a delimiter may be named."""
    path = tmp_path / "a.csv"
    path.write_text("q;a;y\none; two ;no\nthree;four; yes\n")
    task = Classification(train=str(path), validation=str(path), text="q", pair="a", label="y", delimiter=";")
    loaded = task.load()
    assert loaded.splits["train"] == [Labelled("one", " two ", 0.0), Labelled("three", "four", 1.0)]


def test_validation_is_drawn_by_each_text_alone(tmp_path: Path) -> None:
    """Other rows do not matter, equal texts stay together, the share is about right, the seed matters."""
    rows = reviews(600)
    whole = Classification(train=jsonl(tmp_path / "a.jsonl", rows), validation_share=0.2)
    drawn = set(texts(whole.load().splits["validation"]))
    assert 80 < len(drawn) < 160
    half = whole.model_copy(update={"train": jsonl(tmp_path / "b.jsonl", rows[::2])}).load()
    assert set(texts(half.splits["validation"])) == drawn & {row["text"] for row in rows[::2]}
    assert set(texts(whole.load(seed=1).splits["validation"])) != drawn
    assert 30 < len(whole.model_copy(update={"validation_share": None}).load().splits["validation"]) < 90
    again = rows + [{"text": row["text"].upper().replace(" ", "  "), "label": "bad"} for row in rows]
    twice = whole.model_copy(update={"train": jsonl(tmp_path / "c.jsonl", again)}).load()
    found = Counter(" ".join(text.lower().split()) for text in texts(twice.splits["validation"]))
    assert set(found) == drawn and set(found.values()) == {2}
    assert twice.notes == ()


def test_fewer_examples_are_a_part_of_more(tmp_path: Path) -> None:
    """`max_train` and `max_eval` draw by a hash, keep the order, and take all classes of a sorted file."""
    rows = sorted(reviews(300), key=lambda row: row["label"])
    path = jsonl(tmp_path / "a.jsonl", rows)
    few = Classification(train=path, validation=path, max_train=30, max_eval=20).load()
    more = Classification(train=path, validation=path, max_train=90).load()
    assert [len(split) for split in few.splits.values()] == [30, 20] and len(more.splits["validation"]) == 300
    kept = texts(more.splits["train"])
    assert kept == [row["text"] for row in rows if row["text"] in set(kept)]
    assert set(texts(few.splits["train"])) < set(kept)
    assert {example.label for example in few.splits["train"] if isinstance(example, Labelled)} == {0.0, 1.0, 2.0}


def test_only_what_is_scored_is_read(tmp_path: Path) -> None:
    """Without training, a train file is needed for the names of classes alone, or to draw from."""
    dev, none = jsonl(tmp_path / "d.jsonl", reviews(3)), str(tmp_path / "none.jsonl")
    names = ("bad", "good", "so so")
    assert list(Classification(train=none, validation=dev, labels=names).load(training=False).splits) == ["validation"]
    assert Classification(train=dev, validation=dev).load(training=False).labels == names
    drawn = Classification(train=jsonl(tmp_path / "t.jsonl", reviews(99)))
    assert drawn.load(training=False).splits == {"validation": drawn.load().splits["validation"]}
    for task in (Classification(train=none, validation=dev), Language(train=none)):
        with pytest.raises(DataError, match=r"^task\.train: .* does not exist"):
            task.load(training=False)


def test_texts_that_are_trained_on_and_scored_are_counted(tmp_path: Path) -> None:
    """A note tells how many rows of a split stand in train too."""
    train, dev = jsonl(tmp_path / "t.jsonl", reviews(9)), jsonl(tmp_path / "d.jsonl", reviews(6, 7))
    loaded = Classification(train=train, validation=dev).load()
    assert loaded.notes == ("2 of the 6 rows of validation have a text that stands in train too",)


Row = dict[str, Any]
GOOD: list[Row] = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
BROKEN: dict[str, tuple[Row, str]] = {
    "a missing column": ({"txt": "c", "label": "x"}, "no column 'text'; the columns are 'txt', 'label'; did you mean"),
    "an empty text": ({"text": " ", "label": "x"}, "column 'text' is empty"),
    "no text": ({"text": None, "label": "x"}, r"column 'text' holds nothing \(null\)"),
    "no label": ({"text": "c", "label": None}, r"column 'label' holds nothing \(null\); a class is a word or"),
    "an empty label": ({"text": "c", "label": " "}, "column 'label' is empty; a class"),
    "a fraction": ({"text": "c", "label": 0.5}, "column 'label' holds 0.5; a class is"),
    "a list": ({"text": "c", "label": ["x"]}, r"column 'label' holds \['x'\]; a class is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_of_classes(case: str, tmp_path: Path) -> None:
    """It is named by setting, file and line, or passed over and counted."""
    row, message = BROKEN[case]
    good, bad = jsonl(tmp_path / "g.jsonl", GOOD), jsonl(tmp_path / "b.jsonl", [*GOOD, row])
    task = Classification(train=good, validation=good, test=bad)
    with pytest.raises(DataError, match=rf"^task\.test: .*b\.jsonl:3: {message}.* \(task.skip_bad_rows=true passes"):
        task.load()
    loaded = task.model_copy(update={"skip_bad_rows": True}).load()
    assert len(loaded.splits["test"]) == 2 and loaded.skipped == {"train": 0, "validation": 0, "test": 1}


def test_a_file_of_other_columns_is_not_mended_by_passing_over_rows(tmp_path: Path) -> None:
    """Nothing would be left of it, so the setting is not named."""
    other = jsonl(tmp_path / "o.jsonl", [{"words": "a", "label": "x"}])
    with pytest.raises(DataError, match=r"o\.jsonl:1: no column 'text'; the columns are 'words', 'label'$"):
        Classification(train=other).load()


def test_labels_that_training_has_not(tmp_path: Path) -> None:
    """The line, the label, the known ones and the nearest are named; passing over bad rows does not hide it."""
    good = jsonl(tmp_path / "g.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])
    other = jsonl(tmp_path / "o.jsonl", [{"text": "c", "label": "good"}, {"text": "d", "label": "Good"}])
    for split in ("validation", "test"):
        task = Classification.model_validate({"train": good, "validation": good, "skip_bad_rows": True, split: other})
        message = rf"^task\.{split}: .*o\.jsonl:2: the label 'Good' is none of those known \('bad', 'good'\); did you "
        with pytest.raises(DataError, match=message + r"mean 'good'\? .*task\.labels"):
            task.load()
    with pytest.raises(DataError, match=r"^task\.train: .*g\.jsonl:2: the label 'bad' .*\('good', 'Good'\)"):
        Classification(train=good, validation=good, labels=("good", "Good")).load()
    many = jsonl(tmp_path / "m.jsonl", reviews(99))
    with pytest.raises(DataError, match=r"^task\.train: .*m\.jsonl:"):
        Classification(train=many, labels=("x", "y")).load(training=False)


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    """One class alone, one number alone, an empty split, a draw that leaves nothing."""
    same = jsonl(tmp_path / "s.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    with pytest.raises(DataError, match=r"^task\.train: all 2 rows .* are labelled '1'"):
        Classification(train=same, validation=same).load()
    with pytest.raises(DataError, match=r"^task\.train: all 2 rows .* have the number 1"):
        Regression(train=same, validation=same).load()
    empty = jsonl(tmp_path / "e.jsonl", [])
    with pytest.raises(DataError, match=r"^task\.test: .*e\.jsonl: there is no row in it$"):
        Regression(train=same, validation=same, test=empty).load()
    bad = jsonl(tmp_path / "b.jsonl", [{"text": "", "label": 1}])
    with pytest.raises(
        DataError, match=r"^task\.test: .*b\.jsonl: there is no row in it \(1 bad one was passed over\)"
    ):
        Regression(train=same, validation=same, test=bad, skip_bad_rows=True).load()
    with pytest.raises(DataError, match=r"its 2 rows none is left for validation \(task\.validation_share = 0\.0001"):
        Regression(train=same, validation_share=0.0001).load()
    with pytest.raises(DataError, match=r"its 2 rows none is left for train \(task\.validation_share = 0\.9999"):
        Regression(train=same, validation_share=0.9999).load()
    rows = [{"text": f"text {n}", "label": "1" if n else "0"} for n in range(40)]
    hint = r"there is nothing to tell apart; raise task.max_train = 2, or leave it out$"
    with pytest.raises(DataError, match=rf"^task\.train: all 2 rows that are trained on are labelled '1'; {hint}"):
        Classification(train=jsonl(tmp_path / "drawn.jsonl", rows), max_train=2).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": "v", "validation_share": 0.1}, "validation_share = 0.1 draws what `validation` gives"),
        ({"labels": ["a", " a"]}, "each once"),
        ({"labels": ["a", " "]}, "each once"),
        ({"labels": ["a"]}, "two classes or more"),
        ({"pair": "text"}, "is the column of the text already"),
        ({"label": "text"}, "is the column of the text already"),
        ({"prompt": "{text} {txt}"}, r"\{txt\} is not known; a template names \{text\}"),
        ({"prompt": "{text.upper}"}, r"\{text\.upper\} is not known"),
        ({"prompt": "{text!r}"}, r"\{text!r\} is not known"),
        ({"prompt": "{text:>9}"}, r"\{text:>9\} is not known"),
        ({"prompt": "{text} {}"}, r"\{\} is not known"),
        ({"prompt": "Label:"}, r"lacks \{text\}"),
        ({"prompt": "{text}", "pair": "b"}, r"lacks \{pair\}"),
        ({"prompt": "{text"}, "a brace that is text is doubled"),
        ({"delimiter": "||"}, r"'\|\|' is no delimiter: give one character"),
        ({"delimiter": ""}, "'' is no delimiter"),
        ({"delimiter": "\n"}, "neither a line's end"),
        ({"max_train": 0}, "greater than 0"),
        ({"epochs": 3}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    """Each is refused when the settings are made."""
    with pytest.raises((ValidationError, ConfigError), match=message):
        Classification.model_validate({"train": "t", **settings})


def test_prompts_and_answers_of_classes() -> None:
    """A model that writes is given the prompt; its first line names a class, in any case, or none."""
    labels = ("bad", "good", "A", "a")
    task = Classification(train="t")
    assert task.as_text(Labelled("x {y}", None, 1.0), labels) == Written("x {y}\nLabel:", ("good",))
    assert task.as_text(Labelled("x", None, None), labels) == Written("x\nLabel:", ())
    pair = task.model_copy(update={"pair": "b"})
    assert pair.as_text(Labelled("x", "y", 0.0), labels) == Written("x\ny\nLabel:", ("bad",))
    own = Classification(train="t", pair="b", prompt="{pair} {{?}} {text}")
    assert own.as_text(Labelled("x", "y", 0.0), labels).source == "y {?} x"
    answers = {" good\nand more": 1.0, "GOOD": 1.0, "a": 3.0, "A": 2.0, "goodness": None, "": None, "\n": None}
    for text, number in answers.items():
        assert task.read_answer(text, labels) == number
    assert task.read_answer("ab", ("Ab", "aB")) is None


def test_scores_of_classes() -> None:
    """Two classes have F1 and Matthews too; more have not."""
    task = Classification(train="t")
    examples = [Labelled("t", None, label) for label in (0.0, 1.0, 1.0, 1.0)]
    assert task.score("validation", [0, 1, 0, None], examples) == {
        "accuracy": 0.5,
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 2),
        "f1": pytest.approx(1 / 2),
        "matthews": pytest.approx((1 * 1 - 0 * 2) / (1 * 3 * 1 * 3) ** 0.5),
    }
    assert set(task.score("validation", [0, 1, 2, 1], examples)) == {"accuracy", "macro_f1"}
    assert task.headline({"validation": {"accuracy": 0.5, "macro_f1": 0.4}}) == ("accuracy", 0.5, True)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("high", "'high'"), (None, "nothing"), (float("nan"), "nan"), ("inf", "'inf'"), (True, "True"), ([1], r"\[1\]")],
)
def test_numbers_that_are_none(value: Any, shown: str, tmp_path: Path) -> None:
    """Words, nothing, NaN, infinity and switches are no labels of a regression."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": value}])
    with pytest.raises(DataError, match=rf"^task\.train: .*a\.jsonl:2: column 'label' holds {shown}.*, not a finite"):
        Regression(train=path, validation=path).load()


def test_regression(tmp_path: Path) -> None:
    """Numbers may stand as text; they are written and read as numbers."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1.5\nb,-2e3\n")
    task = Regression(train=str(path), validation=str(path))
    loaded = task.load()
    assert task.form == "number" and loaded.labels == ()
    assert loaded.splits["train"] == [Labelled("a", None, 1.5), Labelled("b", None, -2000.0)]
    assert task.as_text(Labelled("a", None, 2.50), ()) == Written("a\nScore:", ("2.5",))
    assert [task.read_answer(text, ()) for text in (" 2.5\n3", "2,5", "nan", "", "1e999")] == [2.5, *[None] * 4]
    examples = [Labelled("t", None, label) for label in (1.0, 2.0, 3.0, 4.0)]
    assert task.score("validation", [1.0, 3.0, 2.0, 4.0], examples) == pytest.approx(
        {"pearson": 0.8, "spearman": 0.8, "mse": 0.5}
    )


def test_seq2seq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One target or several; the prompt surrounds the source; an answer that is none is the empty text."""
    rows = [{"source": "s1 {x}", "target": "t"}, {"source": "s2", "target": ["u", "v"]}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    task = Seq2Seq(train=path, validation=path, prompt="summarize: {source}")
    loaded = task.load()
    assert task.form == "text"
    assert loaded.splits["train"] == [Written("summarize: s1 {x}", ("t",)), Written("summarize: s2", ("u", "v"))]
    asked: list[Any] = []
    monkeypatch.setattr("trimtab.tasks.nlg.rouge", lambda *args: asked.append(args) or {"ROUGE-1": 1.0})
    monkeypatch.setattr("trimtab.tasks.nlg.bleu", lambda *args: asked.append(args) or 2.0)
    assert task.score("validation", ["h", None], loaded.splits["validation"]) == {
        "ROUGE-1": 1.0,
        "BLEU (lower case)": 2.0,
    }
    assert asked == [(["h", ""], [("t",), ("u", "v")])] * 2
    with pytest.raises(ConfigError, match="no labels"):
        task.as_text(Labelled("a", None, 0.0), ())


@pytest.mark.parametrize(
    ("target", "message"),
    [([], "list without any text"), (["u", ""], "'target' is empty"), (["u", 3], "holds int"), (None, "null")],
)
def test_targets_that_are_none(target: Any, message: str, tmp_path: Path) -> None:
    """An empty list, an empty text in one, what is no text."""
    path = jsonl(tmp_path / "a.jsonl", [{"source": "s", "target": target}])
    with pytest.raises(DataError, match=rf"^task\.train: .*a\.jsonl:1: .*{message}"):
        Seq2Seq(train=path, validation=path).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{text}"}, r"\{text\} is not known; .*\{source\}"),
        ({"target": "source"}, "is the column of the source already"),
    ],
)
def test_seq2seq_settings(settings: dict[str, Any], message: str) -> None:
    """A prompt names the source alone; source and target are two columns."""
    with pytest.raises((ValidationError, ConfigError), match=message):
        Seq2Seq.model_validate({"train": "t", **settings})


def test_language(tmp_path: Path) -> None:
    """Rows of a column, and .txt files whole; no metric but the loss."""
    (tmp_path / "b.txt").write_text("one\ntwo")
    jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}])
    task = Language(train=str(tmp_path), validation=str(tmp_path / "b.txt"), text="body")
    loaded = task.load()
    assert task.form == "plain"
    assert loaded.splits == {"train": [Plain("x"), Plain("one\ntwo")], "validation": [Plain("one\ntwo")]}
    assert task.score("validation", [], loaded.splits["validation"]) == {}
    assert task.headline({"validation": {"loss": 2.0}}) == ("loss", 2.0, False)


def test_libraries_are_asked_for_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is not installed is found before the files are."""
    for kind in (Classification, Regression, Seq2Seq):
        monkeypatch.setattr(kind, "needs", ("no_such_library",))
        task: Task = kind(train="no.jsonl")
        with pytest.raises(TrimtabError, match="no_such_library"):
            task.load()


def test_settings_survive_a_round_trip(tmp_path: Path) -> None:
    """A task written as JSON and parsed again is the same task."""
    task = Classification(train=("a.csv", "b.csv"), labels=("x", 3), pair="p", validation_share=0.2)
    assert parse_task(json.loads(task.model_dump_json(exclude_unset=True)) | {"name": task.name}) == task
    hub = parse_task({"name": "language", "train": {"dataset": "a/b", "split": "dev"}})
    assert isinstance(hub, Language) and parse_task(hub.model_dump()) == hub
