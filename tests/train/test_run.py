"""`pretrain`, whole: from text to a run folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from run_parts import config, quiet, records
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from trimtab.config import PretrainConfig
from trimtab.data.batches import validation_batches
from trimtab.data.sources import package_file
from trimtab.data.tokens import build_store, store_folder
from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.loadconfig import load_config
from trimtab.train import run as module
from trimtab.train.evaluate import evaluate
from trimtab.train.objective import Objective
from trimtab.train.run import RunResult, pretrain


def test_a_finished_run_has_everything(whole: tuple[PretrainConfig, RunResult, str]) -> None:
    """The run folder holds what was promised, nothing temporary, and the result tells of it."""
    asked, result, printed = whole
    assert result.finished
    assert (result.step, result.exit_status) == (14, 0)
    assert {path.name for path in result.folder.iterdir()} == {
        "checkpoints", "config.yaml", "metrics.jsonl", "model", "parameters.json", "report.html", "spectrum.json",
        "start.safetensors",
    }  # fmt: skip
    assert load_config(result.folder / "config.yaml", []) == asked
    assert [r["step"] for r in records(result.folder, "step")] == list(range(1, 15))
    assert [r["step"] for r in records(result.folder, "restart")] == [7, 11]
    assert [r["step"] for r in records(result.folder, "eval")] == [5, 10, 14]
    assert records(result.folder, "eval")[-1]["final"]
    assert records(result.folder, "eval")[-1]["merged"]
    assert "warm start" in printed
    assert "measured peak resident memory" in printed


def test_the_model_folder_is_the_evaluated_model(whole: tuple[PretrainConfig, RunResult, str]) -> None:
    """Hugging Face loads model/ in bf16, and it scores to the bit what the run said of the merged model."""
    asked, result, _ = whole
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    assert model.dtype == torch.bfloat16
    store = build_store(asked.data, asked.seed, store_folder(asked.data, asked.seed, asked.out))
    batches = validation_batches(store.validation, 16, 100, 2, eos_id=store.tokenizer.eos_id)
    found = evaluate(model, Objective(model), batches)
    assert result.evaluation == found
    assert found.tokens == 100
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    assert len(tokenizer) == model.config.vocab_size == 300


def test_the_model_folder_is_the_merged_model_to_the_bit(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that from_pretrained loads equals the merged model's in memory."""
    kept: dict[str, torch.Tensor] = {}
    save = module.save_model

    def spy(model: Any, *rest: Any) -> None:
        kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        save(model, *rest)

    monkeypatch.setattr(module, "save_model", spy)
    result = pretrain(config(text, tmp_path), console=quiet())
    loaded = AutoModelForCausalLM.from_pretrained(result.folder / "model").state_dict()
    assert loaded.keys() == kept.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, kept[name]), name


def test_the_update_has_the_rank_of_its_restarts(whole: tuple[PretrainConfig, RunResult, str]) -> None:
    """Two restarts of rank 4: each update's rank is above 4 and at most 12, the warm start not counted."""
    spectrum = json.loads((whole[1].folder / "spectrum.json").read_text())
    ranks = [matrix["rank"] for matrix in spectrum["matrices"]]
    assert len(ranks) == 4 * 7
    assert all(4 < rank <= 12 for rank in ranks)
    assert (spectrum["rank"], spectrum["restarts"]) == (4, 2)


def test_memory_was_foretold(whole: tuple[PretrainConfig, RunResult, str]) -> None:
    """Both phases were counted before the first step, and the second one turned out so."""
    parameters = json.loads((whole[1].folder / "parameters.json").read_text())
    warm, adapted = parameters["phases"]
    assert (warm["phase"], adapted["phase"], adapted["from_step"]) == ("warm start", "adapter", 3)
    assert warm["trainable"] == warm["total"]
    assert warm["memory"]["weights"] >= 4 * warm["total"]
    assert adapted["memory"]["carry_host"] == 2 * warm["groups"]["base"]
    assert parameters["measured"]["peak_resident"] > sum(warm["memory"].values())
    assert "memory as foretold" in whole[2]
    assert whole[2].count("trainable parameters") == 1


def test_it_runs_off_the_main_thread(text: Path, tmp_path: Path) -> None:
    """A notebook's worker thread may call it: no signal handlers are needed."""
    found: list[RunResult] = []
    thread = threading.Thread(
        target=lambda: found.append(pretrain(config(text, tmp_path, train__stop_at=1), console=quiet()))
    )
    thread.start()
    thread.join()
    assert found[0].step == 1


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "lora", "rank": 4}])
def test_other_methods_take_the_same_path(text: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """Full training and LoRA, in fp32; LoRA's update stays at its rank, which is the control of ReLoRA's."""
    asked = config(text, tmp_path, method=method, dtype="fp32", schedule={}, train__steps=6)
    result = pretrain(asked, console=quiet())
    assert result.finished
    ranks = [matrix["rank"] for matrix in json.loads((result.folder / "spectrum.json").read_text())["matrices"]]
    assert max(ranks) <= 4 if method["name"] == "lora" else max(ranks) > 12
    assert AutoModelForCausalLM.from_pretrained(result.folder / "model").dtype == torch.float32


@pytest.mark.parametrize(
    "method",
    [
        {"name": "vera", "rank": 16},
        {"name": "adalora", "rank": 2, "init_rank": 3},
        {"name": "ia3"},
        {"name": "bitfit", "add_bias": True},
        {"name": "bottleneck", "size": 4},
        {"name": "prompt", "length": 3},
        {"name": "prefix", "length": 3},
        {"name": "read", "size": 4},
        {"name": "ladder", "reduction": 4},
    ],
    ids=lambda method: method["name"],
)
def test_every_method_ends_in_a_model_that_scores_as_was_said(
    text: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Merged into model/, or, without a merged form, beside it in adapter/: loaded again, both score the same."""
    asked = config(text, tmp_path, method=method, dtype="fp32", schedule={}, train__steps=4)
    result = pretrain(asked, console=quiet())
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    merged = records(result.folder, "eval")[-1]["merged"]
    assert merged == (method["name"] in ("vera", "adalora", "ia3"))
    assert (result.folder / "adapter").exists() != merged
    if not merged:
        trimtab.load_adapter(model, result.folder / "adapter")
    store = build_store(asked.data, asked.seed, store_folder(asked.data, asked.seed, asked.out))
    batches = validation_batches(store.validation, 16, 100, 2, eos_id=store.tokenizer.eos_id)
    assert result.evaluation is not None
    assert evaluate(model, Objective(model), batches).loss == pytest.approx(result.evaluation.loss, rel=1e-5)


def test_distributed_runs_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's environment is noticed before anything is made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2"):
        pretrain(config(text, tmp_path), console=quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_library_error_while_saving_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors turns a full disk into an error of its own; it is reported like any other."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"model could not be written.*No space left.*--resume"):
        pretrain(config(text, tmp_path), console=quiet())


def test_pure_is_said_aloud(text: Path, tmp_path: Path) -> None:
    """Training in pure bf16 comes with a warning."""
    console = quiet()
    pretrain(config(text, tmp_path, pure=True, train__stop_at=1), console=console)
    assert "warning: pure = true" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_demo_shortened(tmp_path: Path) -> None:
    """examples/demo.yaml with fewer speeches, steps, words: warm start, restarts, a lower loss, a model that writes."""
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo.yaml"
    (speeches,) = load_config(demo, []).data.sources
    some = sorted(package_file(speeches, "data.sources").iterdir())[::10]
    texts = [f"data.sources={json.dumps([f'{speeches}/{file.name}' for file in some])}", "data.validation_share=0.2"]
    small = ["model.name=llama-9m", "data.tokenizer.bpe_vocab_size=512", "data.seq_len=64", "train.batch_tokens=512"]
    fewer = ["train.steps=30", "method.warm_start_steps=8", "method.restart_every=5", "schedule.warmup_steps=2"]
    rest = ["schedule.rewarm_steps=2", "eval.every=10", "eval.tokens=2048", f"out={tmp_path}"]
    result = pretrain(load_config(demo, [*texts, *small, *fewer, *rest]), console=quiet())
    assert len(records(result.folder, "restart")) == 4
    losses = [record["loss"] for record in records(result.folder, "eval")]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    ids = tokenizer("Fellow citizens", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_too_little_text_is_known_at_the_start(text: Path, tmp_path: Path) -> None:
    """A sequence longer than the text: one line, and no run folder."""
    with pytest.raises(DataError, match=r"data\.seq_len"):
        pretrain(
            config(text, tmp_path, data__seq_len=100_000, train__batch_tokens=100_000, train__micro_batch=1),
            console=quiet(),
        )
    assert not (tmp_path / "a").exists()


def test_one_schedule_for_all(text: Path, tmp_path: Path) -> None:
    """The schedule's restarts are those of the method, and its warm start is the method's switch."""
    asked = config(text, tmp_path)
    schedule = asked.multiplier()
    assert schedule.restarts == asked.method.restarts(14, 2) == (7, 11)
    assert schedule.warm_start_steps == asked.method.switch_step == 3
