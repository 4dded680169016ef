"""`pretrain`, whole: from text to a run folder."""

from __future__ import annotations

import io
import json
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from test_checkpoint import child
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from trimtab.config import PretrainConfig
from trimtab.data.batches import validation_batches
from trimtab.data.tokens import build_store, store_folder
from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.loadconfig import dump_config, load_config
from trimtab.train import run as module
from trimtab.train.evaluate import evaluate
from trimtab.train.folder import sole_user
from trimtab.train.objective import Objective
from trimtab.train.run import RunResult, pretrain


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of made-up words."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=60))}) + "\n" for _ in range(200)))
    return path


def config(text: Path, out: Path, **changes: Any) -> PretrainConfig:
    """14 steps with a warm start of 3 and restarts at 7 and 11; changes are given as section__key=value."""
    tree: dict[str, Any] = {
        "name": "a",
        "out": str(out),
        "device": "cpu",
        "model": {"name": "llama-9m"},
        "data": {
            "sources": [str(text)], "tokenizer": {"bpe_vocab_size": 300}, "seq_len": 16, "validation_share": 0.1,
        },
        "method": {"name": "relora", "rank": 4, "restart_every": 4, "warm_start_steps": 3, "dropout": 0.1},
        "optim": {"lr": 4e-3, "warm_start_lr": 2e-3},
        "schedule": {"warmup_steps": 2, "rewarm_steps": 2},
        "train": {"steps": 14, "batch_tokens": 64, "micro_batch": 2},
        "eval": {"every": 5, "tokens": 100},
        "checkpoint": {"every": 4},
        "log": {"every": 1},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            tree[section] = {**tree.get(section, {}), key: value}
        else:
            tree[section] = value
    return PretrainConfig.model_validate(tree)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("time", "tokens_per_second", "seconds")}
        for record in found
        if record["event"] == event
    ]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, RunResult, str]:
    """One finished run in bf16, and what it printed."""
    asked = config(text, tmp_path_factory.mktemp("whole"))
    console = quiet()
    result = pretrain(asked, console=console)
    return asked, result, console.file.getvalue()  # type: ignore[attr-defined]


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


def test_stopping_and_resuming_twice_is_the_same_run(
    whole: tuple[PretrainConfig, RunResult, str], text: Path, tmp_path: Path
) -> None:
    """stop_at=2, then 9, then the end: the model folder and every record equal those of the unbroken run."""
    result = pretrain(config(text, tmp_path, train__stop_at=2), console=quiet())
    assert not result.finished
    assert (result.step, result.exit_status) == (2, 0)
    folder = result.folder
    assert (folder / "report.html").exists()
    assert not (folder / "model").exists()
    assert records(folder, "stop") == [{"event": "stop", "step": 2, "reason": "train.stop_at"}]
    pretrain(load_config(folder / "config.yaml", ["train.stop_at=9"]), resume=folder, console=quiet())
    assert pretrain(load_config(folder / "config.yaml", []), resume=folder, console=quiet()).finished
    for name in ("model/model.safetensors", "start.safetensors"):
        assert (folder / name).read_bytes() == (whole[1].folder / name).read_bytes(), name
    for event in ("step", "eval", "restart", "switch"):
        assert records(folder, event) == records(whole[1].folder, event)
    assert [r["step"] for r in records(folder, "resume")] == [2, 9]
    assert json.loads((folder / "spectrum.json").read_text()) == json.loads(
        (whole[1].folder / "spectrum.json").read_text()
    )


def test_a_finished_run_can_be_prolonged(
    whole: tuple[PretrainConfig, RunResult, str], text: Path, tmp_path: Path
) -> None:
    """More steps go on from the last checkpoint; the evaluation that was the end's is no more."""
    folder = pretrain(config(text, tmp_path, eval__every=0), console=quiet()).folder
    longer = load_config(folder / "config.yaml", ["train.steps=16"])
    assert pretrain(longer, resume=folder, console=quiet()).step == 16
    assert [r["step"] for r in records(folder, "eval")] == [16]
    assert [r["step"] for r in records(folder, "step")] == list(range(1, 17))
    again = pretrain(longer, resume=folder, console=quiet())
    assert again.finished
    assert [r["step"] for r in records(folder, "eval")] == [16]


def test_a_terminated_process_goes_on(whole: tuple[PretrainConfig, RunResult, str], text: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle ends with 143 and a checkpoint; resumed, the model is that of the unbroken run."""
    (tmp_path / "c.yaml").write_text(dump_config(config(text, tmp_path)))
    code = (
        "import sys; from pathlib import Path; from trimtab.loadconfig import load_config\n"
        "from trimtab.train.run import pretrain\n"
        "sys.exit(pretrain(load_config(Path(sys.argv[1]), [])).exit_status)"
    )
    process = child(code, str(tmp_path / "c.yaml"))
    metrics = tmp_path / "a" / "metrics.jsonl"
    while not metrics.exists() or '"event": "step"' not in metrics.read_text():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1].decode()
    assert process.returncode == 143, errors
    assert not (tmp_path / "a" / "model").exists()
    resumed = load_config(tmp_path / "a" / "config.yaml", [])
    assert pretrain(resumed, resume=tmp_path / "a", console=quiet()).finished
    name = "model/model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (whole[1].folder / name).read_bytes()


def test_a_damaged_checkpoint_is_said_and_not_used(
    whole: tuple[PretrainConfig, RunResult, str], text: Path, tmp_path: Path
) -> None:
    """The newest checkpoint has a wrong byte: the run goes on from the one before, says so, and ends the same."""
    folder = pretrain(config(text, tmp_path, train__stop_at=10), console=quiet()).folder
    file = folder / "checkpoints" / "step-00000010" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    console = quiet()
    assert pretrain(
        load_config(folder / "config.yaml", ["train.stop_at=null"]), resume=folder, console=console
    ).finished
    assert "step-00000010 is passed over" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [r["step"] for r in records(folder, "resume")] == [8]
    assert [r["step"] for r in records(folder, "step")] == list(range(1, 15))
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (whole[1].folder / name).read_bytes()


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


def test_a_used_folder_a_missing_checkpoint_and_a_changed_setting(
    whole: tuple[PretrainConfig, RunResult, str], tmp_path: Path
) -> None:
    """Each is one line, and nothing in the folder changes."""
    asked, result, _ = whole
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"--resume .*another name"):
        pretrain(asked, console=quiet())
    with pytest.raises(CheckpointError, match=r"holds no checkpoint to resume from"):
        pretrain(asked, resume=tmp_path, console=quiet())
    with pytest.raises(ConfigError, match=r"^seed: .* 0, .* 1 "):
        pretrain(asked.model_copy(update={"seed": 1}), resume=result.folder, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []


def test_distributed_runs_are_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's environment is noticed before anything is made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2"):
        pretrain(config(text, tmp_path), console=quiet())
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_refused_on_resume(text: Path, tmp_path: Path) -> None:
    """A run does not go on upon another store, even if the settings are the same."""
    asked = config(text, tmp_path, data__store=str(tmp_path / "store"), train__stop_at=1)
    folder = pretrain(asked, console=quiet()).folder
    other = tmp_path / "other.jsonl"
    other.write_text("".join(text.read_text().splitlines(keepends=True)[:150]))
    elsewhere = config(other, tmp_path, data__store=str(tmp_path / "second"), name="b", train__stop_at=1)
    pretrain(elsewhere, console=quiet())
    (tmp_path / "store").rename(tmp_path / "kept")
    (tmp_path / "second").rename(tmp_path / "store")
    with pytest.raises(DataError):
        pretrain(load_config(folder / "config.yaml", []), resume=folder, console=quiet())
    (tmp_path / "store").rename(tmp_path / "second")
    moved = [f"data.store={tmp_path / 'kept'}"]
    assert pretrain(load_config(folder / "config.yaml", moved), resume=folder, console=quiet()).finished


def test_a_full_disk_at_the_end_loses_nothing(
    whole: tuple[PretrainConfig, RunResult, str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space for model/: one line, nothing half written; --resume then writes it without training again."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.data.tokenizer.TextTokenizer.save", full)
        store = config(text, tmp_path, data__store=str(store_folder(whole[0].data, 0, whole[0].out)))
        with pytest.raises(CheckpointError, match=r"model could not be written.*No space left.*--resume"):
            pretrain(store, console=quiet())
    folder = tmp_path / "a"
    assert not [path for path in folder.iterdir() if path.name.startswith("model")]
    assert pretrain(load_config(folder / "config.yaml", []), resume=folder, console=quiet()).finished
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (whole[1].folder / name).read_bytes()
    assert len(records(folder, "step")) == 14


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_spoilt_start_file_costs_the_spectrum_alone(text: Path, tmp_path: Path, damage: str) -> None:
    """start.safetensors serves the report; without it the model is still merged, evaluated and written."""
    folder = pretrain(config(text, tmp_path, train__stop_at=9), console=quiet()).folder
    start = folder / "start.safetensors"
    start.write_bytes(start.read_bytes()[:1000])
    if damage == "gone":
        start.unlink()
    console = quiet()
    asked = load_config(folder / "config.yaml", ["train.stop_at=null"])
    assert pretrain(asked, resume=folder, console=console).finished
    assert "spectrum of the update cannot be shown" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (folder / "model" / "model.safetensors").exists()


def test_a_library_error_while_saving_is_one_line(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors turns a full disk into an error of its own; it is reported like any other."""

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"model could not be written.*No space left.*--resume"):
        pretrain(config(text, tmp_path), console=quiet())


def test_a_run_is_resumed_from_another_working_directory(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token store is found where it was made; no second one appears."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = pretrain(config(text, Path("runs"), train__stop_at=9), console=quiet()).folder.resolve()
    monkeypatch.chdir(tmp_path / "there")
    asked = load_config(folder / "config.yaml", ["train.stop_at=null"])
    assert pretrain(asked, resume=folder, console=quiet()).finished
    assert not list((tmp_path / "there").iterdir())
    with pytest.raises(ConfigError, match="name"):
        pretrain(load_config(folder / "config.yaml", ["name=other"]), resume=folder, console=quiet())


def test_two_processes_do_not_share_a_run(text: Path, tmp_path: Path) -> None:
    """While one works on a folder, another is turned away before it touches anything."""
    folder = pretrain(config(text, tmp_path, train__stop_at=9), console=quiet()).folder
    asked = load_config(folder / "config.yaml", ["train.stop_at=null"])
    before = (folder / "metrics.jsonl").read_bytes()
    with sole_user(folder), pytest.raises(ConfigError, match="another process is working on this run"):
        pretrain(asked, resume=folder, console=quiet())
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert pretrain(asked, resume=folder, console=quiet()).finished


def test_pure_is_said_aloud(text: Path, tmp_path: Path) -> None:
    """Training in pure bf16 comes with a warning."""
    console = quiet()
    pretrain(config(text, tmp_path, pure=True, train__stop_at=1), console=console)
    assert "warning: pure = true" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_demo_shortened(tmp_path: Path) -> None:
    """examples/demo.yaml with fewer steps and words: warm start, restarts, a lower loss, and a model that writes."""
    demo = Path(__file__).resolve().parents[2] / "examples" / "demo.yaml"
    small = ["model.name=llama-9m", "data.tokenizer.bpe_vocab_size=512", "data.seq_len=64", "train.batch_tokens=512"]
    fewer = ["train.steps=30", "method.warm_start_steps=8", "method.restart_every=5", "schedule.warmup_steps=2"]
    rest = ["schedule.rewarm_steps=2", "eval.every=10", "eval.tokens=2048", f"out={tmp_path}"]
    result = pretrain(load_config(demo, [*small, *fewer, *rest]), console=quiet())
    assert len(records(result.folder, "restart")) == 4
    losses = [record["loss"] for record in records(result.folder, "eval")]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    ids = tokenizer("Fellow citizens", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_a_run_that_ended_on_a_cycle_can_be_prolonged(text: Path, tmp_path: Path) -> None:
    """12 steps end where a cycle does; going on to 20 makes up for that restart, and ends as 20 steps in one go."""
    short = {
        "method": {"name": "relora", "rank": 4, "restart_every": 4},
        "schedule": {"rewarm_steps": 2, "shape": "constant"},
    }
    folder = pretrain(config(text, tmp_path, **short, train__steps=12), console=quiet()).folder
    assert [r["step"] for r in records(folder, "restart")] == [4, 8]
    asked = load_config(folder / "config.yaml", ["train.steps=20"])
    assert pretrain(asked, resume=folder, console=quiet()).finished
    assert [r["step"] for r in records(folder, "restart")] == [4, 8, 12, 16]
    whole = pretrain(config(text, tmp_path / "whole", **short, train__steps=20), console=quiet()).folder
    name = "model/model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_folder_whose_run_never_took_a_step_is_used_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full before the first step leaves no run behind: the same command works once there is room."""

    def full(*_: Any) -> None:
        raise CheckpointError("start.safetensors could not be written")

    asked = config(text, tmp_path, train__stop_at=2)
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.train.session.write_start", full)
        with pytest.raises(CheckpointError):
            pretrain(asked, console=quiet())
    assert (tmp_path / "a" / "config.yaml").exists()
    assert pretrain(asked, console=quiet()).step == 2
    with pytest.raises(ConfigError, match="exists and is not empty"):
        pretrain(asked, console=quiet())


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
