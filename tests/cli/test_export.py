"""`trimtab merge` and `trimtab export` as a user calls them, after a real small run."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from models_for_tests import logits, tiny_llama, token_ids, train
from runs import CONFIG, run, write_project
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import trimtab
from trimtab.cli import main
from trimtab.models.load import draw_weights


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished ReLoRA run in fp32 (three restarts) and its config."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_project(folder, CONFIG + "dtype: fp32\nschedule: {warmup_steps: 2, rewarm_steps: 2}\noptim: {lr: 3e-3}\n")
        with pytest.raises(SystemExit, match="0"):
            main(["pretrain", "run.yaml"])
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `trimtab WORDS` prints; it must end well and complain of nothing."""
    capsys.readouterr()
    ended = run(capsys, *words)
    assert ended.status == 0, ended.err
    assert ended.err == ""
    return ended.out


def start_of(run_folder: Path) -> LlamaForCausalLM:
    """The model that the run began with."""
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model")
    draw_weights(model, 0)
    return model


def test_a_runs_update_as_one_lora(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the rank that four cycles of rank 4 can reach, the start and the LoRA answer as the end of the run."""
    words = said(capsys, "export", "runs/small", str(tmp_path / "delta"), "--delta-rank", "16")
    assert "100.00% of the update's energy is kept" in words
    assert "stored in full" in words
    end = AutoModelForCausalLM.from_pretrained("runs/small/model")
    start = start_of(here / "runs" / "small")
    assert (logits(start, token_ids()) - logits(end, token_ids())).abs().max() > 0.05
    in_peft = peft.PeftModel.from_pretrained(start_of(here / "runs" / "small"), str(tmp_path / "delta"))
    trimtab.load_adapter(start, tmp_path / "delta")
    for model in (start, in_peft):
        assert torch.allclose(logits(model, token_ids()), logits(end, token_ids()), atol=1e-3)
    told = json.loads((tmp_path / "delta" / "delta.json").read_text())
    assert {layer["rank"] for layer in told["layers"]} == {16}
    lower = said(capsys, "export", "runs/small", str(tmp_path / "less"), "--delta-rank", "2")
    kept = float(lower.split("% of the update's energy")[0].split()[-1])
    assert 20 < kept < 99.9


def test_the_start_file_of_a_run_will_do(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--base RUN/start.safetensors: the same factors; what the file lacks is stored as it is, and that is said."""
    said(capsys, "export", "runs/small", str(tmp_path / "a"), "--delta-rank", "4")
    start = ("--base", "runs/small/start.safetensors")
    words = said(capsys, "export", "runs/small", str(tmp_path / "b"), "--delta-rank", "4", *start)
    assert "the start of" in words and "is not known, so they are stored as they are" in words
    first, second = (json.loads((tmp_path / name / "delta.json").read_text()) for name in "ab")
    assert first["layers"] == second["layers"]


def test_a_runs_model_for_llama_cpp(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder becomes a GGUF file that transformers reads back, tokenizer and all."""
    assert "a model of" in said(capsys, "export", "runs/small", "--gguf", str(tmp_path / "small.gguf"))
    end = AutoModelForCausalLM.from_pretrained("runs/small/model")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    assert torch.allclose(logits(back, token_ids()), logits(end, token_ids()), atol=1e-5)
    ours, theirs = (AutoTokenizer.from_pretrained(*how[0], **how[1]) for how in (
        (("runs/small/model",), {}), ((tmp_path,), {"gguf_file": "small.gguf"}),
    ))  # fmt: skip
    assert ours("The 7th year")["input_ids"] == theirs("The 7th year")["input_ids"]


def adapter_on(base: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2, targets=("q_proj", "v_proj")))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 3))
    adapter.save(out)


def test_merge_and_the_lora_for_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """merge says what it did; --gguf takes the adapter folder as well."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    adapter_on(base, tmp_path / "lora")
    words = said(capsys, "merge", str(base), str(tmp_path / "lora"), str(tmp_path / "out"), "--dtype", "bf16")
    assert words == f"{tmp_path / 'out'}: 21 tensors in 1 file, 4 changed\n"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    words = said(capsys, "export", str(tmp_path / "lora"), str(tmp_path / "lora.gguf"), "--gguf")
    assert "a LoRA of 4 layers" in words


def test_an_untrained_adapter_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that changes nothing is merged, and the user is told."""
    tiny_llama().save_pretrained(tmp_path / "base")
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(tmp_path / "lora")
    words = said(capsys, "merge", *(str(tmp_path / name) for name in ("base", "lora", "out")))
    assert "0 changed" in words and "the adapter changes nothing" in words


WRONG = {
    "merge without words": (["merge"], "Missing argument 'BASE'"),
    "merge without out": (["merge", "base", "lora"], "Missing argument 'OUT'"),
    "a dtype that is none": (["merge", "base", "lora", "out", "--dtype", "int3"], "int3"),
    "a missing base": (["merge", "./none", "lora", "out"], "there is no folder"),
    "a base that is no model": (["merge", "lora", "lora", "out"], "is no model folder: config.json is missing"),
    "an adapter that is none": (["merge", "base", "base", "out"], "is no adapter folder"),
    "out in use": (["merge", "base", "lora", "base"], "exists and is not empty"),
    "out in no folder": (["merge", "base", "lora", "no/where/out"], "there is no folder"),
    "nothing to write": (["export", "base", "out"], "say what to write"),
    "two things to write": (["export", "base", "out", "--gguf", "--delta-rank", "2"], "choose one of"),
    "a rank that is no number": (["export", "base", "out", "--delta-rank", "x"], "delta-rank"),
    "a rank of nothing": (["export", "base", "out", "--delta-rank", "0", "--base", "base"], "--delta-rank 0"),
    "no start": (["export", "base", "out", "--delta-rank", "2"], "name it with --base"),
    "start and end alike": (["export", "base", "out", "--delta-rank", "2", "--base", "base"], "no update to export"),
    "a dtype of a delta": (["export", "base", "out", "--delta-rank", "2", "--dtype", "bf16"], "--dtype goes with"),
    "require-all of a gguf": (["export", "base", "out", "--gguf", "--require-all"], "--require-all goes with"),
    "a base of a model": (["export", "base", "out", "--gguf", "--base", "base"], "--base goes with"),
    "no tokenizer": (["export", "base", "out", "--gguf"], "holds no tokenizer"),
    "an unfinished run": (["export", "run", "out", "--delta-rank", "2"], "the run has not ended"),
    "a torn config": (["export", "torn", "out", "--delta-rank", "2"], "cannot be used"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_users_error_is_one_line_and_leaves_no_file(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2, one line on standard error without a traceback, and not a file is written."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save("lora")
    for name, text in (("run", CONFIG), ("torn", "model: [")):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(text)
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    ended = run(capsys, *words)
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("trimtab: ")
    assert message in ended.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["merge", "export"])
def test_help_is_a_manual_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments, examples, files and exit statuses are there; the lines are kept."""
    page = run(capsys, command, "--help")
    assert page.status == 0
    for words in ("ARGUMENTS\n", "EXAMPLES\n", "FILES\n", "EXIT STATUS\n", f"  trimtab {command} ", "OUT appears"):
        assert words in page.out
    usage = {"merge": "BASE ADAPTER OUT [OPTIONS]", "export": "SOURCE OUT (--delta-rank K | --gguf) [OPTIONS]"}
    assert page.out.startswith(f"Usage: trimtab {command} {usage[command]}\n")


def test_words_that_cannot_be_meant(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No number for a rank, an adapter's folder for a run's and the other way round, a file for a run's folder."""
    trimtab.attach(tiny_llama(), trimtab.LoRA(rank=2)).save(tmp_path / "lora")
    trimtab.attach(tiny_llama(), trimtab.Bottleneck(size=2)).save(tmp_path / "run" / "adapter")
    tiny_llama().save_pretrained(tmp_path / "bare")
    out = str(tmp_path / "out")
    for words, message in [
        (["export", "runs/small", out, "--delta-rank", "abc"], "'--delta-rank': 'abc' is not a whole number"),
        (
            ["export", str(tmp_path / "lora"), out, "--delta-rank", "4"],
            "is an adapter folder, which is",
        ),
        (["merge", str(tmp_path / "bare"), str(tmp_path / "run"), out], f"its adapter is {tmp_path}/run/adapter"),
        (["pretrain", "--resume", "runs/small/config.yaml"], "is a file; give the run's folder, runs/small"),
        (
            ["export", str(tmp_path / "bare"), out, "--gguf"],
            "holds no tokenizer that can be read; llama.cpp",
        ),
    ]:
        capsys.readouterr()
        ended = run(capsys, *words)
        assert ended.status == 2 and message in ended.err and ended.err.count("\n") == 1, ended.err
        assert not Path(out).exists()
