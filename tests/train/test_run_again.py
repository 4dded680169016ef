"""`pretrain`, stopped and taken up again: the same run, or one line that says why not."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from run_parts import config, quiet, records
from test_checkpoint import child

from trimtab.config import PretrainConfig
from trimtab.data.tokens import store_folder
from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.loadconfig import dump_config, load_config
from trimtab.train.folder import sole_user
from trimtab.train.run import RunResult, pretrain


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


def test_a_used_folder_a_missing_checkpoint_and_a_changed_setting(
    whole: tuple[PretrainConfig, RunResult, str], tmp_path: Path
) -> None:
    """Each is one line, and nothing in the folder changes."""
    asked, result, _ = whole
    before = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"--resume .*another name"):
        pretrain(asked, console=quiet())
    none = (
        rf"^--resume {tmp_path}: there is no checkpoint in it; leave --resume out; no step was taken, so that the run"
    )
    with pytest.raises(CheckpointError, match=none):
        pretrain(asked, resume=tmp_path, console=quiet())
    with pytest.raises(ConfigError, match=r"^seed: .* 0, .* 1 "):
        pretrain(asked.model_copy(update={"seed": 1}), resume=result.folder, console=quiet())
    assert {path: path.stat().st_mtime_ns for path in result.folder.rglob("*") if path.is_file()} == before
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
