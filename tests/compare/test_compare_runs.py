"""Runs one after another: their folders, what goes on where, and what ends a comparison."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from compare_parts import InProcess, write_project
from rich.console import Console
from safetensors.torch import load_file

import trimtab
from trimtab.cli import main
from trimtab.compare import runner
from trimtab.compare.child import Child, Ended
from trimtab.compare.outcome import state_of
from trimtab.compare.plan import Plan, make_plan
from trimtab.errors import ConfigError
from trimtab.finetuneconfig import FinetuneConfig
from trimtab.loadconfig import load_tree
from trimtab.train.finetune import finetune


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    made = InProcess()
    monkeypatch.setattr(runner, "Child", made)
    return made


def quiet() -> Console:
    return Console(quiet=True)


def bitfit(project: Path, *words: str, seeds: str = "2") -> Plan:
    return make_plan(project, words, methods=["bitfit"], seeds=seeds)


def stopped_after(steps: int, words: list[str]) -> Ended:
    """A run that a signal ended."""
    config = load_tree(FinetuneConfig, Path(words[1]), [f"train.stop_at={steps}"])
    finetune(config, console=quiet())
    return Ended(143, "")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_runs_are_runs_of_finetune_and_are_not_run_twice(project: Path, child: InProcess) -> None:
    """The same files and the same adapter as by hand; a complete run is read, whatever else is asked for."""
    assert runner.compare(bitfit(project), quiet()) == 0
    folder = project.parent / "runs" / "small"
    by_hand = load_tree(FinetuneConfig, project, ["method={name: bitfit}", "seed=1", f"out={folder}/by", "name=hand"])
    finetune(by_hand, console=quiet())
    mine, other = (load_file(folder / name / "adapter" / "adapter_model.safetensors") for name in NAMES)
    assert all(torch.equal(mine[name], other[name]) for name in {**mine, **other})
    before = files_of(folder / "bitfit")
    child.calls.clear()
    assert runner.compare(bitfit(project), quiet()) == 0
    assert child.calls == []
    assert files_of(folder / "bitfit") == before
    assert runner.compare(bitfit(project, seeds="3"), quiet()) == 0
    assert [Path(words[-1]).name for words in child.calls] == ["seed2.yaml"]


NAMES = ("bitfit/seed1", "by/hand")


def test_a_kill_between_runs_loses_nothing(project: Path, child: InProcess) -> None:
    def at_the_second(words: list[str]) -> None:
        if len(child.calls) == 2:
            raise KeyboardInterrupt

    child.before = at_the_second
    with pytest.raises(KeyboardInterrupt):
        runner.compare(bitfit(project), quiet())
    assert [state_of(run) for run in bitfit(project).entries[0].grid[0]] == ["complete", "new"]
    child.calls.clear()
    child.before = lambda words: None
    assert runner.compare(bitfit(project), quiet()) == 0
    assert [Path(words[-1]).name for words in child.calls] == ["seed1.yaml", "costs.json"]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(project: Path, child: InProcess) -> None:
    """A signal's status is handed on; the same command resumes the run, and it ends as if never stopped."""
    child.before = lambda words: stopped_after(4, words)
    assert runner.compare(bitfit(project), quiet()) == 143
    (run, _) = bitfit(project).entries[0].grid[0]
    assert state_of(run) == "begun"
    text = (project.parent / "runs" / "small" / "comparison.md").read_text()
    assert "Not complete: 0 of 2 runs are done." in text
    child.calls.clear()
    child.before = lambda words: None
    assert runner.compare(bitfit(project), quiet()) == 0
    assert child.calls[0] == ["finetune", "--resume", str(run.folder)]
    straight = bitfit(project, "name=straight")
    assert runner.compare(straight, quiet()) == 0
    other = straight.entries[0].grid[0][0]
    tensors = [load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (run, other)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    assert json.loads((run.folder / "results.json").read_text()) == json.loads(
        (other.folder / "results.json").read_text()
    )


def test_a_run_without_a_checkpoint_begins_anew(project: Path, child: InProcess) -> None:
    (run, _) = bitfit(project).entries[0].grid[0]
    run.folder.mkdir(parents=True)
    run.asked.write_text("old")
    (run.folder / "metrics.jsonl").write_text('{"event": "step", "step": 1, "time": 0, "loss": 1.0}\n')
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "step-00000003.tmp").mkdir()
    assert runner.compare(bitfit(project), quiet()) == 0
    assert child.calls[0] == ["finetune", str(run.asked)]
    assert state_of(run) == "complete"


def test_a_changed_setting_is_an_error_that_names_it(project: Path, child: InProcess) -> None:
    """What is not compared may change: how often is logged and kept."""
    assert runner.compare(bitfit(project, seeds="1"), quiet()) == 0
    child.calls.clear()
    assert runner.compare(bitfit(project, "log.every=5", "checkpoint.keep=1", seeds="1"), quiet()) == 0
    assert child.calls == []
    with pytest.raises(ConfigError, match=r"train\.steps: .*bitfit/seed0 was run with 6, and now it is 7"):
        runner.compare(bitfit(project, "train.steps=7", seeds="1"), quiet())


def test_a_folder_of_somebody_else_is_left_alone(project: Path, child: InProcess) -> None:
    (run, _) = bitfit(project).entries[0].grid[0]
    run.folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="no comparison began it"):
        runner.compare(bitfit(project), quiet())
    assert run.folder.is_dir()
    assert child.calls == []


def test_a_run_that_diverges_is_no_end(project: Path, child: InProcess) -> None:
    """It is never chosen, it is not run again, and what it learned is in no table; other errors end the comparison."""
    sweeps = ["optim.lr=1e30,1e-3"]
    plan = make_plan(project, ["train.clip=null"], methods=["full"], sweeps=sweeps)
    assert runner.compare(plan, quiet()) == 0
    assert [state_of(run) for run in plan.entries[0].first] == ["diverged", "complete"]
    (row,) = runner.read(plan).rows
    assert row.chosen == {"optim.lr": 0.001}
    child.calls.clear()
    assert runner.compare(plan, quiet()) == 0
    assert child.calls == []
    child.before = lambda words: Ended(2, "the disk is full")
    with pytest.raises(ConfigError, match=r"bitfit/seed0: the disk is full"):
        runner.compare(bitfit(project), quiet())
    child.before = lambda words: Ended(1, "")
    with pytest.raises(RuntimeError, match="ended with status 1"):
        runner.compare(bitfit(project), quiet())


def test_all_runs_of_a_method_may_diverge(project: Path, child: InProcess) -> None:
    plan = make_plan(
        project, ["train.clip=null", "optim.lr=1e30"], methods=["full,bitfit"], sweeps=["bitfit:optim.lr=1e-3"]
    )
    assert runner.compare(plan, quiet()) == 0
    text = (plan.folder / "comparison.md").read_text()
    assert "| full" in text
    assert "diverged" in text


def test_costs_that_cannot_be_counted_are_told(project: Path, child: InProcess) -> None:
    child.before = lambda words: Ended(2, "no room") if words[0] != "finetune" else None
    console = Console(record=True, width=200)
    assert runner.compare(bitfit(project, seeds="1"), console) == 0
    assert "bitfit: its costs could not be counted: no room" in console.export_text()


def test_two_comparisons_do_not_work_in_one_folder(project: Path, child: InProcess) -> None:
    def another(words: list[str]) -> None:
        with pytest.raises(ConfigError, match="another process"):
            runner.compare(bitfit(project), quiet())

    child.before = another
    assert runner.compare(bitfit(project, seeds="1"), quiet()) == 0


def test_a_child_hands_back_its_error_and_passes_on_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    ended = Child().run("trimtab.cli", ["finetune", "--nonsense"])
    assert ended.status == 2
    assert "--nonsense" in ended.error
    assert "trimtab: " not in capfd.readouterr().err
    assert Child().run("trimtab.cli", ["--version"]) == Ended(0, "")
    assert capfd.readouterr().out == f"trimtab {trimtab.__version__}\n"


def test_ctrl_c_ends_the_run_with_a_checkpoint_and_then_the_comparison(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One SIGINT to the comparison alone: the run in its process leaves a checkpoint; our handlers are as before."""
    metrics = project.parent / "runs" / "small" / "bitfit" / "seed0" / "metrics.jsonl"

    def interrupt() -> None:
        while not (metrics.exists() and '"event": "step"' in metrics.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    threading.Thread(target=interrupt, daemon=True).start()
    status = runner.compare(bitfit(project, "train.steps=100_000", "eval.every=100_000", seeds="1"), Console())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    seen = capfd.readouterr()
    assert status == 130
    assert "SIGINT: finishing this step" in seen.err
    assert "the comparison stopped after 0 of 1 runs; the same command goes on" in seen.out
    assert any((metrics.parent / "checkpoints").glob("step-*"))


def test_the_command_runs_a_comparison(project: Path, child: InProcess, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["finetune", str(project), "--methods", "bitfit", "--methods", "{name: lora, rank: 2}"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "lora rank=2" in out
    assert "test accuracy" in out
    page = (project.parent / "runs" / "small" / "comparison.html").read_text()
    assert "trimtab finetune" in page
