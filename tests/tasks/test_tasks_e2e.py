"""E2E NLG: both layouts of its files, the form of its sources, grouping, and what is refused."""

import sys

import pytest
from pydantic import ValidationError

from trimtab.errors import ConfigError, DataError
from trimtab.settings import HubSource
from trimtab.tasks import E2E, Written, parse_task

FILES = {
    "trainset.csv": [
        ('"name[The Oak], eatType[coffee shop], priceRange[£20-25]"', "The Oak costs £20-25."),
        ('"name[The Oak], eatType[coffee shop], priceRange[£20-25]"', '"A ""coffee shop"", The Oak."'),
    ],
    "devset.csv": [("name[Le Bleu]", "Le Bleu."), ("name[Elm]", "Elm."), ("name[Le Bleu]", "It is Le Bleu.")],
    "testset_w_refs.csv": [
        (
            '"name[Caf\u00c3\u00a9], familyFriendly[yes], customer rating[5 out of 5]"',
            "Kids like Caf\u00c3\u00a9 \u0141 1.",
        ),
    ],
}
LORA = {
    "train.txt": "name : The Oak | Type : pub||The Oak is a pub .\n",
    "valid.txt": "name : Elm||Elm .\n\nname : Le Bleu||Le Bleu .\nname : Elm||It 's Elm .\n",
    "test.txt": "name : Elm||Elm here .\n",
}


@pytest.fixture
def official(tmp_path):
    for name, rows in FILES.items():
        (tmp_path / name).write_text("mr,ref\n" + "".join(f"{mr},{ref}\n" for mr, ref in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def lora(tmp_path):
    for name, text in LORA.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_official_files(official):
    """A pair each to train on; to score, one example for each list of attributes, in the order of the file."""
    loaded = E2E(folder=str(official)).load()
    assert list(loaded.splits) == ["train", "validation", "test"]
    source = "name : The Oak | Type : coffee shop | price : £ 20 - 25"
    assert loaded.splits["train"] == [
        Written(source, ("The Oak costs £20-25.",)),
        Written(source, ('A "coffee shop", The Oak.',)),
    ]
    assert loaded.splits["validation"] == [
        Written("name : Le Bleu", ("Le Bleu.", "It is Le Bleu.")),
        Written("name : Elm", ("Elm.",)),
    ]
    assert loaded.skipped == {}


def test_broken_characters_are_mended(official):
    """What E2E's own script repairs when it reads these files is repaired."""
    assert E2E(folder=str(official)).load().splits["test"] == [
        Written("name : Café | family friendly : yes | customer rating : 5 out of 5", ("Kids like Café £ 1.",))
    ]


def test_official_form(official):
    """The attributes as the official files write them."""
    task = E2E(folder=str(official), source_form="official")
    assert task.load().splits["train"][0].source == "name[The Oak], eatType[coffee shop], priceRange[£20-25]"


def test_lora_files(lora):
    """LoRA's files are taken as they are; there is no way back to the official form."""
    loaded = E2E(folder=str(lora)).load()
    assert loaded.splits["train"] == [Written("name : The Oak | Type : pub", ("The Oak is a pub .",))]
    assert loaded.splits["validation"] == [
        Written("name : Elm", ("Elm .", "It 's Elm .")),
        Written("name : Le Bleu", ("Le Bleu .",)),
    ]
    with pytest.raises(ConfigError, match=r"source_form = official: .*train\.txt has LoRA's form"):
        E2E(folder=str(lora), source_form="official").load()


def test_a_dataset(tmp_path):
    """A dataset of the hub's form, each split by its name."""
    for split, place in [("train", "Oak"), ("validation", "Elm"), ("test", "Bleu")]:
        text = f"meaning_representation,human_reference\nname[{place}],{place}!\n"
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8")
    loaded = E2E(dataset=HubSource(dataset=str(tmp_path))).load()
    assert {name: list(found) for name, found in loaded.splits.items()} == {
        "train": [Written("name : Oak", ("Oak!",))],
        "validation": [Written("name : Elm", ("Elm!",))],
        "test": [Written("name : Bleu", ("Bleu!",))],
    }


def test_without_training_the_train_split_is_not_read(official):
    """What is only scored needs no file to train on."""
    (official / "trainset.csv").unlink()
    assert list(E2E(folder=str(official)).load(training=False).splits) == ["validation", "test"]
    with pytest.raises(DataError, match=r"trainset\.csv is missing; it should hold trainset\.csv, devset\.csv"):
        E2E(folder=str(official)).load()


def test_scores(official):
    """All references count; BLEU is the headline; an answer that is none is an empty text."""
    task = E2E(folder=str(official))
    examples = task.load().splits["validation"]
    scores = task.score("validation", ["It is Le Bleu.", "Elm."], examples)
    assert scores["BLEU"] == pytest.approx(100)
    assert scores["ROUGE-L"] == pytest.approx(100)
    assert "METEOR" not in scores
    assert task.headline({"validation": scores}) == ("BLEU", pytest.approx(100), True)
    assert task.score("validation", [None], [Written("x", ("None",))])["ROUGE-L"] == 0


def test_that_meteor_is_missing_is_said(official, tmp_path, monkeypatch):
    """Why the papers' column is empty, and how to fill it, is said before the run."""
    assert "task.meteor_jar" in E2E(folder=str(official)).load().notes[0]
    jar, java = tmp_path / "m.jar", tmp_path / "java"
    jar.touch()
    java.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert E2E(folder=str(official), meteor_jar=str(jar)).load().notes == ()


def test_what_scoring_needs_is_looked_for_first(official, monkeypatch):
    """A missing jar or library is found before any training."""
    for setting in ("meteor_jar", "tokenizer_jar"):
        with pytest.raises(ConfigError, match=rf"{setting} = '/no/such\.jar': no such file"):
            E2E(folder=str(official), **{setting: "/no/such.jar"}).load()
        with pytest.raises(ConfigError, match=rf"{setting} = '/no/such\.jar': no such file"):
            E2E(**{setting: "/no/such.jar"}).score("test", ["a"], [Written("x", ("a",))])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[tasks\]'"):
        E2E(folder=str(official)).load()


def test_decoding_is_the_papers():
    """LoRA, Table 11."""
    assert dict(E2E().decoding) == {
        "num_beams": 10,
        "length_penalty": 0.9,
        "no_repeat_ngram_size": 4,
        "max_new_tokens": 64,
    }


def test_it_is_a_task_of_text():
    """It is found by its name."""
    task = parse_task({"name": "e2e", "folder": "x"})
    assert isinstance(task, E2E) and task.form == "text"
    with pytest.raises(ValidationError, match="exclude each other"):
        E2E(folder="x", dataset=HubSource(dataset="y"))


def test_folders_that_are_none(tmp_path, official):
    """The message says what the folder should hold."""
    with pytest.raises(DataError, match=r"no such folder; it should hold trainset\.csv.*or train\.txt"):
        E2E(folder=str(tmp_path / "none")).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of the files of E2E NLG; it should hold trainset\.csv"):
        E2E(folder=str(tmp_path / "empty")).load()
    (official / "train.txt").touch()
    with pytest.raises(DataError, match="files of both layouts"):
        E2E(folder=str(official)).load()


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("devset.csv", "mr,reference\nname[A],A.\n", r"devset\.csv:1: no column 'ref'"),
        ("devset.csv", "mr,ref\n", "split 'validation' is empty"),
        ("devset.csv", "mr,ref\nname[A],A.\nname[B],\n", r"devset\.csv:3: column 'ref' is empty"),
        ("devset.csv", "mr,ref\nname[A] B,A.\n", r"devset\.csv:2: 'name\[A\] B' is no list of `slot\[value\], \.\.\.`"),
        ("devset.csv", "mr,ref\nA bar,A.\n", r"devset\.csv:2: 'A bar' is no list"),
    ],
)
def test_bad_official_files(official, name, text, what):
    """The file, the line and the fault are named."""
    (official / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        E2E(folder=str(official)).load()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a||b\nc\n", r"valid\.txt:2: .* it has 0 times `\|\|`"),
        ("a||b||c\n", r"valid\.txt:1: .* it has 2 times"),
        ("a|| \n", r"valid\.txt:1: column 'ref' is empty"),
        ("\n", "split 'validation' is empty"),
    ],
)
def test_bad_lora_files(lora, text, what):
    """The file, the line and the fault are named."""
    (lora / "valid.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what):
        E2E(folder=str(lora)).load()


def test_bad_rows_are_passed_over_when_asked(official, lora):
    """And counted."""
    for name in LORA:
        (official / name).unlink()
    (official / "devset.csv").write_text("mr,ref\nname[A],A.\nname[B],\nC,C.\nname[D]\n", encoding="utf-8")
    loaded = E2E(folder=str(official), skip_bad_rows=True).load()
    assert loaded.splits["validation"] == [Written("name : A", ("A.",))]
    assert loaded.skipped == {"validation": 3}
    for name in FILES:
        (lora / name).unlink()
    for name, text in LORA.items():
        (lora / name).write_text(text + "bad\n|| \n", encoding="utf-8")
    assert E2E(folder=str(lora), skip_bad_rows=True).load().skipped == {"train": 2, "validation": 2, "test": 2}
