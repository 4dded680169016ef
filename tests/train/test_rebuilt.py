"""What a checkpoint of a fine-tuning run leaves out, since the model it began with can be built again."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_parts import again, labelled, place, quiet, run
from finetune_parts import config as told
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.nn.nf4layer import DOUBLE_SCALES
from trimtab.report.spectrum import Spectrum
from trimtab.train import finetune as finetuning
from trimtab.train.asbuilt import AsBuilt, fingerprint
from trimtab.train.checkpoint import load
from trimtab.train.material import Material

__all__ = ["place"]  # a fixture

STEPS = {"train__steps": 14, "eval__every": 50, "train__stop_at": 7}
RESTARTS = "{name: relora, rank: 4, restart_every: 3, warm_start_steps: 0, train_also: []}"
WARM = "{name: relora, rank: 4, restart_every: 6, warm_start_steps: 3, train_also: [head]}"
WARM_LORA = "{name: lora, rank: 4, warm_start_steps: 3}"
PISSA = "{name: lora, rank: 4, init: pissa, train_also: [head]}"


def stored(folder: Path, step: int = 7) -> set[str]:
    """What the base's file of a checkpoint holds."""
    with safe_open(folder / "checkpoints" / f"step-{step:08d}" / "base.safetensors", framework="pt") as file:
        return set(file.keys())


def first_after_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 is the best, whatever it scores."""

    def offered(self: Any, step: int, headline: Any) -> bool:
        self.seen = step
        if step == 4:
            self.step = 4
        return step == 4

    monkeypatch.setattr(finetuning.Best, "offer", offered)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "{name: lora, dora: true, train_also: [head, norms]}",
        "{name: vera, rank: 8}",
        "{name: bitfit, add_bias: true}",
        "{name: bottleneck, size: 8}",
        "{name: prefix, length: 4}",
        "{name: read, size: 8}",
        "{name: adalora, rank: 4}",
    ],
)
def test_a_base_that_stays_as_it_was_is_left_out(
    method: str, quantize: str | None, place: Path, tmp_path: Path
) -> None:
    run(place, tmp_path, "bert", labelled(place), method, model__quantize=quantize, **STEPS)
    kept = {name for name in stored(tmp_path / "run") if name.rpartition(".")[2] not in DOUBLE_SCALES}
    assert not kept


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    ("method", "family"),
    [(RESTARTS, "llama"), (PISSA, "bert"), (WARM, "bert"), (WARM_LORA, "bert")],
    ids=["restarts", "pissa", "warm start with restarts", "warm start"],
)
def test_what_a_method_writes_into_is_stored(
    method: str, family: str, optimizer: str, place: Path, tmp_path: Path
) -> None:
    """Also by a run that has gone on; and that run has the numbers of one that was not stopped.

    A warm start trains what is frozen afterwards, by optimizers that torch's counters do not see.
    """
    steps = STEPS | {"optim__name": optimizer}
    run(place, tmp_path / "a", family, labelled(place), method, **steps | {"train__stop_at": None})
    run(place, tmp_path / "b", family, labelled(place), method, **steps)
    folder = tmp_path / "b" / "run"
    found = stored(folder)
    assert found
    if "warm_start_steps: 3" in method:
        assert any("word_embeddings" in name for name in found)
    else:
        assert all(name.endswith("proj.weight") or ".attention." in name or ".dense." in name for name in found)
    again(folder, "train.stop_at=9")
    assert stored(folder, 9) == found
    again(folder)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        if (folder / name).exists():
            one, other = load_file(tmp_path / "a" / "run" / name), load_file(folder / name)
            assert all(torch.equal(one[key], other[key]) for key in one)
            break
    else:
        pytest.fail("nothing was saved")


@pytest.mark.parametrize("method", [WARM, WARM_LORA], ids=["with restarts", "without"])
def test_the_best_step_behind_a_warm_start_is_gone_back_to(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_after_warm_start(monkeypatch)
    result = run(place, tmp_path, "bert", labelled(place), method, train__steps=14, eval__every=2)
    assert (result.finished, result.best_step) == (True, 4)


def test_scales_of_four_bits_are_stored(place: Path, tmp_path: Path) -> None:
    """They are sums, which another number of threads rounds otherwise; what they scale is not."""
    run(place, tmp_path, "llama", labelled(place), "lora", model__quantize="nf4", **STEPS)
    found = stored(tmp_path / "run")
    assert {name.rpartition(".")[2] for name in found} == {*DOUBLE_SCALES}
    checkpoint = load(tmp_path / "run" / "checkpoints" / "step-00000007")
    assert any(name.endswith("q_proj.weight") for name in checkpoint.state["rebuilt"])


def test_what_was_drawn_is_stored(place: Path, tmp_path: Path) -> None:
    """A head that stays frozen stands in no checkpoint of the model's, and another torch may draw it otherwise."""
    run(place, tmp_path, "bert", labelled(place), "{name: lora, train_also: []}", **STEPS)
    assert stored(tmp_path / "run") == {"classifier.weight", "classifier.bias"} | {
        name for name in stored(tmp_path / "run") if "pooler" in name
    }


def test_full_training_stores_each_tensor_once(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "bert", labelled(place), "full", **STEPS)
    assert not stored(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    assert len(load_file(checkpoint / "adapter.safetensors")) >= len(load_file(place / "bert" / "model.safetensors"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_and_rows_that_were_moved_are_known_again(method: str, place: Path, tmp_path: Path) -> None:
    """The run that goes on elsewhere has the numbers of one that stayed; another configuration is refused."""
    whole = run(place, tmp_path / "whole", "bert", labelled(place), method, train__steps=14, eval__every=50)
    for name in ("bert", "labelled.jsonl", "held-out.jsonl"):
        (shutil.copytree if name == "bert" else shutil.copy)(place / name, tmp_path / name)
    run(tmp_path, tmp_path, "bert", labelled(tmp_path), method, **STEPS)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("bert", "labelled.jsonl", "held-out.jsonl"):
        (tmp_path / name).rename(moved / name)
    rows = [f"task.{key}={value}" for key, value in labelled(moved).items() if key != "name"]
    config = moved / "bert" / "config.json"
    right = config.read_text()
    config.write_text(right.replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-06'))
    with pytest.raises(
        ConfigError, match=r"^model.name = \S+/moved/bert: its config.json is not that of \S+/bert, with"
    ):
        again(tmp_path / "run", f"model.name={moved / 'bert'}", *rows)
    config.write_text(right)
    (moved / "labelled.jsonl").write_text((moved / "labelled.jsonl").read_text().replace("a", "o", 1))
    with pytest.raises(DataError, match="the examples of the task are not those"):
        again(tmp_path / "run", f"model.name={moved / 'bert'}", *rows)
    shutil.copy(place / "labelled.jsonl", moved / "labelled.jsonl")
    with pytest.raises(ConfigError, match=r"^task.max_eval: the run was computed with"):
        again(tmp_path / "run", f"model.name={moved / 'bert'}", *rows, "task.max_eval=3")
    done = again(tmp_path / "run", f"model.name={moved / 'bert'}", *rows)
    assert done.scores == whole.scores


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    """A model folder that has changed since, by one number in one tensor."""
    shutil.copytree(place / "bert", tmp_path / "bert")
    run(tmp_path, tmp_path, "bert", labelled(place), "lora", **STEPS)
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][0, 0] += 2.0**-20
    save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"is of another base than model.name has now: \S*{name} changed; put"):
        again(tmp_path / "run")


def test_what_was_written_unseen_is_noticed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.data` tells no one; then the checkpoint cannot be gone on from, and does not go on with another model."""
    attach = finetuning._Run.attach

    def attached(self: Any, model: Any, *rest: Any) -> Any:
        found = attach(self, model, *rest)
        model.bert.embeddings.word_embeddings.weight.data[3] += 1.0
        return found

    with monkeypatch.context() as patch:
        patch.setattr(finetuning._Run, "attach", attached)
        run(place, tmp_path, "bert", labelled(place), "lora", **STEPS)
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight changed"):
        again(tmp_path / "run")


def test_a_checkpoint_with_the_whole_base_is_read(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those were that knew of no model that is built again."""
    with monkeypatch.context() as patch:
        patch.setattr(finetuning._Run, "rebuilds", False)
        run(place, tmp_path, "bert", labelled(place), "lora", **STEPS)
    assert len(stored(tmp_path / "run")) > 20
    assert not load(tmp_path / "run" / "checkpoints" / "step-00000007").state["rebuilt"]
    assert again(tmp_path / "run").finished


@pytest.mark.parametrize(
    ("method", "quantize", "filed"),
    [
        ("{name: lora, rank: 4}", None, False),
        ("{name: lora, rank: 4}", "nf4", False),
        ("{name: lora, rank: 4, dora: true}", None, False),
        ("{name: lora, rank: 4, init: orthogonal}", None, False),
        ("{name: vera, rank: 8}", None, False),
        ("{name: adalora, rank: 4}", None, False),
        ("{name: ia3}", None, False),
        ("{name: bitfit}", None, False),
        (PISSA, None, True),
        (RESTARTS, None, True),
        ("full", None, True),
    ],
)
def test_the_spectrum_needs_no_copy_of_weights_that_stay(
    method: str, quantize: str | None, filed: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same as with a file of the weights at attach, which is written only where they are lost otherwise."""
    changes = {"train__steps": 7, "model__quantize": quantize}
    run(place, tmp_path / "a", "bert", labelled(place), method, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(finetuning._Run, "rebuilds", False)
        run(place, tmp_path / "b", "bert", labelled(place), method, **changes)
    assert (tmp_path / "a" / "run" / "start.safetensors").exists() == filed
    assert (tmp_path / "b" / "run" / "start.safetensors").exists()
    ours, theirs = (Spectrum.load(tmp_path / side / "run" / "spectrum.json") for side in "ab")
    assert [matrix.name for matrix in ours.matrices] == [matrix.name for matrix in theirs.matrices]
    for one, other in zip(ours.matrices, theirs.matrices, strict=True):
        assert one.rank == other.rank
        assert one.start_frobenius == pytest.approx(other.start_frobenius, rel=1e-6)
        largest = other.singular_values[0]
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-4, abs=1e-5 * largest)
    if method != "{name: bitfit}":  # which updates no matrix
        assert any(matrix.rank for matrix in ours.matrices)


def test_going_back_holds_one_model(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a run whose best step was an earlier one, the last step's model is gone before that one comes."""
    build: Any = Material.model
    alive: list[int] = []
    built: list[weakref.ref[Any]] = []

    def counted(self: Material) -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in built))
        model = build(self)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Material, "model", counted)
    first_after_warm_start(monkeypatch)
    result = finetuning.finetune(
        told(place, tmp_path, "bert", labelled(place), "lora", train__steps=8, eval__every=2), console=quiet()
    )
    assert result.best_step == 4
    assert alive == [0, 0]


def test_tensors_that_were_moved_or_written_are_told_apart() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    built = AsBuilt(model)
    known = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor in built}
    assert known == {"0.weight", "0.bias", "1.weight", "1.bias"}
    model[1].weight.requires_grad_(False)
    built.forget_trained(model[1])
    assert model[1].weight in built
    assert model[1].bias not in built
    with torch.no_grad():
        model[0].bias.add_(0.0)
    model[0].weight.data = model[0].weight.data.clone()
    assert model[0].bias not in built
    assert model[0].weight not in built
    assert model[0].weight.detach() not in built


def test_fingerprints_tell_dtype_shape_and_bytes() -> None:
    values = torch.arange(6.0)
    others = [values.view(2, 3), values.view(torch.int32), values + 1, values.to(torch.bfloat16)]
    found = {fingerprint(tensor) for tensor in (values, *others)}
    assert len(found) == 5
    assert fingerprint(values.view(2, 3).T.contiguous().T) == fingerprint(values.view(2, 3))
