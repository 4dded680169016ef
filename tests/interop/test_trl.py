"""TRL's SFTTrainer with the same callback: its loss is its own, its checkpointing is on, and resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models_for_tests import VOCAB, tiny_llama, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from trainer_parts import equal, rates, relora, snapshot
from transformers import PreTrainedTokenizerFast

import trimtab
from trimtab.interop.transformers import TrimtabCallback

trl = pytest.importorskip("trl")


def words() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are the tokens."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1", pad_token="w2")


def build(out: Path, callback: TrimtabCallback, model: nn.Module | None = None, **changes: Any) -> Any:
    texts = [" ".join(f"w{i}" for i in row) for row in token_ids(seed=3, rows=40).tolist()]
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
        "max_length": 12,
    }
    model = tiny_llama(attention_dropout=0.1) if model is None else model
    parts = {"optimizers": callback.optimizers(model, trl.SFTConfig(**(settings | changes)))} if _warm(callback) else {}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**(settings | changes)),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=words(),
        callbacks=[callback],
        **parts,
    )


def _warm(callback: TrimtabCallback) -> bool:
    return isinstance(callback._config, trimtab.ReLoRA) and bool(callback._config.warm_start_steps)


@pytest.mark.parametrize("warm", [0, 3])
def test_restarts_and_resuming_in_trl(tmp_path: Path, warm: int) -> None:
    """Rates and restarts are the schedule's; 2N steps equal N, save, resume, N, bit for bit."""

    def run(resume: str | None = None, **changes: Any) -> tuple[Any, TrimtabCallback]:
        config = relora(dropout=0.2, warm_start_steps=warm, restart_every=4 - warm // 3)
        callback = TrimtabCallback(config, rewarm_steps=2, merge_at_end=False)
        trainer = build(tmp_path, callback, gradient_accumulation_steps=2, **changes)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback

    whole, callback = run(save_strategy="steps", save_steps=5)
    assert isinstance(callback.adapter, trimtab.Adapter)
    restarts = callback.adapter.restarts(12, 2)
    schedule = trimtab.Schedule(12, floor=0.0, warm_start_steps=warm, restarts=restarts, rewarm_steps=2)
    assert rates(whole) == pytest.approx([1e-2 * schedule(t) for t in range(12)], rel=1e-12)
    assert [e["step"] for e in callback.events if e["event"] == "restart"] == list(restarts)
    resumed, callback = run(str(tmp_path / "checkpoint-5"))
    assert [e["step"] for e in callback.events] == [n for n in restarts if n > 5]
    assert equal(snapshot(whole.model), snapshot(resumed.model))


def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    """TRL multiplies with the head's weight past its forward: an adapter there would never train."""
    config = trimtab.LoRA(rank=2, targets=("q_proj", "lm_head"))
    trainer = build(tmp_path, TrimtabCallback(config))
    with pytest.raises(trimtab.ConfigError, match=r"lora_A.*would never train"):
        trainer.train()
    model = tiny_llama()
    trainer = build(tmp_path, TrimtabCallback(trimtab.LoRA(rank=2)), model)
    before = snapshot(model)
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in snapshot(model).items() if n in before)
