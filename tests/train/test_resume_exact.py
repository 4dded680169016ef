"""2N = N + N, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_parts import METHOD, adamw, adamw8bit, build, differences, everything, go

import trimtab
from trimtab.train.checkpoint import load

OPTIMIZERS = {
    "plain": adamw(foreach=False),
    "foreach": adamw(foreach=True),
    "fused": adamw(fused=True),
    "8bit": adamw8bit,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resuming_twice_is_bit_for_bit(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    """A run of 12 steps equals 2 + 5 + 5, over the end of the warm start (3) and the restarts (6, 9)."""
    make = OPTIMIZERS[optimizer]
    whole = build(tmp_path / "whole", make_optimizer=make, dtype=dtype)
    assert go(whole) == 12
    end = everything(whole)
    losses, switched = [], []
    checkpoint, start = None, 0
    for stop in (2, 7, 12):
        part = build(
            tmp_path / "parts", checkpoint=checkpoint, make_optimizer=make, dtype=dtype, stop_at=stop,
            trainable_changed=switched.append,
        )  # fmt: skip
        assert go(part, start) == stop
        losses += part.log.losses()
        assert part.saver.last is not None
        checkpoint, start = load(part.saver.last), stop
    assert losses == whole.log.losses()
    assert switched == [3]
    assert [e["step"] for e in whole.log.events if e["event"] == "restart"] == [6, 9]
    assert differences(end, everything(part)) == []


@pytest.mark.parametrize("stop", [3, 6], ids=["at the switch", "at a restart"])
def test_resuming_right_at_an_edge(tmp_path: Path, stop: int) -> None:
    """A checkpoint written in the very step of the switch or of a restart continues bit for bit."""
    whole = build(tmp_path / "whole")
    go(whole)
    end = everything(whole)
    first = build(tmp_path / "parts", stop_at=stop)
    go(first)
    middle = everything(first)
    second = build(tmp_path / "parts", checkpoint=load(first.saver.last))
    assert differences(middle, everything(second)) == []
    go(second, stop)
    assert differences(end, everything(second)) == []


@pytest.mark.parametrize("stop", [5, 6], ids=["between", "at a restart"])
def test_a_4_bit_base_resumes(tmp_path: Path, stop: int) -> None:
    """Checkpoints hold codes, scales and masters: quantised ReLoRA goes on bit for bit over restarts (3, 6, 9)."""
    method = METHOD.model_copy(update={"warm_start_steps": 0})
    whole = build(tmp_path / "whole", quantized=True, method=method)
    go(whole)
    assert [e["step"] for e in whole.log.events if e["event"] == "restart"] == [3, 6, 9]
    end = everything(whole)
    first = build(tmp_path / "parts", quantized=True, method=method, stop_at=stop)
    go(first, 0)
    second = build(tmp_path / "parts", quantized=True, method=method, checkpoint=load(first.saver.last))
    assert differences(everything(first), everything(second)) == []
    go(second, stop)
    assert differences(end, everything(second)) == []
    masters = [name for name in end if name.startswith("adapter.carry:") and end[name].dtype == torch.float32]
    assert len(masters) == 7 and end["model.model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


METHODS = {
    "full": trimtab.Full(),
    "relora": METHOD,
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=4, initial_steps=2, final_steps=3, allocate_every=2),
    "ia3": trimtab.IA3(train_also=("norms",)),
    "bitfit": trimtab.BitFit(train_also=("norms",)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_tied_weights_resume(tmp_path: Path, method: trimtab.Method) -> None:
    """A model whose head is its embedding continues bit for bit, and stays tied."""
    whole = build(tmp_path / "whole", tied=True, method=method)
    go(whole)
    end = everything(whole)
    first = build(tmp_path / "parts", tied=True, method=method, stop_at=7)
    go(first)
    second = build(tmp_path / "parts", tied=True, method=method, checkpoint=load(first.saver.last))
    go(second, 7)
    assert differences(end, everything(second)) == []
    assert second.model.lm_head.weight is second.model.transformer.wte.weight


def test_random_states_decide_the_run(tmp_path: Path) -> None:
    """Without its random states a resumed run differs: the test above does see them (dropout draws from torch's)."""
    whole = build(tmp_path / "whole")
    go(whole)
    first = build(tmp_path / "parts", stop_at=7)
    go(first)
    second = build(tmp_path / "parts", checkpoint=load(first.saver.last))
    torch.manual_seed(123)
    go(second, 7)
    assert second.log.losses() != whole.log.losses()[7:]


def test_two_runs_are_equal(tmp_path: Path) -> None:
    """The same parts and seed give the same run."""
    ends = []
    for name in ("one", "other"):
        run = build(tmp_path / name)
        go(run)
        ends.append(everything(run))
    assert differences(*ends) == []


def test_stop_at_leaves_the_schedule_alone(tmp_path: Path) -> None:
    """Stopping early changes no rate of the steps before."""
    whole = build(tmp_path / "whole")
    go(whole)
    short = build(tmp_path / "short", stop_at=5)
    assert go(short) == 5
    assert short.log.losses() == whole.log.losses()[:5]
    assert short.saver.last.name == "step-00000005"


def test_optimizer_maps_stay_shared(tmp_path: Path) -> None:
    """bitsandbytes' code maps are stored once, and shared again after loading."""
    first = build(tmp_path, make_optimizer=adamw8bit, stop_at=5)
    go(first)
    stored = load(first.saver.last).state["optimizer"]["state"]
    keys = {entry["qmap1"]["tensor"] for entry in stored.values() if "qmap1" in entry}
    users = [entry for entry in stored.values() if "qmap1" in entry]
    assert len(keys) == 1
    assert len(users) > 1
    second = build(tmp_path, checkpoint=load(first.saver.last), make_optimizer=adamw8bit)
    maps = {s["qmap1"].data_ptr() for s in second.optimizer.state.values() if "qmap1" in s}
    assert len(maps) == 1
    types = {type(s["step"]) for s in second.optimizer.state.values()}
    assert types == {int}
