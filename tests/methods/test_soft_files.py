"""Prompts and prefixes exchanged with PEFT, both ways, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_llama, token_ids, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trimtab

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
OURS: dict[str, trimtab.Method] = {
    "prompt": trimtab.PromptTuning(length=5),
    "prefix": trimtab.PrefixTuning(length=5),
    "prefix-mlp": trimtab.PrefixTuning(length=5, projection=True, projection_size=7),
}


def answers(model: nn.Module, mask: Tensor | None) -> Tensor:
    """Logits of the batch's own positions: PEFT's models answer for the prompt's, too."""
    ids = token_ids()
    t5 = "T5" in type(getattr(model, "base_model", model)).__name__ or "T5" in type(model).__name__
    with torch.no_grad():
        decoder = {"decoder_input_ids": ids[:, :5]} if t5 else {}
        out: Tensor = model.eval()(input_ids=ids, attention_mask=mask, **decoder).logits
    return out if out.dim() == 2 else out[:, -(5 if t5 else 12) :]


def masks() -> list[Tensor | None]:
    padded = torch.ones(3, 12, dtype=torch.long)
    padded[0, -4:] = 0
    return [None, padded]


def theirs(family: str, kind: str) -> Any:
    """A model that PEFT made, with an adapter of that kind."""
    peft = pytest.importorskip("peft")
    settings = {"num_virtual_tokens": 5, "task_type": TASKS[family]}
    if kind == "prompt":
        config = peft.PromptTuningConfig(**settings)
    else:
        config = peft.PrefixTuningConfig(**settings, prefix_projection=kind == "prefix-mlp", encoder_hidden_size=7)
    torch.manual_seed(3)
    return peft.get_peft_model(MODELS[family](), config)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", TASKS)
def test_we_read_what_peft_wrote(family: str, kind: str, tmp_path: Path) -> None:
    """Logits of the batch's positions are bit-equal, with and without padding, classifiers included."""
    peft = pytest.importorskip("peft")
    made = theirs(family, kind)
    if family == "bert":
        nn.init.normal_(made.base_model.classifier.modules_to_save["default"].weight)
    made.save_pretrained(str(tmp_path))
    model = MODELS[family]()
    base = logits(model, token_ids())
    trimtab.load_adapter(model, tmp_path)
    # The file holds what the network of prefix-mlp made; in memory PEFT runs it for each sequence of a batch, which
    # rounds by the batch's size and the processor.
    again = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    for mask in masks():
        assert torch.equal(answers(model, mask), answers(again, mask))
        torch.testing.assert_close(answers(model, mask), answers(made, mask), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model, token_ids()), base, atol=1e-4)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", TASKS)
def test_peft_reads_what_we_wrote(family: str, kind: str, tmp_path: Path) -> None:
    """After training here, PEFT's model and ours, loaded from our folder, answer as the trained one."""
    peft = pytest.importorskip("peft")
    model = MODELS[family]()
    adapter = trimtab.attach(model, OURS[kind])
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    adapter.save(tmp_path)
    other = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    again = MODELS[family]()
    trimtab.load_adapter(again, tmp_path)
    assert {entry.group for entry in trimtab.adapters(again)["default"].trainable()} == {"adapter"}
    for mask in masks():
        out = answers(model, mask)
        assert torch.allclose(answers(other, mask), out, atol=1e-6)
        assert torch.allclose(answers(again, mask), out, atol=1e-6)


@pytest.mark.parametrize("kind", OURS)
def test_a_file_holds_one_tensor(kind: str, tmp_path: Path) -> None:
    """prompt_embeddings, (p, d) or (p, 2 * layers * kv_heads * head_dim): a projection is thrown away."""
    trimtab.attach(tiny_llama(), OURS[kind]).save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    width = 32 if kind == "prompt" else 2 * 2 * 2 * 8
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"prompt_embeddings": (5, width)}
    assert not json.loads((tmp_path / "adapter_config.json").read_text()).get("prefix_projection")


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_generation_is_pefts(kind: str, tmp_path: Path) -> None:
    """Greedy decoding and beams with a cache give PEFT's tokens."""
    made = theirs("llama", kind).eval()
    made.save_pretrained(str(tmp_path))
    model = tiny_llama().eval()
    trimtab.load_adapter(model, tmp_path)
    ids = token_ids()
    for beams in (1, 3):
        settings = {
            "max_new_tokens": 8,
            "do_sample": False,
            "num_beams": beams,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        mask = torch.ones_like(ids)
        expected = made.generate(input_ids=ids, attention_mask=mask, **settings)
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), expected)


def test_a_norm_that_trained_beside_reaches_peft(tmp_path: Path) -> None:
    """train_also is saved under the names that PEFT has for whole modules of these methods."""
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.PromptTuning(length=5, train_also=("norms",)))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=3e-2)), range(1, 4))
    adapter.save(tmp_path)
    other = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.allclose(answers(other, None), answers(model, None), atol=1e-5)
    adapter = trimtab.load_adapter(tiny_llama(), tmp_path)
    assert {e.group for e in adapter.trainable()} == {"adapter", "norm"}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_wrong_folders_are_refused(kind: str, tmp_path: Path) -> None:
    """Unknown fields, no tensor, other shapes, other heads, other weights: one line, and the model stays free."""
    trimtab.attach(tiny_llama(), OURS[kind]).save(tmp_path)
    file, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    settings, whole = json.loads(file.read_text()), tensors.read_bytes()
    model = tiny_llama()

    def refused(message: str, base: nn.Module = model) -> None:
        with pytest.raises(trimtab.CheckpointError, match=message):
            trimtab.load_adapter(base, tmp_path)
        assert not trimtab.adapters(base)

    changes: list[tuple[dict[str, Any], str]] = [
        ({"gated": True}, "gated = True"),
        ({"num_virtual_tokens": 4}, "another base"),
        ({"num_virtual_tokens": 0}, "length = 0"),
    ]
    if kind == "prefix":
        changes += [({"num_attention_heads": 4}, "num_attention_heads is 4"), ({"num_layers": 1}, "num_layers is 1")]
    else:
        changes += [({"num_transformer_submodules": 3}, "num_transformer_submodules = 3")]
    for change, message in changes:
        file.write_text(json.dumps(settings | change))
        refused(message)
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "num_virtual_tokens"}))
    refused("lacks num_virtual_tokens")
    file.write_text(json.dumps(settings))
    refused("another base", tiny_llama(seed=5))
    save_file({"something": torch.zeros(2)}, tensors)
    refused("no prompt_embeddings")
    tensors.write_bytes(whole[:-20])
    refused("damaged")
    tensors.write_bytes(whole)
    trimtab.load_adapter(model, tmp_path).detach()
