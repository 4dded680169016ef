"""What a callback and Restarts take, once each, and what they say at the end where nothing can be merged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from models_for_tests import tiny_llama, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from trainer_parts import arguments, build, relora
from transformers import Trainer

import trimtab
from trimtab.interop.peft import STATE_FILE, Restarts
from trimtab.interop.transformers import TrimtabCallback


def peft_model() -> nn.Module:
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "config",
    [trimtab.PromptTuning(length=3), trimtab.Bottleneck(size=4), trimtab.BitFit(add_bias=True), trimtab.READ(size=4)],
    ids=["prompt", "bottleneck", "bitfit", "read"],
)
def test_no_merged_form_is_said_at_the_end(
    config: trimtab.Method, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model stays with its adapter; the warning names what saves it, and that does."""
    callback, model = TrimtabCallback(config), tiny_llama()
    trainer = build(arguments(tmp_path, 2), callback, model)
    with caplog.at_level(logging.WARNING, "trimtab"):
        trainer.train()
    assert "callback.adapter.save(folder)" in caplog.text and "no plain model" in caplog.text
    assert isinstance(callback.adapter, trimtab.Adapter)
    callback.adapter.save(tmp_path / "out")
    again = tiny_llama()
    trimtab.load_adapter(again, tmp_path / "out")
    ids = token_ids()
    ours, theirs = (m.eval()(input_ids=ids).logits for m in (model, again))
    assert (ours - theirs).abs().max() <= 1e-6
    with pytest.raises(trimtab.ConfigError, match=r"merge_at_end=True: .*adapter.save"):
        build(arguments(tmp_path), TrimtabCallback(config, merge_at_end=True))


def test_a_merged_model_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA has a merged form, and the end is silent."""
    with caplog.at_level(logging.WARNING, "trimtab"):
        build(arguments(tmp_path, 2), TrimtabCallback(trimtab.LoRA(rank=2))).train()
    assert "no plain model" not in caplog.text


def test_a_rewarm_that_leaves_no_restart(tmp_path: Path) -> None:
    """ReLoRA that would never restart is refused, as in pretrain."""
    trainer = build(arguments(tmp_path), TrimtabCallback(relora(), rewarm_steps=9))
    with pytest.raises(trimtab.ConfigError, match=r"rewarm_steps = 9 is longer .*step 4 of 12"):
        trainer.train()


def test_one_callback_a_model(tmp_path: Path) -> None:
    """Two would each count, attach and save."""
    for other in (trimtab.LoRA(rank=2), None):
        model = tiny_llama()
        first = TrimtabCallback(relora())
        adapter = first.attach(model)
        callbacks = [first, TrimtabCallback(other if other is not None else adapter)]
        with pytest.raises(trimtab.ConfigError, match="already, and one is the limit"):
            Trainer(model=model, args=arguments(tmp_path), callbacks=callbacks)
        Trainer(model=model, args=arguments(tmp_path), callbacks=[first])


def test_what_is_no_method_is_refused_when_made() -> None:
    """A name is no config, and neither is None."""
    for wrong in ("lora", None, trimtab.LoRA):
        with pytest.raises(trimtab.ConfigError, match="takes a method's config"):
            TrimtabCallback(wrong)  # type: ignore[arg-type]


def test_one_restarts_a_model() -> None:
    """Two would restart it twice; when the first is gone, or has given the model back, another may come."""
    model = peft_model()
    first = Restarts(model, every=3)
    with pytest.raises(trimtab.ConfigError, match="already, and two would both restart it"):
        Restarts(model, every=3)
    del first
    assert Restarts(model, every=3)


def test_a_state_makes_its_folder_and_knows_its_settings(tmp_path: Path) -> None:
    """No folder need be there, and other settings than the stored ones are named."""
    folder = tmp_path / "a" / "b"
    assert Restarts(peft_model(), every=3).save_state(folder) == folder / STATE_FILE
    Restarts(peft_model(), every=3)
    with pytest.raises(trimtab.CheckpointError, match="restart_every = 3, and the method has restart_every = 4"):
        Restarts(peft_model(), every=4).load_state(folder)
