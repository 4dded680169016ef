"""`trimtab eval`: what it measures equals what a run measured, and tables and files say it."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints_for_tests import labelled_rows, save_checkpoints, sentences, write_rows

from trimtab.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, a set, and two runs that differ in their seed."""
    folder = save_checkpoints(tmp_path_factory.mktemp("eval"), "bert", "llama")
    write_rows(folder / "train.jsonl", labelled_rows(60))
    write_rows(folder / "held-out.jsonl", labelled_rows(30, seed=1))
    (folder / "text.gz").write_bytes(b"\x1f\x8b")
    (folder / "bytes").write_bytes(b"ab\xff")
    (folder / "text.txt").write_text(" ".join(sentences(8)), encoding="utf-8")
    for seed in (0, 1):
        task = {"name": "classification", "train": f"{folder}/train.jsonl", "validation": f"{folder}/held-out.jsonl"}
        words = [f"model.name={folder}/bert", f"task={json.dumps(task)}", "method={name: lora}", "train.steps=6"]
        assert call("finetune", *words, "dtype=fp32", f"seed={seed}", f"out={folder}", f"name=run{seed}") == 0
    return folder


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0)


def test_a_run_has_the_scores_that_it_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "scores.json"
    assert call("eval", str(place / "run0"), str(place / "run1"), "--out", str(out)) == 0
    found = json.loads(out.read_text())
    values = []
    for seed in (0, 1):
        own = json.loads((place / f"run{seed}" / "results.json").read_text())["scores"]["validation"]
        assert found[str(place / f"run{seed}")]["scores"]["validation"] == pytest.approx(own, rel=1e-4)
        values.append(own["loss"])
    shown = capsys.readouterr().out
    assert f"{sum(values) / 2:.4g} ± {abs(values[0] - values[1]) / math.sqrt(2):.2g}" in shown


def test_in_bf16_a_run_has_the_scores_that_it_measured_to_the_bit(place: Path, tmp_path: Path) -> None:
    """Rotary frequencies in bf16 would turn position 100 by a tenth of a radian."""
    task = f"task={{name: language, train: {place}/text.txt, validation: {place}/text.txt}}"
    words = [f"model.name={place}/llama", task, "method={name: bitfit, add_bias: true}", "train.steps=2", "dtype=bf16"]
    assert call("finetune", *words, f"out={tmp_path}", "name=run") == 0
    own = json.loads((tmp_path / "run/results.json").read_text())["scores"]["validation"]
    assert call("eval", str(tmp_path / "run"), "--out", str(tmp_path / "a.json")) == 0
    assert json.loads((tmp_path / "a.json").read_text())[str(tmp_path / "run")]["scores"]["validation"] == own


def test_another_file_can_be_scored(place: Path, tmp_path: Path) -> None:
    """The labels stay those of training, although this file has one of them alone."""
    rows = [row for row in labelled_rows(30, seed=1) if row["label"] == "warm"]
    other = write_rows(tmp_path / "other.jsonl", rows)
    assert call("eval", str(place / "run0"), f"task.validation={other}", "--out", str(tmp_path / "a.json")) == 0
    scores = json.loads((tmp_path / "a.json").read_text())[str(place / "run0")]["scores"]["validation"]
    assert 0 <= scores["accuracy"] <= 1


def test_rows_that_a_run_drew_are_scored_again_and_no_others(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another share, rows that were trained on would be among them."""
    task = f"task={{name: classification, train: {place}/train.jsonl, validation_share: 0.3}}"
    words = [f"model.name={place}/bert", task, "method={name: lora}", "train.steps=2", "dtype=fp32"]
    assert call("finetune", *words, f"out={tmp_path}", "name=drew") == 0
    own = json.loads((tmp_path / "drew/results.json").read_text())["scores"]["validation"]
    assert scored(tmp_path / "drew", tmp_path / "a.json") == pytest.approx(own, rel=1e-4)
    capsys.readouterr()
    assert call("eval", str(tmp_path / "drew"), "task.validation_share=0.5") == 2
    assert "on which" in capsys.readouterr().err
    assert call("eval", str(tmp_path / "drew"), "task.validation_share=0.5", f"task.train={place}/held-out.jsonl") == 0


def test_the_perplexity_of_a_text_is_that_of_transformers(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "text.json"
    words = ["eval", str(place / "llama"), "--text", str(place / "text.txt"), "dtype=fp32", "--out", str(out)]
    assert call(*words) == 0
    found = json.loads(out.read_text())[str(place / "llama")]["scores"]["validation"]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama")
    text = (place / "text.txt").read_text()
    ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
    assert ids.shape[1] <= 256  # one piece
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    first = len(tokenizer.decode(ids[0, :1]).encode())
    bits = loss * (ids.shape[1] - 1) / math.log(2) / (len(text.encode()) - first)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_text_is_read_in_pieces_of_one_length_by_all(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was trained on shorter ones, and its base with its adapter."""
    text = str(place / "text.txt")
    task = json.dumps({"name": "language", "train": text, "validation": text})
    words = [f"model.name={place}/llama", f"task={task}", "method={name: lora}", "train.steps=2", "data.seq_len=16"]
    assert call("finetune", *words, "dtype=fp32", f"out={tmp_path}", "name=run") == 0
    found = []
    for subject in (["eval", f"{tmp_path}/run"], ["eval", f"{place}/llama", "--adapter", f"{tmp_path}/run/adapter"]):
        for more in ([], ["data.seq_len=16"]):
            out = tmp_path / "scores.json"
            capsys.readouterr()
            assert call(*subject, "--text", text, "dtype=fp32", "--out", str(out), *more) == 0
            assert f"texts are read in pieces of at most {16 if more else 256} tokens" in capsys.readouterr().out
            found.append(next(iter(json.loads(out.read_text()).values()))["loss"])
    assert found[0] == found[2] != found[1] == found[3]


def test_a_text_is_one_whatever_the_file_is_called(place: Path, tmp_path: Path) -> None:
    """Rows are read as rows, and what is packed is no text."""
    text = (place / "text.txt").read_text()
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_rows(tmp_path / "text.jsonl", [{"text": text}])
    found = []
    for path in (place / "text.txt", *(tmp_path / name for name in ("README.md", "LICENSE", "text.jsonl"))):
        out = tmp_path / "scores.json"
        assert call("eval", str(place / "llama"), "--text", str(path), "dtype=fp32", "--out", str(out)) == 0
        found.append(json.loads(out.read_text())[str(place / "llama")]["scores"]["validation"])
    assert found == [found[0]] * 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no model is given"),
        (["PLACE/llama", "--text", "PLACE/text.gz"], "trimtab: --text: 'PLACE/text.gz' is no file of a known kind"),
        (["PLACE/llama", "--text", "PLACE/bytes"], "bytes: not UTF-8 at byte 2"),
        (["PLACE/llama"], "is no fine-tuning run, so it has no task"),
        (["PLACE/lama"], "PLACE/lama: there is no such folder"),
        (["runs/lama"], "runs/lama is no folder here, and a model of the hub has no task; give one, such as"),
        (["PLACE/llama", "--text", "nowhere.txt"], "there is no such file"),
        (["PLACE/llama", "--text", "PLACE"], "trimtab: --text PLACE: is a folder; give a file"),
        (["PLACE/llama", "--text", "PLACE/text.txt", "task={name: glue}"], "in place of a task"),
        (["PLACE/llama", "--text", "PLACE/text.txt", "--out", "no/where/a.json"], "there is no folder"),
        (["PLACE/bert", "task={name: classification, train: PLACE/train.jsonl}"], "has no head for this task"),
        (["PLACE/llama", "--text", "PLACE/text.txt", "--adapter", "PLACE/run0/adapter"], "adapter"),
        (["PLACE/run0", "task.nonsense=1"], "unknown key"),
        (["PLACE/run0", "task.max_eval=3", "task={name: glue}"], "task.max_eval=3: task=... behind it gives the whole"),
        (["PLACE/run0", "task.validation=null"], "on which PLACE/run0 was trained; leave task.validation as in"),
        (["PLACE/run0", "task.validation=null", "task.train=PLACE/./train.jsonl"], "was trained; leave"),
        (["PLACE/run0", "task.validation=null", "task.train=[PLACE]"], "was trained; leave task.validation"),
        (["PLACE/llama", "task={name: clasification, train: a.csv}"], "did you mean classification?"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("eval", *(word.replace("PLACE", str(place)) for word in words)) == 2
    said = capsys.readouterr().err
    assert says.replace("PLACE", str(place)) in said
    assert said.count("\n") == 1


def test_settings_of_a_training_have_no_effect_and_that_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what was typed; a run's own settings were heeded when it was trained."""
    own = (place / "run0" / "config.yaml").read_text()
    assert "every: 0" in own
    (place / "run0" / "config.yaml").write_text(own.replace("every: 0", "every: 3"))
    typed = ["eval.every=5", "eval.patience=2", "eval.keep_best=false", "eval.beams=2", "eval.report=lora"]
    try:
        assert call("eval", str(place / "run0")) == 0
        assert "note:" not in capsys.readouterr().out
        assert call("eval", str(place / "run0"), *typed) == 0
    finally:
        (place / "run0" / "config.yaml").write_text(own)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert told == [
        *(f"note: eval.{key} has no effect: nothing is trained" for key in ("every", "patience", "keep_best")),
        "note: eval.beams has no effect: the model writes no answers",
        "note: eval.report has no effect: the task classification is reported in one way",
    ]


def scored(subject: Path | str, out: Path, *words: str) -> dict[str, float]:
    assert call("eval", str(subject), "dtype=fp32", "--out", str(out), *words) == 0
    found: dict[str, float] = json.loads(out.read_text())[str(subject)]["scores"]["validation"]
    return found


def test_a_head_that_numbers_its_classes_otherwise_is_read_by_their_names(place: Path, tmp_path: Path) -> None:
    """The same head with its rows the other way round, and names in capitals, has the same scores."""
    task = f"task={{name: classification, train: {place}/train.jsonl, validation: {place}/held-out.jsonl}}"
    found = []
    for names in ({0: "cold", 1: "warm"}, {0: "WARM", 1: "COLD"}):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert", id2label=names)
        if names[0] == "WARM":
            with torch.no_grad():
                model.classifier.weight.copy_(model.classifier.weight.flip(0))
        folder = tmp_path / names[0]
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(place / "bert").save_pretrained(folder)
        found.append(scored(folder, tmp_path / "a.json", task))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_adapter_knows_the_order_of_its_classes(place: Path, tmp_path: Path) -> None:
    """Trained with the classes in another order, it is scored by their names, not by their numbers."""
    files = f"train: {place}/train.jsonl, validation: {place}/held-out.jsonl"
    task = f"task={{name: classification, labels: [warm, cold], {files}}}"
    words = [f"model.name={place}/bert", task, "method={name: lora}", "train.steps=20", "optim.lr=0.01", "dtype=fp32"]
    assert call("finetune", *words, f"out={tmp_path}", "name=a") == 0
    own = json.loads((tmp_path / "a" / "results.json").read_text())["scores"]["validation"]
    adapter = ["--adapter", str(tmp_path / "a" / "adapter")]
    sorted_task = f"task={{name: classification, {files}}}"
    found = scored(place / "bert", tmp_path / "b.json", sorted_task, *adapter)
    assert [found["accuracy"], found["loss"]] == pytest.approx([own["accuracy"], own["loss"]], rel=1e-5)


def test_classes_that_a_head_does_not_have_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_rows(
        tmp_path / "other.jsonl", [{"text": f"a {n}", "label": ["hot", "cold"][n % 2]} for n in range(30)]
    )
    adapter = ["--adapter", str(place / "run0" / "adapter")]
    assert call("eval", str(place / "bert"), f"task={{name: classification, train: {other}}}", *adapter) == 2
    assert "its classes are cold, hot, and those of the head of" in capsys.readouterr().err


def test_runs_of_other_settings_are_no_seeds_of_each_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = f"{{name: classification, train: {place}/train.jsonl, validation: {place}/held-out.jsonl}}"
    words = [f"model.name={place}/bert", f"task={task}", "method={name: lora}", "train.steps=6", "dtype=fp32"]
    assert call("finetune", *words, f"out={place}", "name=faster", "optim.lr=0.01") == 0
    capsys.readouterr()
    assert call("eval", str(place / "run0"), str(place / "faster")) == 0
    assert "±" not in capsys.readouterr().out


def test_the_harness_gets_our_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its package stands in here: what it is called with is what counts."""
    seen: dict[str, Any] = {}

    class TaskManager:
        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        seen.update(given)
        return {"results": {"arc_easy": {"acc": 0.5}}}

    fakes = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, members in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    assert call("eval", str(place / "llama"), "--lm-eval", "arc_easy", "eval.batch=4") == 0
    assert json.loads(capsys.readouterr().out)[str(place / "llama")] == {"arc_easy": {"acc": 0.5}}
    assert seen["tasks"] == ["arc_easy"]
    assert (type(seen["model"]["pretrained"]).__name__, seen["model"]["batch_size"]) == ("LlamaForCausalLM", 4)
    assert call("eval", str(place / "llama"), "--lm-eval", "arc_easyy") == 2
    assert "no task 'arc_easyy'" in capsys.readouterr().err
