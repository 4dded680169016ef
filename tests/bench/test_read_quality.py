"""The benchmark of READ's quality: its texts, its sweep, its runs."""

from __future__ import annotations

import gzip
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from encoder_for_tests import save_encoder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module, which its worker processes find, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    yield importlib.import_module("read_quality")
    sys.modules.pop("read_quality", None)


def texts(folder: Path) -> Path:
    """Both sets in their own layouts: the words give the label away."""
    rated = folder / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.csv.gz"
    rated.parent.mkdir(parents=True)
    rows = [f'{n},{1.5 if n % 2 else -0.2},"w{n % 20}, {"good" if n % 2 else "bad"} w{n // 20}"' for n in range(200)]
    rated.write_bytes(gzip.compress("\n".join(["id,sentiment,text", *rows, *rows[:3], "999,0.0,unrated"]).encode()))
    kinds = ("ABBR:exp", "HUM:ind", "NUM:date")
    lines = [f"{kinds[n % 3]} w{n % 20} {('what', 'who', 'when')[n % 3]} w{n // 20} ?" for n in range(180)]
    (folder / "question_labels.txt").write_bytes("\n".join(["HUM:ind subset ?"] * 10_000 + lines).encode("latin-1"))
    return folder


@pytest.fixture
def options(script: ModuleType, tmp_path: Path) -> Any:
    """A tiny encoder, few texts, few steps."""
    words = ["good", "bad", "what", "who", "when", "?", ",", *(f"w{n}" for n in range(20))]
    model, data = save_encoder(tmp_path / "model", words), texts(tmp_path / "data")
    given = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--quick"]
    return script.parse([*given, "--sets", "trec", "--methods", "full", script.LONG])


def test_the_texts_are_read_in_their_own_layouts(script: ModuleType, tmp_path: Path) -> None:
    """Sentences by the sign of their rating, unrated ones left out; questions without the subsets before them."""
    folder = texts(tmp_path / "data")
    sentences, questions = script.reviews(folder), script.trec(folder)
    assert sentences[0] == ("w0, bad w0", 0)
    assert sentences[1] == ("w1, good w0", 1)
    assert len(sentences) == 203
    assert questions[:3] == [("w0 what w0 ?", 0), ("w1 who w0 ?", 1), ("w2 when w0 ?", 2)]
    assert len(questions) == 180


def test_no_text_is_in_two_parts(script: ModuleType, options: Any) -> None:
    """Training, validation and test texts are disjoint, and duplicates are gone."""
    data = script.split("reviews", options)
    parts = [{text for text, _ in part} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [60, 30, 30]
    assert len(set.union(*parts)) == 120
    assert data.classes == 2
    assert script.split("trec", options).classes == 3


class Answers:
    """Validation accuracies by rate, instead of runs."""

    def __init__(self, by_rate: dict[float, float]) -> None:
        self.by_rate = by_rate

    def ask(self, task: str, method: str, rate: float, seed: int) -> dict[str, float]:
        return {"validation": self.by_rate[rate]}


@pytest.mark.parametrize(
    ("accuracies", "best", "tried"),
    [
        ({3e-5: 0.1, 1e-4: 0.3, 3e-4: 0.2}, 1e-4, 3),
        ({3e-5: 0.1, 1e-4: 0.2, 3e-4: 0.3, 1e-3: 0.2}, 3e-4, 4),
        ({3e-5: 0.3, 1e-4: 0.2, 3e-4: 0.1, 1e-5: 0.4, 3e-6: 0.5}, 3e-6, 5),
    ],
)
def test_the_sweep_goes_on_while_its_best_is_at_an_edge(
    script: ModuleType, accuracies: dict[float, float], best: float, tried: int
) -> None:
    """Until the best lies within, or five rates are tried."""
    chosen, all_tried = script.best_rate("trec", "full", Answers(accuracies))
    assert chosen == best
    assert all_tried == accuracies
    assert len(all_tried) == tried


@pytest.mark.parametrize("method", ["full", "READ gru 256, mean"])
def test_a_run_learns(script: ModuleType, options: Any, method: str) -> None:
    """Enough steps on words that give the label away."""
    options.steps = 60
    assert script.run("trec", method, 1e-2, 0, options)["test"] > 0.9


@pytest.mark.parametrize("method", ["prompt, 16", "head alone", "READ gru 256, mean"])
def test_a_seed_decides_all_that_is_drawn(script: ModuleType, options: Any, method: str) -> None:
    """The head, the order of the texts and what the method draws: the same for a seed twice, others for another."""
    data = script.split("trec", options)
    made = [script.Training(method, data, options, 1e-2, seed) for seed in (0, 0, 1)]
    batches = [next(iter(one.batches())) for one in made]
    assert batches[0] == batches[1] != batches[2]
    for name, parameter in made[0].model.named_parameters():
        same, other = (dict(one.model.named_parameters())[name] for one in made[1:])
        assert torch.equal(parameter, same), name
        if name == "classifier.weight" or "prompt" in name or name.endswith("w_ih"):
            assert not torch.equal(parameter, other), name


def test_stored_hidden_states_change_no_result(
    script: ModuleType, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READ trains, and alike with the store and without, to the last bit of what it ends with."""
    options.steps, ends = 20, []
    options.store.mkdir(parents=True)
    script.fill("trec", options)
    monkeypatch.setattr(script.Training, "accuracy", lambda self, _: ends.append(self.adapter) or 0.0)
    for store in (options.store, None):
        options.store = store
        script.run("trec", script.READ, 1e-2, 0, options)
    stored, plain = ends[0].trainable(), ends[-1].trainable()
    assert ends[0] is not ends[-1]
    assert len(stored) == len(plain) > 4
    assert all(entry.parameter.any() for entry in stored)  # it began with an output of 0
    for one, other in zip(stored, plain, strict=True):
        torch.testing.assert_close(one.parameter, other.parameter, rtol=1e-4, atol=1e-5)


def test_it_prints_its_table_and_asks_nothing_twice(
    script: ModuleType, options: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs and accuracies of each method; a second call answers from the file alone."""
    # One process with one thread for all that is asked: starting more, and sharing so little work, costs most of it.
    processes = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda *_, **__: processes)
    given = ["--model", str(options.model), "--data", str(options.data), "--out", str(options.out.parent), "--quick"]
    given += ["--workers", str(os.cpu_count()), "--sets", "trec", "--methods", "full", script.LONG]
    script.main(given)
    printed = [line for line in capsys.readouterr().out.splitlines() if line[:2] == "| "]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed}
    assert set(rows) == {"method", "full", script.LONG}
    assert float(rows["full"][-1]) == 1.0
    assert float(rows[script.LONG][3].replace(",", "")) < float(rows["full"][3].replace(",", ""))
    monkeypatch.setattr(script, "answer", None)
    script.main(given)
    assert [line for line in capsys.readouterr().out.splitlines() if line[:2] == "| "] == printed
