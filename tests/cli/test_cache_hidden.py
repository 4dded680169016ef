"""`trimtab pretrain` with `train.cache_hidden`, as a user sees it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from models_for_tests import tiny_llama
from runs import files_in, run, write_project

CONFIG = """\
name: small
device: cpu
model:
  name: model
data:
  sources: [text.jsonl]
  tokenizer:
    bpe_vocab_size: 300
  seq_len: 16
  max_tokens: 400
  validation_share: 0.3
method:
  name: read
  size: 8
optim:
  lr: 5e-3
train:
  steps: 30
  batch_tokens: 64
  cache_hidden: hidden
log:
  every: 1
"""
#: Two layers, 32 wide, 2 bytes a number.
EACH = 2 * 32 * 2


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, a tiny checkpoint and run.yaml, in which the commands are given."""
    write_project(tmp_path, CONFIG)
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_epochs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run tells an upper bound; the run fills a folder beside its own, learns, and leaves its adapter."""
    before = files_in(project)
    dry = run(capsys, "pretrain", "run.yaml", "--dry-run")
    assert (dry.status, dry.err, files_in(project)) == (0, "", before)
    assert re.search(
        rf"hidden states: at most 240.0 KiB for 1,920 tokens \({EACH} bytes each, bf16\), in hidden; ", dry.out
    )

    ended = run(capsys, "pretrain", "run.yaml")
    assert (ended.status, ended.err) == (0, "")
    found = re.search(
        rf"hidden states: [\d.]+ KiB for (\d+) tokens \({EACH} bytes each, bf16\), in hidden; ", ended.out
    )
    assert found is not None
    tokens = int(found[1])
    assert 2 * tokens < 1920
    assert (project / "hidden" / "data.bin").stat().st_size == tokens * EACH
    assert files_in(project / "hidden") == {".lock", "data.bin", "index.txt", "meta.json"}
    steps = [line for line in ended.out.splitlines() if line.startswith("step ") and " loss " in line]
    growing = -(-tokens // 64) - 1
    assert [" hidden states " in line for line in steps[:30]] == [True] * growing + [False] * (30 - growing)
    lines = [json.loads(line) for line in (project / "runs" / "small" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert (project / "runs" / "small" / "adapter" / "adapter_model.safetensors").exists()

    dry = run(capsys, "pretrain", "run.yaml", "--dry-run")
    assert f" for {tokens} tokens ({EACH} bytes each, bf16), in hidden; " in dry.out and "at most" not in dry.out
    assert f"hidden states: hidden holds {tokens * EACH / 1024:.1f} KiB already" in dry.out
    dry = run(capsys, "pretrain", "run.yaml", "--dry-run", "train.cache_storage=int8")
    assert dry.status == 2 and "train.cache_hidden: hidden: the cached hidden states are stored in another" in dry.err
    again = run(capsys, "pretrain", "run.yaml", "name=again", "optim.lr=1e-3")
    assert f", of which {tokens * EACH / 1024:.1f} KiB are there, in hidden; " in again.out
    assert (project / "hidden" / "data.bin").stat().st_size == tokens * EACH


def test_resume_after_the_folder_was_deleted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "run.yaml", "name=cut", "train.stop_at=12"]
    assert run(capsys, *words).status == 0
    shutil.rmtree("hidden")
    ended = run(capsys, "pretrain", "--resume", "runs/cut")
    assert (ended.status, ended.err) == (0, "")
    assert re.search(r"hidden states: computing \d micro-batches of the 12 completed steps anew", ended.out)
    assert ended.out.rstrip().splitlines()[-1].startswith("model: runs/cut/model")


def test_refusals_are_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong pairs before any work, and a disk without room before the first step; a dry run foretells it."""
    for words, message in (
        (
            ["method={name: lora}"],
            "run.yaml:20: train.cache_hidden: hidden: hidden states cannot be kept for the method lora",
        ),
        (["method.backbone_dropout=true"], "with backbone_dropout=True they are drawn anew in each forward"),
        (["train.cache_storage=int4"], "train.cache_storage: 'int4' is not one of bf16, int8, exact"),
    ):
        ended = run(capsys, "pretrain", "run.yaml", *words)
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert message in ended.err
        assert not (project / "runs").exists() and not (project / "hidden").exists()
    run(capsys, "tokenize", "run.yaml")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(1 << 26) + 100))
    dry = run(capsys, "pretrain", "run.yaml", "--dry-run")
    assert "warning: train.cache_hidden: the disk has no room for that" in dry.out and dry.status == 0
    ended = run(capsys, "pretrain", "run.yaml")
    assert ended.status == 2 and ended.err.startswith(
        "trimtab: train.cache_hidden: hidden: the cached hidden states need"
    )
    assert not files_in(project / "runs" / "small")


@pytest.mark.parametrize("path", ["afile", "afile/under", "model"])
def test_a_dry_run_refuses_a_path_as_the_run_does(path: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "afile").write_text("mine")
    ended = run(capsys, "pretrain", "run.yaml", f"train.cache_hidden={path}")
    assert not (project / "runs" / "small").exists()
    before = files_in(project)
    dry = run(capsys, "pretrain", "run.yaml", f"train.cache_hidden={path}", "--dry-run")
    assert (dry.status, dry.err) == (ended.status, ended.err) == (2, ended.err)
    assert f"train.cache_hidden: {path} " in dry.err and files_in(project) == before


def test_a_storage_without_a_cache_is_noted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.cache_hidden=null", "train.cache_storage=int8"]
    out = run(capsys, "pretrain", "run.yaml", "--dry-run", *words).out
    assert "note: train.cache_storage has no effect: train.cache_hidden is null" in out
    assert "hidden states:" not in out and "rounds" not in out
    dry = run(capsys, "pretrain", "run.yaml", "--dry-run", "train.cache_storage=int8").out
    assert "warning: train.cache_storage = int8 rounds the hidden states, which are computed in bf16" in dry
