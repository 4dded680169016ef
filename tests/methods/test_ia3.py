"""(IA)3: what it scales, what merging does to weights and biases, and its files in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama, tiny_mlp, token_ids, train
from torch import nn

import trimtab
from trimtab.methods.ia3 import IA3Adapter

FAMILIES = ("llama", "gpt2", "bert", "t5")


def trained(model: nn.Module, lr: float = 0.05, **settings: Any) -> IA3Adapter:
    adapter = trimtab.attach(model, trimtab.IA3(**settings))
    assert isinstance(adapter, IA3Adapter)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=lr)), range(1, 5))
    return adapter


@pytest.mark.parametrize(
    ("family", "outputs", "inputs"),
    [
        ("llama", ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
        ("gpt2", ["attn.c_attn"], ["mlp.c_proj"]),
        ("bert", ["attention.self.key", "attention.self.value"], ["output.dense"]),
    ],
)
def test_the_automatic_choice(family: str, outputs: list[str], inputs: list[str]) -> None:
    """Keys, values and the second feed-forward projection of every block, and nothing else."""
    model = MODELS[family]()
    found = trimtab.IA3().resolve(model)
    assert [len(names) for names in found] == [2 * len(outputs), 2 * len(inputs)]
    for names, endings in zip(found, (outputs, inputs), strict=True):
        assert all(any(name.endswith(f".{ending}") for ending in endings) for name in names)
    assert not any("attention.output" in name for name in found[1])


def test_the_automatic_choice_on_t5() -> None:
    """Two self-attentions and one cross-attention a pair of blocks, each with k and v; wo of every block."""
    outputs, inputs = trimtab.IA3().resolve(MODELS["t5"]())
    assert len(outputs) == 2 * 6 and {name[-2:] for name in outputs} == {".k", ".v"}
    assert len(inputs) == 4 and all(name.endswith("DenseReluDense.wo") for name in inputs)


def test_only_the_vectors_train_and_they_are_few() -> None:
    """On LLaMA: 2 x (16 + 16 + 48) numbers, all ones at the start."""
    model = tiny_llama()
    adapter = trimtab.attach(model, trimtab.IA3())
    entries = adapter.trainable()
    assert sum(e.parameter.numel() for e in entries) == 2 * (16 + 16 + 48)
    assert all(bool((e.parameter == 1).all()) for e in entries)


def test_what_cannot_be_found_is_named() -> None:
    """No names known, nothing asked for, and endings that match nothing; the model stays as it was."""
    model = tiny_mlp()
    for settings, message in [
        ({}, r"feedforward='auto'.*Mlp.*feedforward=\[\]"),
        ({"feedforward": ()}, r"targets='auto'.*keys or values.*targets=\[\]"),
        ({"feedforward": (), "targets": ()}, "both empty"),
        ({"feedforward": ("nope",), "targets": ()}, "'nope' matches no linear layer"),
        ({"feedforward": ("last",), "targets": (), "exclude": ("nope",)}, "exclude"),
    ]:
        with pytest.raises(trimtab.TargetError, match=message):
            trimtab.attach(model, trimtab.IA3(**settings))
    assert not trimtab.adapters(model)
    adapter = trained(tiny_encoder(), targets=(), feedforward="auto")
    assert len(adapter.layers) == 2 and all(layer.feedforward for layer in adapter.layers.values())
    assert trimtab.IA3(seed=1).idle_settings().keys() == {"seed"} and not trimtab.IA3().idle_settings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_are_one_function(family: str, dtype: torch.dtype) -> None:
    """merge() leaves plain modules that answer as the adapter did; unmerge gives weights and biases back."""
    model = MODELS[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    adapter = trimtab.attach(model, trimtab.IA3(), dtype=dtype, keep_base="host")
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=0.05)), range(1, 5))
    weights = copy.deepcopy(model.state_dict())
    out = logits(model, token_ids())
    adapter.merge()
    assert {p.dtype for p in model.parameters()} == {dtype}
    before, after = out.double(), logits(model, token_ids()).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (after - before).norm() < tolerance * before.norm()
    adapter.unmerge()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, token_ids()), out)


def test_rows_and_biases_or_columns_are_scaled_exactly() -> None:
    """Merged values are the float64 products, rounded once; other tensors are untouched."""
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    before = copy.deepcopy(model.state_dict())
    adapter = trained(model)
    vectors = {name: p.detach().double() for name, p in adapter.own().items()}
    tensors = {name: adapter.merged_tensor(name, value) for name, value in before.items()}
    adapter.merge()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = set()
    for name, vector in vectors.items():
        layer = name.removesuffix(".ia3_l")
        weight = (before[f"{layer}.weight"].double() * vector).float()
        assert torch.equal(after[f"{layer}.weight"], weight)
        expected.add(f"{layer}.weight")
        if vector.shape[1] == 1:
            assert torch.equal(after[f"{layer}.bias"], (before[f"{layer}.bias"].double() * vector[:, 0]).float())
            expected.add(f"{layer}.bias")
    assert changed == expected
    assert all(torch.equal(tensors[name], after[name]) for name in before)


@pytest.mark.parametrize("also", [(), ("norms", "head")])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_folder(family: str, also: tuple[str, ...], tmp_path: Path) -> None:
    """peft's logits, and those of a reload, are ours."""
    peft = pytest.importorskip("peft")
    if also and family in ("gpt2", "t5"):
        also = ("norms",)  # a tied head cannot be stored as a module of its own
    model = MODELS[family]()
    base = logits(model, token_ids())
    trained(model, train_also=also).save(tmp_path)
    out = logits(model, token_ids())
    assert not torch.allclose(base, out, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    assert torch.allclose(logits(theirs.get_base_model(), token_ids()), out, atol=1e-5)
    fresh = MODELS[family]()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), out)


@pytest.mark.parametrize("regex", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_a_peft_folder(family: str, regex: bool, tmp_path: Path) -> None:
    """peft's own choice of layers (BERT's attention output among its feed-forward) answers the same here."""
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"init_ia3_weights": False}
    if regex:
        known = {"llama": ("[kv]_proj", "down_proj"), "gpt2": ("c_attn", r"mlp\.c_proj")}
        known |= {"bert": ("key|value", r"output\.dense"), "t5": ("k|v", "wo")}
        outputs, inputs = known[family]
        settings |= {"target_modules": rf".*\.({outputs}|{inputs})", "feedforward_modules": rf".*\.({inputs})"}
    theirs = peft.get_peft_model(MODELS[family](), peft.IA3Config(**settings))
    for name, parameter in theirs.named_parameters():
        if "ia3_l" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
    theirs.save_pretrained(str(tmp_path))
    ours = MODELS[family]()
    trimtab.load_adapter(ours, tmp_path)
    assert torch.allclose(logits(ours, token_ids()), logits(theirs.get_base_model(), token_ids()), atol=1e-5)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    """Another side, missing targets, unknown fields, another base: one line each, and the model stays usable."""
    trained(tiny_llama()).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for change, message in [
        ({"feedforward_modules": []}, r"\(1, 48\) in the file and \(32, 1\)"),
        ({"target_modules": None}, "target_modules"),
        ({"exclude_modules": "a.*"}, "exclude_modules"),
        ({"new_trick": True}, "new_trick"),
    ]:
        file.write_text(json.dumps(saved | change))
        model = tiny_llama()
        with pytest.raises(trimtab.CheckpointError, match=message):
            trimtab.load_adapter(model, tmp_path)
        assert not trimtab.adapters(model)
    file.write_text(json.dumps(saved))
    with pytest.raises(trimtab.CheckpointError, match="of another base"):
        trimtab.load_adapter(tiny_llama(intermediate_size=40), tmp_path)
    with pytest.raises(trimtab.CheckpointError, match="of another base"):
        trimtab.load_adapter(tiny_gpt2(), tmp_path)


def test_resuming_is_exact() -> None:
    """2N = N + save + resume + N, bit for bit."""
    whole = tiny_llama()
    adapter = trimtab.attach(whole, trimtab.IA3())
    train(whole, adapter, torch.optim.SGD(adapter.parameter_groups(lr=0.1)), range(1, 9))
    model, again = tiny_llama(), tiny_llama()
    first = trimtab.attach(model, trimtab.IA3())
    train(model, first, torch.optim.SGD(first.parameter_groups(lr=0.1)), range(1, 5))
    second = trimtab.attach(again, trimtab.IA3())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(again, second, torch.optim.SGD(second.parameter_groups(lr=0.1)), range(5, 9))
    assert torch.equal(logits(again, token_ids()), logits(whole, token_ids()))
