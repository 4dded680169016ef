import json
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
from pydantic import ValidationError

from trimtab.errors import DataError
from trimtab.tasks import GLUE, Labelled, Written

#: Of each task: folder, header and one row of the official train.tsv, and what that row is.
OFFICIAL: dict[str, tuple[str, str, str, Labelled]] = {
    "cola": ("CoLA", "", "gj04\t1\t\tOur friends won't.", Labelled("Our friends won't.", None, 1.0)),
    "sst2": ("SST-2", "sentence\tlabel", '"a" fine film \t1', Labelled('"a" fine film ', None, 1.0)),
    "mrpc": (
        "MRPC",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '0\t702876\t702977\t"One, he said.\tTwo " more.',
        Labelled('"One, he said.', 'Two " more.', 0.0),
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow?\tWhy?\t1",
        Labelled("How?", "Why?", 1.0),
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA plane.\tA jet.\t3.750",
        Labelled("A plane.", "A jet.", 3.75),
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t31193\t31193n\tgovernment\tA premise.\tA guess.\tentailment\tneutral",
        Labelled("A premise.", "A guess.", 1.0),
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        "0\tWhen?\tNow.\tnot_entailment",
        Labelled("When?", "Now.", 1),
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        "0\tIt is.\tIs it?\tentailment",
        Labelled("It is.", "Is it?", 0),
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        "0\tHe fell.\tShe did.\t1",
        Labelled("He fell.", "She did.", 1),
    ),
}
#: Columns of the texts at the hub.
COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
SCORED = {name: ["validation"] for name in OFFICIAL} | {"mnli": ["validation_matched", "validation_mismatched"]}
FILES = {
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
}


def task(subset: str, **settings: Any) -> GLUE:
    return GLUE.model_validate({"subset": subset, **settings})


def official(folder: Path, subset: str, rows: dict[str, list[str]] | None = None) -> Path:
    """The folder of one task in the layout of the official download."""
    name, header, row, _ = OFFICIAL[subset]
    (folder / name).mkdir()
    for split in ["train", *SCORED[subset]]:
        lines = [header] * bool(header) + (rows or {}).get(split, [row])
        (folder / name / FILES.get(split, f"{split}.tsv")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def hub_rows(subset: str, count: int, label: float | None = None) -> list[dict[str, Any]]:
    number = len(task(subset)._of.labels) or 6
    texts = [{column: f"{column} {n}" for column in COLUMNS[subset]} for n in range(count)]
    return [text | {"label": n % number if label is None else label, "idx": n} for n, text in enumerate(texts)]


@pytest.mark.parametrize("subset", OFFICIAL)
def test_official_files(subset: str, tmp_path: Path) -> None:
    """Each task's own columns, without quoting, from its folder or from the one above."""
    above = official(tmp_path, subset)
    loaded = task(subset, folder=str(above)).load()
    assert dict(loaded.splits) == {split: [OFFICIAL[subset][3]] for split in ["train", *SCORED[subset]]}
    assert loaded == task(subset, folder=str(above / OFFICIAL[subset][0])).load()
    assert list(task(subset, folder=str(above)).load(training=False).splits) == SCORED[subset]


@pytest.mark.parametrize("subset", OFFICIAL)
def test_the_hub(subset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its columns, its split names, its numbers of classes; rows whose label is hidden are left out."""
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((*args, kwargs["split"], kwargs["revision"]))
        return datasets.Dataset.from_list(hub_rows(subset, 3) + hub_rows(subset, 1, label=-1))

    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = task(subset, revision="r1").load()
    assert asked == [("nyu-mll/glue", subset, split, "r1") for split in ["train", *SCORED[subset]]]
    first, second = (COLUMNS[subset] + [None])[:2]
    assert loaded.splits["train"] == [
        Labelled(f"{first} {n}", second and f"{second} {n}", float(n % (len(loaded.labels) or 6))) for n in range(3)
    ]
    assert list(loaded.splits) == ["train", *SCORED[subset]]


def test_classes_stand_in_the_order_of_the_hub() -> None:
    """The names that `nyu-mll/glue` has for its numbers; its nine subsets."""
    assert {name: task(name)._of.labels for name in OFFICIAL} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qqp": ("not_duplicate", "duplicate"),
        "stsb": (),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
    }
    assert set(get_args(GLUE.model_fields["subset"].annotation)) == set(OFFICIAL)
    assert [name for name in OFFICIAL if task(name).form == "number"] == ["stsb"]


@pytest.mark.parametrize("way", ["parquet", "shards", "jsonl", "saved", "above"])
def test_files_that_datasets_writes(way: str, tmp_path: Path) -> None:
    """Parquet or JSON lines by split, shards, or a saved dictionary of splits; the splits are not mixed up."""
    splits = {"train": hub_rows("mnli", 4), "validation_matched": hub_rows("mnli", 2)}
    splits["validation_mismatched"] = hub_rows("mnli", 3)
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    folder = tmp_path / "mnli" if way == "above" else tmp_path
    folder.mkdir(exist_ok=True)
    if way == "saved":
        made.save_to_disk(folder)
    for name, one in made.items():
        if way == "shards":
            one.select(range(1)).to_parquet(folder / f"{name}-00000-of-00002.parquet")
            one.select(range(1, len(one))).to_parquet(folder / f"{name}-00001-of-00002.parquet")
        elif way == "jsonl":
            one.to_json(folder / f"{name}.jsonl")
        elif way != "saved":
            one.to_parquet(folder / f"{name}.parquet")
    loaded = task("mnli", folder=str(tmp_path)).load()
    assert {name: len(examples) for name, examples in loaded.splits.items()} == {
        "train": 4,
        "validation_matched": 2,
        "validation_mismatched": 3,
    }
    assert loaded.splits["train"][3] == Labelled("premise 3", "hypothesis 3", 0.0)


def test_rows_that_lack_fields(tmp_path: Path) -> None:
    """QQP's official file is known to have some, which are passed over and told, and an empty question; elsewhere they
    are errors.
    """
    good = OFFICIAL["qqp"][2]
    official(tmp_path, "qqp", {"train": [good, "5\t6\t7\tHow?", good.replace("Why?", "")]})
    loaded = task("qqp", folder=str(tmp_path)).load()
    assert loaded.splits["train"] == [Labelled("How?", "Why?", 1.0), Labelled("How?", "", 1.0)]
    assert loaded.skipped == {"train": 1, "validation": 0}
    assert loaded.notes == ("1 rows of qqp that cannot be read were passed over",)
    official(tmp_path, "rte", {"validation": [OFFICIAL["rte"][2], "1\tIt is."]})
    with pytest.raises(DataError, match=r"^task\.folder: .*RTE/dev\.tsv:3: too few fields"):
        task("rte", folder=str(tmp_path)).load()
    assert task("rte", folder=str(tmp_path), skip_bad_rows=True).load().skipped == {"train": 0, "validation": 1}


def test_labels_that_are_none(tmp_path: Path) -> None:
    """An unknown name or number, a score beyond 5; a split without any label."""
    for subset, row, message in [
        ("mnli", "0\t1\t1n\tg\ta\tb\tneutral\t-", "'gold_label' holds '-', not one of entailment, neutral, contradic"),
        ("wnli", "0\ta\tb\t2", "'label' holds '2', not one of not_entailment, entailment or its number"),
        ("cola", "s\t0.5\t\ta", "holds '0.5', not one of"),
        ("stsb", OFFICIAL["stsb"][2].replace("3.750", "5.1"), "'score' holds '5.1', not a number from 0 to 5"),
        ("rte", "0\ta\tb\t-1", "train of rte holds no labelled row"),
    ]:
        official(tmp_path, subset, {"train": [row]})
        with pytest.raises(DataError, match=rf"^task\.folder: .*{message}"):
            task(subset, folder=str(tmp_path)).load()


def test_folders_that_are_none(tmp_path: Path) -> None:
    """No folder, none of its files; a folder and a dataset of the hub."""
    with pytest.raises(DataError, match=r"^task\.folder: .*none' is no folder"):
        task("rte", folder=str(tmp_path / "none")).load()
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"^task\.folder: .* neither train\.tsv nor train\.parquet or .*but notes\.md"):
        task("rte", folder=str(tmp_path)).load()
    with pytest.raises(ValidationError, match="revision has no effect"):
        task("rte", folder="x", revision="main")


@pytest.mark.parametrize(
    ("subset", "example", "source", "answer"),
    [
        ("cola", Labelled("A b.", None, 0.0), "cola sentence: A b.", "unacceptable"),
        ("sst2", Labelled("fine", None, 1.0), "sst2 sentence: fine", "positive"),
        ("mrpc", Labelled("a", "b", 0.0), "mrpc sentence1: a sentence2: b", "not_equivalent"),
        ("qqp", Labelled("a", "b", 1.0), "qqp question1: a question2: b", "duplicate"),
        ("mnli", Labelled("p", "h", 2.0), "mnli hypothesis: h premise: p", "contradiction"),
        ("qnli", Labelled("q", "s", 0.0), "qnli question: q sentence: s", "entailment"),
        ("rte", Labelled("a", "b", 1.0), "rte sentence1: a sentence2: b", "not_entailment"),
        ("wnli", Labelled("a", "b", 1.0), "wnli sentence1: a sentence2: b", "entailment"),
        ("stsb", Labelled("a", "b", 3.32), "stsb sentence1: a sentence2: b", "3.4"),
        ("stsb", Labelled("a", "b", 5.0), "stsb sentence1: a sentence2: b", "5.0"),
    ],
)
def test_the_text_form_of_t5(subset: str, example: Labelled, source: str, answer: str) -> None:
    """Prefix, names of the columns, word of the class; what is written is read back."""
    one = task(subset)
    assert one.as_text(example, one._of.labels) == Written(source, (answer,))
    read = one.read_answer(f" {answer} ", one._of.labels)
    assert read == (example.label if subset != "stsb" else float(answer))
    assert one.read_answer("hamster", one._of.labels) is None
    assert one.as_text(example._replace(label=None), one._of.labels).references == ()


def test_scores_that_are_no_scores_of_stsb() -> None:
    """Numbers outside 0 to 5 are no answers."""
    assert [task("stsb").read_answer(text, ()) for text in ("-0.2", "5.2", "nan", "0", "4.7")] == [*[None] * 3, 0, 4.7]


def examples(*labels: float) -> list[Labelled]:
    return [Labelled("t", None, label) for label in labels]


def test_official_metrics() -> None:
    """Each task's own, and none besides; MNLI counts its examples."""
    truth, found = examples(1, 1, 1, 0, 0), [1.0, 1.0, 0.0, 1.0, 0.0]
    assert task("cola").score("validation", found, truth) == pytest.approx({"matthews": 1 / 6})
    for name in ("sst2", "qnli", "rte", "wnli"):
        assert task(name).score("validation", found, truth) == pytest.approx({"accuracy": 0.6})
    for name in ("mrpc", "qqp"):
        assert task(name).score("validation", found, truth) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert task("mnli").score("validation_matched", [2, 1, None], examples(2, 1, 0)) == pytest.approx(
        {"accuracy": 2 / 3, "examples": 3}
    )
    ranked = task("stsb").score("validation", [1.0, 3.0, 2.0, 5.0], examples(1, 2, 3, 4))
    assert ranked == pytest.approx({"pearson": 0.8315, "spearman": 0.8}, abs=1e-4)


def test_headlines() -> None:
    """What each paper prints for each task."""
    one = {"validation": {"accuracy": 0.8, "f1": 0.9}}
    two = {"validation": {"pearson": 0.7, "spearman": 0.9}}
    both = {"validation_matched": {"accuracy": 0.8, "examples": 100.0}}
    both["validation_mismatched"] = {"accuracy": 0.5, "examples": 200.0}
    expected: dict[str, tuple[float, ...]] = {  # mrpc, qqp, stsb, mnli
        "official": (0.85, 0.85, 0.8, 0.65),
        "lora": (0.8, 0.8, 0.7, 0.6),
        "galore": (0.9, 0.8, 0.7, 0.6),
        "adalora": (0.8, 0.85, 0.8, 0.65),
        "read": (0.85, 0.85, 0.8, 0.65),
    }
    for convention, values in expected.items():
        found = [
            task(name).headline(scores, convention).value  # type: ignore[arg-type]
            for name, scores in {"mrpc": one, "qqp": one, "stsb": two, "mnli": both}.items()
        ]
        assert found == pytest.approx(values), convention
        assert task("cola").headline({"validation": {"loss": 9.0, "matthews": 0.3}}, convention) == (  # type: ignore[arg-type]
            "matthews",
            0.3,
            True,
        )
    assert task("mrpc").headline(one, "galore").name == "f1"
    assert task("mrpc").headline(one).name == "accuracy/F1 mean"
    assert task("mnli").headline({"validation": both["validation_matched"], "test": {"accuracy": 0.1}}).value == 0.8


def lst(subset: str, folder: Path, train: int, scored: int, **settings: Any) -> Any:
    for split, count in [("train", train), *((name, scored + n) for n, name in enumerate(SCORED[subset]))]:
        rows = [row | {COLUMNS[subset][0]: f"{split} {row['idx']}"} for row in hub_rows(subset, count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task(subset, folder=str(folder), splits="lst", **settings)


def test_splits_of_ladder_side_tuning(tmp_path: Path) -> None:
    """A held-out part of train, halves of a small validation set, or MNLI's two sets; nothing stands twice."""
    large = lst("sst2", tmp_path, 1010, 6)
    loaded = large.load()
    assert {name: len(split) for name, split in loaded.splits.items()} == {"train": 10, "validation": 1000, "test": 6}
    assert {e.text for e in [*loaded.splits["train"], *loaded.splits["validation"]]} == {
        f"train {n}" for n in range(1010)
    }
    assert loaded == large.load() and loaded != large.load(seed=1)
    assert list(large.load(training=False).splits) == ["validation", "test"]
    assert large.load(training=False).splits["validation"] == loaded.splits["validation"]
    small = lst("rte", tmp_path, 4, 7).load()
    assert {name: len(split) for name, split in small.splits.items()} == {"train": 4, "validation": 3, "test": 4}
    halves = {e.text for e in [*small.splits["validation"], *small.splits["test"]]}
    assert halves == {f"validation {n}" for n in range(7)}
    mnli = lst("mnli", tmp_path, 4, 5).load()
    assert [e.text.split()[0] for split in mnli.scored for e in mnli.splits[split][:1]] == [
        "validation_mismatched",
        "validation_matched",
    ]
    with pytest.raises(DataError, match=r"task\.splits = lst holds out 1000 .* only 9$"):
        lst("qnli", tmp_path, 9, 5).load()


def test_fewer_examples(tmp_path: Path) -> None:
    """At most so many of each split, in their order, drawn by the seed."""
    few = lst("rte", tmp_path, 50, 20, max_train=7, max_eval=5)
    loaded = few.load()
    assert {name: len(split) for name, split in loaded.splits.items()} == {"train": 7, "validation": 5, "test": 5}
    numbers = [int(e.text.split()[1]) for e in loaded.splits["train"]]
    assert numbers == sorted(numbers) and few.load(seed=3).splits["train"] != loaded.splits["train"]
