"""Checkpoint folders stand complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loop_parts import adamw, build, differences, everything, go
from safetensors.torch import load_file

import trimtab
from trimtab.errors import CheckpointError
from trimtab.train import checkpoint as module
from trimtab.train.checkpoint import load, newest
from trimtab.train.tensorfile import read_tensors, write_tensors


def silent(name: str, fault: str) -> None:
    raise AssertionError(f"{name}: {fault}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_file_reads_back_in_the_library(tmp_path: Path) -> None:
    """What is written here is safetensors, for every dtype, shape and layout."""
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "long": torch.tensor([2**40]),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    for found in (load_file(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(
            torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found
        )


def test_newest_complete_one_wins_and_old_ones_go(tmp_path: Path) -> None:
    """Of four checkpoints the last two stay, and the last is found."""
    run = build(tmp_path, checkpoint_every=3)
    go(run)
    assert names(tmp_path) == ["step-00000009", "step-00000012"]
    assert newest(tmp_path / "checkpoints", silent).step == 12


@pytest.mark.parametrize("file", [*module.FILES, "state.json"])
@pytest.mark.parametrize("how", ["one byte", "cut short", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_reported(tmp_path: Path, file: str, how: str) -> None:
    """One wrong byte, a missing end or a missing file: the one before is taken, and it is said why."""
    go(build(tmp_path, checkpoint_every=6))
    path = tmp_path / "checkpoints" / "step-00000012" / file
    content = bytearray(path.read_bytes())
    if how == "one byte":
        content[len(content) - 3] ^= 1
        path.write_bytes(content)
    elif how == "cut short":
        path.write_bytes(content[: len(content) - 5])
    else:
        path.unlink()
    reports: list[tuple[str, str]] = []
    found = newest(tmp_path / "checkpoints", lambda name, fault: reports.append((name, fault)))
    assert found.step == 6
    assert [name for name, _ in reports] == ["step-00000012"]
    assert file in reports[0][1]
    with pytest.raises(CheckpointError, match=file):
        load(path.parent)


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    """Nothing starts from scratch silently when every checkpoint is damaged; none at all is None."""
    assert newest(tmp_path / "checkpoints", silent) is None
    go(build(tmp_path, stop_at=1))
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        newest(tmp_path / "checkpoints", lambda name, fault: None)


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    """With keep=2, a known damaged checkpoint pushes no good one out, and is replaced in its turn."""
    run = build(tmp_path, stop_at=1)
    go(run)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / "step-00000002")
    run.saver.damaged = frozenset({"step-00000002"})
    run.saver.save(3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    run.saver.save(2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert load(tmp_path / "checkpoints" / "step-00000002").step == 2


@pytest.mark.parametrize("at", [0, 1, 2, "state"])
def test_a_full_disk_leaves_older_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int | str
) -> None:
    """No space while any of the files is written: one line, no temporary folder, the old checkpoint unharmed."""
    run = build(tmp_path, stop_at=2)
    go(run)
    before = {p.name: p.read_bytes() for p in run.saver.last.iterdir()}
    calls = iter(range(10))
    real = write_tensors

    def full(*arguments: object) -> str:
        if at == "state" or next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write_text" if at == "state" else "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"step 3 .*No space left.*last good one is .*step-00000002") as caught:
        run.saver.save(3)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000002"]
    assert {p.name: p.read_bytes() for p in run.saver.last.iterdir()} == before
    monkeypatch.undo()
    run.saver.save(3)
    assert newest(tmp_path / "checkpoints", silent).step == 3


def test_a_truly_full_device(tmp_path: Path) -> None:
    """The system's own ENOSPC, from /dev/full in the place of one file."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    run = build(tmp_path, stop_at=1)
    real = open

    def to_full(path: object, mode: str = "r", **kw: object) -> object:
        return real("/dev/full", "wb") if str(path).endswith("adapter.safetensors") else real(path, mode, **kw)  # type: ignore[call-overload]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.train.tensorfile.open", to_full, raising=False)
        with pytest.raises(CheckpointError, match="No space left"):
            run.saver.save(1)
    assert names(tmp_path) == []


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be: a CheckpointError, and no traceback of another kind."""
    run = build(tmp_path)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        run.saver.save(1)


def test_a_write_that_goes_wrong_silently_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading again before the rename finds bytes that are not those that were meant."""
    run = build(tmp_path, stop_at=1)
    go(run)
    real = write_tensors

    def wrong(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        digest = real(path, tensors)
        if path.name != "adapter.safetensors":
            return digest
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 255]))
        return digest

    monkeypatch.setattr(module, "write_tensors", wrong)
    with pytest.raises(CheckpointError, match="is damaged"):
        run.saver.save(2)
    assert names(tmp_path) == ["step-00000001"]


CHILD = """
import sys, time
from pathlib import Path
from loop_parts import build, go
from trimtab.train import checkpoint
folder = Path(sys.argv[1])
real = checkpoint.write_tensors
def slow(path, tensors):
    digest = real(path, tensors)
    if "00000008" in str(path) and path.name.startswith(sys.argv[2]):
        Path(folder / "ready").touch()
        time.sleep(600)
    return digest
checkpoint.write_tensors = slow
go(build(folder, checkpoint_every=4))
"""


def child(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    paths = [str(Path(trimtab.__file__).parents[1]), str(here), str(here.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)


@pytest.mark.parametrize("during", ["base", "optimizer"])
def test_kill_during_a_checkpoint(tmp_path: Path, during: str) -> None:
    """kill -9 between two files of a checkpoint: the one before is taken, and the run ends as an unbroken one does."""
    process = child(CHILD, str(tmp_path), during)
    try:
        wait_for(tmp_path / "ready", process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert names(tmp_path) == ["step-00000004", "step-00000008.tmp"]
    found = newest(tmp_path / "checkpoints", silent)
    assert found.step == 4
    second = build(tmp_path, checkpoint=found, checkpoint_every=4)
    go(second, 4)
    end = everything(second)
    whole = build(tmp_path / "whole")
    go(whole)
    assert differences(everything(whole), end) == []
    assert names(tmp_path) == ["step-00000008", "step-00000012"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A checkpoint of one model does not load into another, and says which name differs."""
    run = build(tmp_path, stop_at=5)
    go(run)
    with pytest.raises((CheckpointError, trimtab.TrimtabError), match=r"names differ|does not fit"):
        build(tmp_path, checkpoint=load(run.saver.last), tied=True)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """The frozen base is loaded strictly: a tensor too few is an error that names it, and nothing was loaded."""
    run = build(tmp_path, stop_at=5)
    go(run)
    base = run.saver.last / "base.safetensors"
    tensors = read_tensors(base)
    lost = sorted(tensors)[0]
    del tensors[lost]
    base.unlink()
    write_tensors(base, tensors)
    state = json.loads((run.saver.last / "state.json").read_text())["state"]
    fresh = build(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match=f"missing {lost}"):
        module.Checkpoint(run.saver.last, 5, state).load_model(fresh.model, fresh.adapter)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """State never lands on another parameter."""
    run = build(tmp_path, stop_at=5)
    go(run)
    model = build(tmp_path / "other").model
    other = adamw()([{"params": list(model.parameters()), "names": [n for n, _ in model.named_parameters()]}])
    with pytest.raises(CheckpointError, match="trains other parameters"):
        load(run.saver.last).load_optimizer(other)


def test_a_parameter_without_state_stays_without(tmp_path: Path) -> None:
    """A parameter that never had a gradient has no state before and none after."""
    run = build(tmp_path, method=trimtab.Full(), stop_at=0)
    dead = run.model.lm_head.weight
    run.model.base_model.embed_tokens.weight.grad = torch.ones_like(run.model.base_model.embed_tokens.weight)
    run.optimizer.step()
    assert dead not in run.optimizer.state or not run.optimizer.state[dead]
    again = build(tmp_path, method=trimtab.Full(), checkpoint=load(run.saver.save(1)))
    assert len(again.optimizer.state) == 1
    assert next(iter(again.optimizer.state)) is again.model.base_model.embed_tokens.weight
