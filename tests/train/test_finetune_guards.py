"""What would make a fine-tuning run wrong, or end it late, is refused early."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints_for_tests import labelled_rows, save_checkpoint, sentences, tokenizer, write_rows
from finetune_parts import again, config, events, labelled, place, run

from trimtab.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from trimtab.finetuneconfig import FinetuneConfig, ScoreConfig
from trimtab.loadconfig import dump_config, load_tree
from trimtab.methods import registry
from trimtab.tasks import Written
from trimtab.tasks.batches import Part
from trimtab.tasks.encode import Encoder
from trimtab.train.headobjective import HeadObjective
from trimtab.train.material import prepare
from trimtab.train.score import score

__all__ = ["place"]  # a fixture

TASKS: list[dict[str, Any]] = [
    {"name": "classification", "train": "a.csv", "labels": ["a", "b"]},
    {"name": "regression", "train": ["a.csv", "b.csv"], "pair": "other"},
    {"name": "seq2seq", "train": {"dataset": "org/set", "split": "train"}},
    {"name": "language", "train": "a.txt", "validation_share": 0.2},
    {"name": "chat", "train": "a.jsonl", "system": "Be kind."},
    {"name": "glue", "subset": "mrpc", "folder": "glue"},
    {"name": "glue", "subset": "sst2", "revision": "abc"},
    {"name": "e2e", "folder": "e2e"},
    {"name": "e2e"},
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["name"])
@pytest.mark.parametrize("method", sorted(registry()))
def test_a_configuration_that_was_written_is_read_back(task: dict[str, Any], method: str, tmp_path: Path) -> None:
    """Whatever a run writes into its folder repeats it."""
    more = {"restart_every": 4} if method == "relora" else {}
    section = "{" + ", ".join(f"{k}: {v}" for k, v in {"name": method, **more}.items()) + "}"
    before = config(tmp_path, tmp_path, "bert", task, section, train__steps=40)
    (tmp_path / "config.yaml").write_text(dump_config(before), encoding="utf-8")
    assert load_tree(FinetuneConfig, tmp_path / "config.yaml") == before


def test_a_glue_run_from_a_folder_goes_on_and_is_repeated(place: Path, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("dev", 1)):
        rows = [(row["text"], str(int(row["label"] == "warm"))) for row in labelled_rows(40, seed)]
        with open(tmp_path / f"{split}.tsv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t").writerows([("sentence", "label"), *rows])
    task = {"name": "glue", "subset": "sst2", "folder": str(tmp_path)}
    run(place, tmp_path, "bert", task, train__stop_at=4)
    assert again(tmp_path / "run").finished


# -- going on --------------------------------------------------------------------------------------


def test_other_examples_are_noticed(place: Path, tmp_path: Path) -> None:
    task = {**labelled(place), "train": str(write_rows(tmp_path / "train.jsonl", labelled_rows(50)))}
    run(place, tmp_path, "bert", task, train__stop_at=4)
    write_rows(tmp_path / "train.jsonl", list(reversed(labelled_rows(50))))
    with pytest.raises(DataError, match="not those that the run was computed on"):
        again(tmp_path / "run")
    write_rows(tmp_path / "train.jsonl", labelled_rows(50))
    assert again(tmp_path / "run").finished


@pytest.mark.parametrize("word", ["eval.keep_best=true", "eval.examples=null", "eval.report=read", "eval.beams=2"])
def test_what_evaluations_are_compared_by_stays(word: str, place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "bert", labelled(place), eval__keep_best="false", eval__examples=8, train__stop_at=4)
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        again(tmp_path / "run", word)
    assert again(tmp_path / "run", "eval.batch=4", "log.every=2").finished


# -- early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_cannot_be_scored_is_found_before_the_first_step(split: str, place: Path, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"text": " ".join(sentences(40)), "label": "warm"}, *labelled_rows(9)])
    task = {**labelled(place), split: str(long)}
    with pytest.raises(DataError, match=rf"split '{split}': example 1 \({long}:1\) is longer"):
        run(place, tmp_path, "bert", task, data__too_long="error")
    assert not (tmp_path / "run").exists()


def test_words_that_the_tokenizer_cannot_write_are_found(place: Path, tmp_path: Path) -> None:
    """A tokenizer of these words alone has no letters for others."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["<unk>", "<eos>", "cold", "a", "cat"])}
    small = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=small, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(tmp_path / "words")
    with pytest.raises(DataError, match=r"label 'warm' .*model\.head=classes"):
        run(place, tmp_path, "llama", labelled(place), model__tokenizer=tmp_path / "words")


def test_positions_that_begin_behind_the_padding_are_counted_so(place: Path, tmp_path: Path) -> None:
    words = tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    roberta = transformers.RobertaConfig(**shape, **ids, max_position_embeddings=words.pad_token_id + 1 + 40)
    transformers.RobertaModel(roberta).save_pretrained(tmp_path / "roberta")
    words.save_pretrained(tmp_path / "roberta")
    material = prepare(config(tmp_path, tmp_path, "roberta", labelled(place), data__seq_len=None))
    assert material.config.data.length == 40
    with pytest.raises(ConfigError, match=r"data\.seq_len: 41 is longer than the 40 positions"):
        run(tmp_path, tmp_path, "roberta", labelled(place), data__seq_len=41)
    assert run(tmp_path, tmp_path, "roberta", labelled(place), data__seq_len=None, train__steps=2).finished


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_virtual_tokens_take_positions(place: Path, tmp_path: Path, family: str, method: str) -> None:
    """By default texts get what is left; more than that is refused before the first step; answers are written in it."""
    tokens = transformers.AutoTokenizer.from_pretrained(place / "llama")
    if family == "bert":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        hf = transformers.BertConfig(**shape, vocab_size=len(tokens), max_position_embeddings=40)
        transformers.BertModel(hf).save_pretrained(tmp_path / family)
    else:
        shape = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, vocab_size=len(tokens))).save_pretrained(
            tmp_path / family
        )
    tokens.save_pretrained(tmp_path / family)
    # Every second row is longer than the model's positions.
    rows = [
        {**row, "text": f"{row['text']} {' '.join(sentences(30) * (n % 2))}"} for n, row in enumerate(labelled_rows(20))
    ]
    task = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows[at::2]) for at, name in enumerate(("train", "validation"))
    }
    task = {"name": "classification", **{name: str(path) for name, path in task.items()}}
    chosen = f"{{name: {method}, length: 7}}"
    for wrong in (34, 41):
        says = (
            rf"data.seq_len: {wrong} is longer than the 33 that the method's 7 virtual tokens leave of the 40 positions"
        )
        with pytest.raises(ConfigError, match=says):
            run(tmp_path, tmp_path, family, task, chosen, data__seq_len=wrong)
    more = {"data__seq_len": None, "eval__max_new_tokens": 4, "train__steps": 2}
    done = run(tmp_path, tmp_path, family, task, chosen, **more)
    assert done.finished and done.scores is not None
    words = [f"model.name={tmp_path / family}", f"adapter={done.folder / 'adapter'}", f"task={json.dumps(task)}"]
    again_scored = score(load_tree(ScoreConfig, None, [*words, "dtype=fp32", "eval.max_new_tokens=4"]))
    assert again_scored.splits == done.scores.splits


# -- answers ---------------------------------------------------------------------------------------


def test_an_answer_has_room_and_the_end_of_its_prompt(place: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(place / "llama")
    encoder = Encoder(words, "causal", 100)
    (prompt,) = encoder.prompts([Written(" ".join(sentences(20)) + " Label:", ("x",))], 30)
    assert len(prompt) == 30
    assert words.decode(prompt).endswith(" Label:\n")


def test_answers_fit_into_learned_positions(tmp_path: Path, place: Path) -> None:
    words = tokenizer()
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(n_positions=48, n_embd=32, n_layer=1, n_head=4, bos_token_id=None, **ids)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    words.save_pretrained(tmp_path / "gpt2")
    assert run(tmp_path, tmp_path, "gpt2", labelled(place), data__seq_len=None, train__steps=2).finished


def test_others_score_with_answers_as_long_as_the_run_did(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "llama", labelled(place), train__steps=2)
    told = load_tree(FinetuneConfig, tmp_path / "run" / "config.yaml")
    words = transformers.AutoTokenizer.from_pretrained(place / "llama")
    longest = max(len(words(word, add_special_tokens=False)["input_ids"]) + 1 for word in ("warm", "cold"))
    assert told.eval.max_new_tokens == longest


def test_an_answer_may_repeat_its_prompt_but_not_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's way to write for E2E bans repeated n-grams; the attributes must be named as they are all the same."""
    material = prepare(config(place, place, "llama", labelled(place)))
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama").eval()
    scorer, width = material.scorer, 12
    prompt = list(range(10, 10 + width))
    seen: list[list[int]] = []

    def copying(input_ids: Any = None, **_: Any) -> Any:
        """A model that goes on with what it was given, from its beginning."""
        place_in = [min(row.shape[0] - width, width - 1) for row in input_ids]
        logits = torch.zeros(*input_ids.shape, model.config.vocab_size)
        for row, at in enumerate(place_in):
            logits[row, -1, prompt[at]] = 9.0
        seen.append(input_ids[0].tolist())
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    monkeypatch.setattr(model, "forward", copying)
    settings = {"max_new_tokens": width, "no_repeat_ngram_size": 4, "use_cache": False}
    monkeypatch.setattr("trimtab.train.scoring.adapters", lambda _: {"a": type("", (), {"no_cache": "it has none"})()})
    scorer._generate(model, [prompt], {k: v for k, v in settings.items() if k != "use_cache"})
    assert seen[-1][width:] == prompt[: width - 1]


def test_a_checkpoints_own_way_to_write_changes_no_score(place: Path, tmp_path: Path) -> None:
    written = []
    for least in (None, 20):
        folder = tmp_path / str(least)
        model = transformers.AutoModelForCausalLM.from_pretrained(save_checkpoint(folder / "llama", "llama"))
        model.generation_config.min_new_tokens = least
        model.save_pretrained(folder / "llama")
        run(folder, folder, "llama", labelled(place), train__steps=2)
        written.append((folder / "run" / "answers-validation.jsonl").read_text())
        assert [e["step"] for e in events(folder / "run", "step")] == [1, 2]
    assert written[0] == written[1]


def test_a_file_cannot_hold_hidden_states(place: Path, tmp_path: Path) -> None:
    """It is refused before the run's folder is made."""
    (tmp_path / "afile").write_text("mine")
    with pytest.raises(CheckpointError, match=r"^train.cache_hidden: .*afile cannot be used: File exists"):
        run(place, tmp_path, "bert", labelled(place), "read", train__cache_hidden=tmp_path / "afile")
    assert not (tmp_path / "run").exists()


def test_a_torn_checkpoint_is_named_once(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bert", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"^model.name: the folder .*torn cannot be read: (?!.*model.name)"):
        run(tmp_path, tmp_path, "torn", labelled(place))


def test_a_run_that_diverged_says_how_to_begin_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its curve stays until the user removes it; with a checkpoint it can be gone on with."""
    spoiled = {"at": 3}
    measure = HeadObjective.__call__

    def diverging(self: HeadObjective, part: Part) -> torch.Tensor:
        spoiled["at"] -= self.model.training
        return measure(self, part) * (float("nan") if spoiled["at"] < 0 else 1.0)

    monkeypatch.setattr(HeadObjective, "__call__", diverging)
    folder = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=rf"step 4: .*; to begin anew .*: rm -r {folder}$"):
        run(place, tmp_path, "bert", labelled(place))
    with pytest.raises(ConfigError, match=rf"name: {folder} exists .* remove it \(rm -r {folder}\), or choose another"):
        run(place, tmp_path, "bert", labelled(place))
    shutil.rmtree(folder)
    spoiled["at"] = 3
    with pytest.raises(NonFiniteError, match=rf"step 4: .*; the run goes on .* with --resume {folder} and what you"):
        run(place, tmp_path, "bert", labelled(place), checkpoint__every=2)
    spoiled["at"] = 0
    with pytest.raises(
        NonFiniteError, match=r"step 1: .*; no step was taken, so that the run can begin anew under its name$"
    ):
        run(place, tmp_path, "bert", labelled(place), name="other")
    spoiled["at"] = 100
    assert run(place, tmp_path, "bert", labelled(place), name="other").finished
