"""`finetune`: what a run leaves, that it can be loaded, that it goes on bit for bit, and that the best step is kept."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints_for_tests import write_rows
from finetune_parts import config, events, labelled, place, quiet, run
from rich.console import Console
from safetensors.torch import load_file

import trimtab
from trimtab.errors import ConfigError, DataError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.nn.stacks import find_stacks
from trimtab.tasks.base import Headline
from trimtab.tasks.batches import PadHead
from trimtab.tasks.encode import Encoded
from trimtab.tasks.ragged import Ragged
from trimtab.train.finetune import finetune
from trimtab.train.headobjective import HeadObjective
from trimtab.train.material import Material, prepare
from trimtab.train.scoring import Scorer, Scores

__all__ = ["place"]  # a fixture

SMALL = ["{name: bottleneck, size: 8}", "{name: ladder, reduction: 4}"]


@pytest.mark.parametrize("method", ["lora", "vera", "bitfit", "prompt", "read", "adalora", *SMALL])
def test_what_is_saved_scores_what_was_measured(method: str, place: Path, tmp_path: Path) -> None:
    """The adapter's folder, put on the checkpoint anew, has the run's final scores; the new head is in it."""
    length = {"data__seq_len": 100}  # beside the prompt's 20 virtual tokens, of 128 positions
    result = run(place, tmp_path, "bert", labelled(place), method, **length)
    assert result.finished
    assert result.scores is not None
    material = prepare(config(place, tmp_path, "bert", labelled(place), method, **length))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert", **material.settings)
    model.config.pad_token_id = material.tokenizer.pad_token_id
    trimtab.load_adapter(model, tmp_path / "run" / "adapter")
    found = material.scorer(model, material.objective(model))
    for name, value in result.scores.splits["validation"].items():
        assert found.splits["validation"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["scores"]["validation"] == pytest.approx(result.scores.splits["validation"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_full_training_leaves_a_model(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path, "bert", labelled(place), "full")
    assert not (tmp_path / "run" / "adapter").exists()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "cold", 1: "warm"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    rows = [json.loads(line) for line in (place / "held-out.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=120)).logits
        right += model.config.id2label[int(logits.argmax())] == row["label"]
    assert result.scores is not None
    assert result.scores.headline == Headline("accuracy", right / len(rows))


def test_it_learns(place: Path, tmp_path: Path) -> None:
    """The label is the first word's; chance is one half."""
    result = run(place, tmp_path, "bert", labelled(place), "full", train__steps=150, optim__lr=2e-3)
    assert result.scores is not None
    assert result.scores.headline.value > 0.85


@pytest.mark.parametrize("save", ["merged", "both"])
def test_a_merged_model_is_saved_when_asked(save: str, place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "llama", {"name": "chat", "train": str(place / "chats.jsonl")}, "lora", save=save)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert (tmp_path / "run" / "adapter").exists() == (save == "both")
    if save == "both":
        worn = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
        trimtab.load_adapter(worn, tmp_path / "run" / "adapter")
        ids = torch.arange(3, 20).unsqueeze(0)
        torch.testing.assert_close(merged(ids).logits, worn(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "task", "scored"),
    [
        ("llama", {"name": "seq2seq", "train": "pairs.jsonl", "source": "source", "target": "target"}, "ROUGE-1"),
        ("t5", {"name": "seq2seq", "train": "pairs.jsonl", "source": "source", "target": "target"}, "ROUGE-1"),
        ("llama", {"name": "classification", "train": "labelled.jsonl"}, "accuracy"),
        ("t5", {"name": "classification", "train": "labelled.jsonl"}, "accuracy"),
        ("llama", {"name": "chat", "train": "chats.jsonl"}, "perplexity"),
        ("llama", {"name": "language", "train": "texts.jsonl"}, "bits_per_byte"),
    ],
)
def test_each_form_on_each_kind_of_model(
    family: str, task: dict[str, Any], scored: str, place: Path, tmp_path: Path
) -> None:
    result = run(place, tmp_path, family, {**task, "train": str(place / task["train"])}, train__steps=3)
    assert result.scores is not None
    assert scored in result.scores.splits["validation"]


@pytest.mark.parametrize("task", ["pairs", "labelled"])
def test_each_answer_stands_beside_what_was_asked(task: str, place: Path, tmp_path: Path) -> None:
    """The source as the model was given it, and all that would have been right."""
    rows = [
        {"source": "the cat", "target": ["cat", "a cat"], "text": "the cat", "label": "warm"},
        {"source": "river", "target": ["river"], "text": "river", "label": "cold"},
    ]
    name = {"pairs": "seq2seq", "labelled": "classification"}[task]
    prompt = {"pairs": "cut: {source}", "labelled": "cut: {text}"}[task]
    files = {"train": str(place / f"{task}.jsonl"), "validation": str(write_rows(tmp_path / "val.jsonl", rows))}
    run(place, tmp_path, "t5", {"name": name, "prompt": prompt, **files}, train__steps=2)
    found = [json.loads(line) for line in (tmp_path / "run" / "answers-validation.jsonl").read_text().splitlines()]
    right = [row["target"] if task == "pairs" else [row["label"]] for row in rows]
    assert [(row["source"], row["references"]) for row in found] == [
        (f"cut: {row['source']}", references) for row, references in zip(rows, right, strict=True)
    ]
    assert all(isinstance(row["answer"], str) for row in found)


# -- going on, and going back ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "read"])
def test_a_stopped_run_goes_on_bit_for_bit(method: str, place: Path, tmp_path: Path) -> None:
    whole = run(place, tmp_path / "a", "bert", labelled(place), method, train__steps=30, eval__every=7)
    run(place, tmp_path / "b", "bert", labelled(place), method, train__steps=30, eval__every=7, train__stop_at=17)
    folder = tmp_path / "b" / "run"
    assert not (folder / "results.json").exists()
    told = load_tree(FinetuneConfig, folder / "config.yaml")
    went_on = finetune(told, resume=folder, console=quiet())
    assert (went_on.finished, went_on.best_step) == (True, whole.best_step)
    assert went_on.scores == whole.scores
    name = "adapter_model.safetensors"
    one, other = (load_file(tmp_path / side / "run" / "adapter" / name) for side in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[r["loss"] for r in events(tmp_path / side / "run", "step")] for side in "ab"]
    assert losses[0] == losses[1]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Headlines that evaluations while training will have, one after the other; the end is measured."""
    values: list[float] = []
    measure = Scorer.__call__

    def scored(self: Scorer, *arguments: Any, **options: Any) -> Scores:
        found = measure(self, *arguments, **options)
        return Scores(found.splits, Headline("accuracy", values.pop(0)), {}) if values else found

    monkeypatch.setattr(Scorer, "__call__", scored)
    return values


def test_the_best_step_is_kept(place: Path, tmp_path: Path, scripted: list[float]) -> None:
    """Evaluated after 3, 6, 9 and 12 steps, the best after 6: what is saved is what the same run has there."""
    scripted += [0.5, 0.9, 0.7, 0.9]
    result = run(place, tmp_path / "a", "bert", labelled(place), "lora", eval__every=3, checkpoint__keep=1)
    assert (result.step, result.best_step) == (12, 6)
    names = sorted(path.name for path in (tmp_path / "a" / "run" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000012"]
    run(place, tmp_path / "b", "bert", labelled(place), "lora", train__stop_at=6)
    checkpoint = tmp_path / "b" / "run" / "checkpoints" / "step-00000006" / "adapter.safetensors"
    saved = load_file(tmp_path / "a" / "run" / "adapter" / "adapter_model.safetensors")
    wanted = load_file(checkpoint)
    for name, tensor in wanted.items():  # the two name them in their own ways
        assert any(torch.equal(other, tensor) for other in saved.values()), name
    assert result.scores is not None
    results = json.loads((tmp_path / "a" / "run" / "results.json").read_text())
    assert (results["kept_step"], results["steps"]) == (6, 12)


def test_without_keep_best_the_last_step_is_saved(place: Path, tmp_path: Path, scripted: list[float]) -> None:
    scripted += [0.9, 0.5, 0.5]
    result = run(place, tmp_path, "bert", labelled(place), "lora", eval__every=3, eval__keep_best="false")
    assert (result.step, result.best_step) == (12, 12)


def test_patience_ends_a_run_that_gets_no_better(place: Path, tmp_path: Path, scripted: list[float]) -> None:
    scripted += [0.5, 0.8, 0.8, 0.7]
    result = run(place, tmp_path, "bert", labelled(place), "lora", eval__every=2, eval__patience=2, train__steps=40)
    assert (result.finished, result.step, result.best_step) == (True, 8, 4)


def test_a_run_that_goes_on_remembers_its_best(place: Path, tmp_path: Path, scripted: list[float]) -> None:
    scripted += [0.9]
    run(place, tmp_path, "bert", labelled(place), "lora", eval__every=3, train__stop_at=5, checkpoint__keep=1)
    scripted += [0.5, 0.5, 0.5]
    told = load_tree(FinetuneConfig, tmp_path / "run" / "config.yaml")
    result = finetune(told, resume=tmp_path / "run", console=quiet())
    assert (result.step, result.best_step) == (12, 3)


# -- losses ----------------------------------------------------------------------------------------


def test_the_loss_of_a_head_is_that_of_transformers(place: Path) -> None:
    for labels, kind in ((3, "single_label_classification"), (1, "regression")):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            place / "bert", num_labels=labels, problem_type=kind
        )
        values = np.asarray([2.0, 0.0]) if labels == 3 else np.asarray([0.5, -1.5])
        part = PadHead(0)(Encoded(Ragged.of([[5, 6, 7], [8, 9]]), np.arange(2), labels=values), [0, 1])
        own = model.eval()(
            input_ids=part.input_ids,
            attention_mask=part.attention_mask,
            labels=part.labels.long() if labels == 3 else part.labels.float(),
        ).loss
        torch.testing.assert_close(HeadObjective(model, labels if labels == 3 else 0)(part) / 2, own)


def test_micro_batches_change_nothing(place: Path, tmp_path: Path) -> None:
    losses = []
    for micro in (None, 3):
        out = tmp_path / str(micro)
        run(place, out, "llama", {"name": "chat", "train": str(place / "chats.jsonl")}, train__micro_batch=micro)
        losses.append([record["loss"] for record in events(out / "run", "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- what is refused, before anything is written ---------------------------------------------------


LABELLED = {"name": "classification", "train": "labelled.jsonl"}
CHATS = {"name": "chat", "train": "chats.jsonl"}
TEXTS = {"name": "language", "train": "texts.jsonl"}
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("bert", CHATS, {}, r"model\.name: .*encoder, which writes nothing, and a task of chats .*; take a causal model$"),
    ("t5", TEXTS, {}, r"model\.name: .*a task of plain texts is for causal models"),
    ("llama", CHATS, {"model__head": "classes"}, r"model\.head = classes: the task has no labels, being one of chats"),
    ("bert", LABELLED, {"model__head": "words"}, r"model\.head = words"),
    ("bert", LABELLED, {"data__seq_len": 4096}, r"data\.seq_len: 4096 is longer than the 128 positions"),
    ("bert", LABELLED, {"model__name": "llama-9m"}, r"model\.name: llama-9m is a preset, .* for `trimtab pretrain`"),
    ("nothing", LABELLED, {}, r"model\.name: there is no folder"),
    ("llama", {**CHATS, "train": "missing.jsonl"}, {}, r"task\.train: .*missing\.jsonl"),
    ("llama", {**CHATS, "train": "labelled.jsonl"}, {}, r"labelled\.jsonl:1"),
    ("bert", {**LABELLED, "train": "chats.jsonl"}, {}, r"chats\.jsonl:1: no column 'text'"),
    ("llama", CHATS, {"model__tokenizer": "no/where/at/all"}, r"model\.tokenizer"),
    ("llama", CHATS, {"data__seq_len": 8}, r"nothing is left of its .* Raise data\.seq_len = 8"),
]


@pytest.mark.parametrize(("family", "task", "changes", "says"), WRONG, ids=[case[3][:30] for case in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(
    family: str, task: dict[str, Any], changes: dict[str, Any], says: str, place: Path, tmp_path: Path
) -> None:
    given = {**task, "train": str(place / task["train"])}
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        run(place, tmp_path, family, given, **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(place: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ConfigError, match=r"model\.tokenizer: .* has \d+ tokens and .* embeddings for"):
        run(place, tmp_path, "bert", labelled(place), model__tokenizer=tmp_path / "words")


def test_targets_that_match_nothing_are_found_before_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.train.material.build_task_model", None)  # weights are not asked for
    with pytest.raises(trimtab.TargetError):
        run(place, tmp_path, "bert", labelled(place), "{name: lora, targets: [nothing]}")


# -- hidden states that are kept -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_kept_hidden_states_change_nothing_but_what_is_computed(
    family: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored exactly, the losses are those without a cache; after the first epoch the blocks do not run."""
    blocks = 0
    build = Material.model

    def counted(self: Material) -> Any:
        def count(*_: Any) -> None:
            nonlocal blocks
            blocks += model.training  # scoring goes past the cache

        model = build(self)
        inside = next(m for m in find_stacks(model)[-1].blocks[0].modules() if isinstance(m, torch.nn.Linear))
        inside.register_forward_hook(count)
        return model

    monkeypatch.setattr(Material, "model", counted)
    task = {
        "name": "classification",
        "train": str(place / "held-out.jsonl"),
        "validation": str(place / "labelled.jsonl"),
    }
    told = {"train__steps": 20, "data__packing": "false", "eval__every": 20, "eval__examples": 8}
    losses, runs = [], []
    for kept in (None, tmp_path / "states"):
        blocks = 0
        out = tmp_path / str(kept is None)
        more = {} if kept is None else {"train__cache_hidden": kept, "train__cache_storage": "exact"}
        run(place, out, family, task, "read", **told, **more)
        losses.append([record["loss"] for record in events(out / "run", "step")])
        runs.append(blocks)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert runs[0] >= 20
    assert runs[1] < runs[0] - 10


def test_a_run_with_kept_states_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    """Also when they are gone: what the completed steps stored is computed anew in the same micro-batches."""
    losses = []
    for side in "ab":
        folder = tmp_path / side
        states = {"train__cache_hidden": folder / "states", "train__micro_batch": 4, "train__steps": 30}
        stop = {} if side == "a" else {"train__stop_at": 11}
        run(place, folder, "bert", labelled(place), "read", **states, **stop)
        if side == "b":
            shutil.rmtree(folder / "states")
            finetune(load_tree(FinetuneConfig, folder / "run" / "config.yaml"), resume=folder / "run", console=quiet())
        losses.append([record["loss"] for record in events(folder / "run", "step")])
    assert losses[0] == losses[1]


def test_packed_sequences_are_not_kept(place: Path, tmp_path: Path) -> None:
    task = {"name": "chat", "train": str(place / "chats.jsonl")}
    with pytest.raises(ConfigError, match=r"train\.cache_hidden: .*data\.packing=false"):
        run(place, tmp_path, "llama", task, "read", train__cache_hidden=tmp_path / "states")
    with pytest.raises(ConfigError, match=r"train\.cache_hidden: .*method lora"):
        run(place, tmp_path, "bert", labelled(place), "lora", train__cache_hidden=tmp_path / "states")


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_a_model_none_of_whose_answers_can_be_read_is_told_of(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with an answer; such answers stand at the far end of the labels."""
    rows = [{"text": f"{text} {number}", "label": number} for number, text in enumerate("abcdefgh")]
    files = {key: str(write_rows(tmp_path / f"{key}.jsonl", rows)) for key in ("train", "validation")}
    told = Console(file=io.StringIO(), width=500)
    answers = {"wrote": "Hm"}
    monkeypatch.setattr(Scorer, "_generate", lambda self, model, prompts, settings: [answers["wrote"]] * len(prompts))
    for out in ("a", "b"):
        made = finetune(config(place, tmp_path / out, "t5", {"name": name, **files}, train__steps=1), console=told)
        warnings = [line for line in told.file.getvalue().splitlines() if line.startswith("warning: no answer")]  # type: ignore[attr-defined]
        assert len(warnings) == 1  # of the first run alone
        answers["wrote"] = "3"
        if out == "a":
            assert "on validation can be read" in warnings[0]
            assert "wrote 'Hm', and '0' was due" in warnings[0]
            assert made.scores is not None
            assert made.scores.splits["validation"]["unreadable"] == 1.0
            if name == "regression":
                assert made.scores.splits["validation"]["mse"] == np.mean([7**2, 6**2, 5**2, 4**2] * 2)
