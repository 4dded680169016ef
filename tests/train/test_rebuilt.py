"""What a checkpoint of a fine-tuning run leaves out, since the model it began with can be built again."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_parts import again, labelled, place, quiet, run
from finetune_parts import config as told
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trimtab.errors import CheckpointError
from trimtab.report.spectrum import Spectrum
from trimtab.train import finetune as finetuning
from trimtab.train.asbuilt import AsBuilt, fingerprint
from trimtab.train.checkpoint import load
from trimtab.train.material import Material

__all__ = ["place"]  # a fixture

STEPS = {"train__steps": 14, "eval__every": 50, "train__stop_at": 7}
RESTARTS = "{name: relora, rank: 4, restart_every: 3, warm_start_steps: 0, train_also: []}"
PISSA = "{name: lora, rank: 4, init: pissa, train_also: [head]}"


def stored(folder: Path, step: int = 7) -> set[str]:
    """What the base's file of a checkpoint holds."""
    with safe_open(folder / "checkpoints" / f"step-{step:08d}" / "base.safetensors", framework="pt") as file:
        return set(file.keys())


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
    assert not stored(tmp_path / "run")


@pytest.mark.parametrize(("method", "family"), [(RESTARTS, "llama"), (PISSA, "bert")], ids=["restarts", "pissa"])
def test_what_a_method_writes_into_is_stored_and_nothing_else(
    method: str, family: str, place: Path, tmp_path: Path
) -> None:
    """Also by a run that has gone on; and that run has the numbers of one that was not stopped."""
    run(place, tmp_path / "a", family, labelled(place), method, **STEPS | {"train__stop_at": None})
    run(place, tmp_path / "b", family, labelled(place), method, **STEPS)
    folder = tmp_path / "b" / "run"
    found = stored(folder)
    assert found
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


def test_full_training_stores_each_tensor_once(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, "bert", labelled(place), "full", **STEPS)
    assert not stored(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000007"
    assert len(load_file(checkpoint / "adapter.safetensors")) >= len(load_file(place / "bert" / "model.safetensors"))


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    """A model folder that has changed since, by one number in one tensor."""
    from shutil import copytree

    copytree(place / "bert", tmp_path / "bert")
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
    build, alive, built = Material.model, [], []

    def counted(self: Material) -> Any:
        gc.collect()
        alive.append(sum(model() is not None for model in built))
        model = build(self)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Material, "model", counted)
    monkeypatch.setattr(finetuning.Best, "offer", lambda self, step, headline: offered(self, step))

    def offered(self: Any, step: int) -> bool:
        self.seen, first = step, self.step is None
        self.step = 3 if first else self.step
        return first

    result = finetuning.finetune(
        told(place, tmp_path, "bert", labelled(place), "lora", train__steps=9, eval__every=3), console=quiet()
    )
    assert result.best_step == 3
    assert alive == [0, 0]


def test_tensors_that_were_moved_or_written_are_told_apart() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    built = AsBuilt(model)
    assert all(tensor in built for tensor in model.state_dict(keep_vars=True).values())
    model(torch.randn(4, 3))
    changed = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor not in built}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
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
