from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import CONFIG, environment, files_in, run, write_project
from transformers import GPT2Config, GPT2LMHeadModel

from trimtab.dryrun import restart_line


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_writes_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with 0, leaves every file and folder as it was, and says nothing on standard error."""
    before = sorted(project.rglob("*"))
    ended = run(capsys, "pretrain", "run.yaml", "--dry-run")
    assert (ended.status, ended.err) == (0, "")
    assert sorted(project.rglob("*")) == before


def test_a_dry_run_tells_what_the_run_would_be(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resolved config, parameters of both phases, tokens a step, restarts and the schedule."""
    words = ["method.warm_start_steps=12", "method.restart_every=9", "schedule.rewarm_steps=2", "train.micro_batch=2"]
    out = run(capsys, "pretrain", "run.yaml", "--dry-run", *words).out
    # 9M's shape with 300 words: 2 * 300 * 128 + 4 * (4 * 128^2 + 3 * 128 * 352 + 2 * 128) + 128
    assert "880,768" in out
    # adapters of rank 4 on 4 blocks: 4 * 4 * (4 * (128 + 128) + 3 * (128 + 352))
    assert "39,424" in out
    for words_ in (
        "name: small\n",
        "train_also:\n  - embeddings",
        "warm_start_steps: 12",
        "text: 1 file of 0.0 MB, to be tokenized into runs/tokens/",
        "vocabulary: 300",
        "tokens a step: 64 = 4 sequences of 16, in 2 micro-batches of 2; in all 40 steps and 2,560 tokens",
        "restarts: 2, after the steps 21 30\n",
        "step 40\n",
        "Dry run: nothing was trained and nothing was written.",
    ):
        assert words_ in out, words_


def test_a_dry_run_of_the_papers_60m_has_its_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The example's dry run names no file, downloads nothing, and shows 58.07M and 42.77M parameters."""
    example = Path(__file__).parents[2] / "examples" / "llama-60m-c4.yaml"
    ended = run(capsys, "pretrain", str(example), f"out={tmp_path}", "--dry-run")
    assert ended.status == 0
    assert "58,073,600" in ended.out
    assert "42,770,944" in ended.out
    assert files_in(tmp_path) == set()


def test_a_dry_run_reads_a_store_that_is_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After `tokenize`, the number of tokens and the share that the run reads are told."""
    done = run(capsys, "tokenize", "run.yaml")
    assert done.status == 0
    tokens = done.out.split(": ")[1].split(" ")[0]
    out = run(capsys, "pretrain", "run.yaml", "--dry-run").out
    assert f"text: {tokens} tokens in " in out
    assert "the run reads them" in out


def test_settings_without_effect_are_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note names them."""
    out = run(capsys, "pretrain", "run.yaml", "--dry-run", "optim.warm_start_lr=1e-3").out
    assert "note: optim.warm_start_lr has no effect: the method has no warm start" in out


def test_a_terminal_without_braille_gets_ascii(project: Path) -> None:
    """Where the encoding has ASCII alone, everything is said in it, names included."""
    write_project(project, CONFIG.replace("text.jsonl", "données.jsonl"))
    (project / "text.jsonl").rename(project / "données.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", "pretrain", "run.yaml", "--dry-run"],
        env={**environment(), "PYTHONIOENCODING": "ascii"}, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"restart (3)" in done.stdout


def test_a_long_list_of_restarts_is_cut() -> None:
    """Of many restarts the first and the last are listed; of none it is said so."""
    assert restart_line(()) == "restarts: none"
    assert restart_line((1000, 2000)) == "restarts: 2, after the steps 1,000 2,000"
    line = restart_line(tuple(range(10, 1010, 10)))
    assert line == "restarts: 100, after the steps 10 20 30 40 50 60 70 80 90 100 ... 1,000"


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_adapter_that_could_not_be_saved_is_refused_first(
    dry: list[str], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt beside a tied head in training would have no file at the end; without the head it has one."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64))
    model.save_pretrained(project / "base")
    words = ["model.name=base", "data.tokenizer.bpe_vocab_size=257", "method={name: prompt, length: 3}", *dry]
    ended = run(capsys, "pretrain", "run.yaml", *words)
    assert ended.status == 2 and "method.train_also: transformer.wte.weight = lm_head.weight is one" in ended.err
    assert "leave it out of train_also" in ended.err and not (project / "runs").exists()
    words[2] = "method={name: prompt, length: 3, train_also: [norms]}"
    assert run(capsys, "pretrain", "run.yaml", *words[:3], "--dry-run").status == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan may be made for another machine, so it is a warning; the run itself is refused before it tokenizes."""
    ended = run(capsys, "pretrain", "run.yaml", "device=cuda", "--dry-run")
    assert ended.status == 0 and "warning: device = cuda, and torch sees no GPU here" in ended.out
    assert "warning" not in run(capsys, "pretrain", "run.yaml", "--dry-run").out
    ended = run(capsys, "pretrain", "run.yaml", "device=cuda")
    assert ended.status == 2 and "device = cuda" in ended.err and not (project / "runs").exists()


def test_a_tokenizer_that_is_not_there_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where its folder's folder is there, the name can be no hub's."""
    (project / "tokenizers").mkdir()
    for path in ("tokenizers/mine", "./mine", "a/b/c"):
        words = ["data.tokenizer.bpe_vocab_size=null", f"data.tokenizer.path={path}"]
        ended = run(capsys, "pretrain", "run.yaml", *words, "--dry-run")
        assert ended.status == 2 and f"data.tokenizer.path: there is no folder {path}" in ended.err
