"""Adapter folders that were tampered with or damaged: nothing of the base is replaced, each is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_for_tests import tiny_llama
from safetensors.torch import load_file, save_file

import trimtab

METHODS = {
    "lora": trimtab.LoRA(rank=2),
    "vera": trimtab.VeRA(rank=4),
    "ia3": trimtab.IA3(),
    "adalora": trimtab.AdaLoRA(rank=2, init_rank=3),
    "bottleneck": trimtab.Bottleneck(size=4),
    "prompt": trimtab.PromptTuning(length=3),
    "read": trimtab.READ(size=4),
}
NORM = "base_model.model.model.norm.weight"


def saved(config: trimtab.Method, folder: Path) -> Path:
    trimtab.attach(tiny_llama(), config).save(folder)
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(folder: Path, message: str) -> None:
    """One line that says what is wrong, and the model is as it was and free."""
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(trimtab.CheckpointError, match=message) as said:
        trimtab.load_adapter(model, folder)
    assert "\n" not in str(said.value)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    trimtab.attach(model, trimtab.LoRA(rank=2)).detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_base_tensor_that_the_config_does_not_cover_is_refused(method: str, tmp_path: Path) -> None:
    """A norm of zeros beside the adapter replaces nothing; with modules_to_save that names it, it loads."""
    folder = saved(METHODS[method], tmp_path / "a")
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.zeros(32)}))
    refused(folder, "would replace the base's model.norm.weight.*modules_to_save")
    change(folder, modules_to_save=["layers"])
    refused(folder, "would replace the base's model.norm.weight")
    change(folder, modules_to_save=["norm"])
    model = tiny_llama()
    trimtab.load_adapter(model, folder)
    assert not model.model.norm.weight.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_base_tensor_is_passed_over(method: str, tmp_path: Path) -> None:
    """PEFT writes embeddings that did not train; equal ones change nothing and do not train here either."""
    folder, model = saved(METHODS[method], tmp_path / "a"), tiny_llama()
    rewrite(folder, lambda tensors: tensors.update({NORM: model.model.norm.weight.detach().clone()}))
    adapter = trimtab.load_adapter(model, folder)
    assert {entry.group for entry in adapter.trainable()} == {"adapter"}


def test_biases_need_the_bias_setting(tmp_path: Path) -> None:
    """With bias: none a bias is refused; "lora_only" covers those of adapted layers, "all" every one."""
    folder = tmp_path / "a"
    biased = {"attention_bias": True, "mlp_bias": True}
    trimtab.attach(tiny_llama(**biased), trimtab.LoRA(rank=2, targets=("q_proj",))).save(folder)
    layer = "base_model.model.model.layers.0"
    q, down = f"{layer}.self_attn.q_proj.base_layer.bias", f"{layer}.mlp.down_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({q: torch.ones(32)}))
    for bias, fits in (("none", False), ("lora_only", True), ("all", True)):
        change(folder, bias=bias)
        if fits:
            trimtab.load_adapter(tiny_llama(**biased), folder)
        else:
            with pytest.raises(trimtab.CheckpointError, match=r"replace the base's .*q_proj\.bias"):
                trimtab.load_adapter(tiny_llama(**biased), folder)
    rewrite(folder, lambda tensors: tensors.update({down: torch.ones(32)}))
    trimtab.load_adapter(tiny_llama(**biased), folder)
    change(folder, bias="lora_only")
    with pytest.raises(trimtab.CheckpointError, match=r"replace the base's .*down_proj\.bias"):
        trimtab.load_adapter(tiny_llama(**biased), folder)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: torch.full_like(t, float("nan")), "is not finite"),
        (lambda t: torch.full_like(t, float("-inf")), "is not finite"),
        (lambda t: torch.ones_like(t, dtype=torch.int64), "is int64"),
        (lambda t: torch.ones_like(t, dtype=torch.bool), "is bool"),
        (lambda t: t.to(torch.complex64), "is complex64"),
    ],
    ids=["nan", "inf", "int64", "bool", "complex"],
)
def test_values_that_no_training_leaves_are_refused(
    method: str, spoil: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    """The tensor is named."""
    folder = saved(METHODS[method], tmp_path / "a")
    rewrite(folder, lambda tensors: tensors.update({first(tensors): spoil(tensors[first(tensors)])}))
    name = first(load_file(folder / "adapter_model.safetensors")).removeprefix("base_model.model.")
    refused(folder, f"{name} {message}")


FIELDS = [
    ("lora", {"peft_type": []}, "peft_type"), ("lora", {"peft_type": {}}, "peft_type"),
    ("lora", {"target_modules": 5}, "target_modules"), ("lora", {"target_modules": [5]}, "target_modules"),
    ("lora", {"modules_to_save": 5}, "modules_to_save"), ("lora", {"base_model_name_or_path": 5}, "base_model_name"),
    ("lora", {"use_rslora": "no"}, "use_rslora"), ("lora", {"task_type": []}, "task_type"),
    ("lora", {"r": 10**400}, "r = 1000"), ("lora", {"lora_alpha": float("nan")}, "lora_alpha"),
    ("lora", {"layers_pattern": [1], "layers_to_transform": [0]}, "layers_pattern"),
    ("vera", {"target_modules": 5}, "target_modules"), ("ia3", {"feedforward_modules": 5}, "feedforward_modules"),
    ("ia3", {"exclude_modules": 5}, "exclude_modules"), ("adalora", {"init_r": None}, "init_r"),
    ("adalora", {"target_r": "x"}, "target_r"), ("adalora", {"lora_alpha": None}, "lora_alpha"),
    ("adalora", {"total_step": "x"}, "total_step"), ("adalora", {"rank_pattern": [1]}, "rank_pattern"),
    ("adalora", {"rank_pattern": {"q": 3}}, "rank_pattern"), ("prompt", {"num_virtual_tokens": "x"}, "num_virtual"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "values", "field"), FIELDS, ids=[f"{m} {v}"[:40] for m, v, _ in FIELDS])
def test_a_field_of_the_wrong_kind_is_named(method: str, values: dict[str, object], field: str, tmp_path: Path) -> None:
    """Whatever JSON a config holds, the message is ours and names the field."""
    folder = saved(METHODS[method], tmp_path / "a")
    change(folder, **values)
    refused(folder, f"the adapter's {field}")


def test_deep_json_is_refused(tmp_path: Path) -> None:
    """A config, or our entries in the tensor file, of a hundred thousand brackets."""
    folder = saved(METHODS["lora"], tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"trimtab": "[" * 100_000})
    refused(folder, "is damaged")
    (folder / "adapter_config.json").write_text("[" * 100_000)
    refused(folder, "adapter_config.json cannot be read")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_link_out_of_the_folder_is_not_read(name: str, tmp_path: Path) -> None:
    """A link into the blobs of the hub's cache is its own file, a link elsewhere is not; a linked folder is fine."""
    folder = saved(METHODS["lora"], tmp_path / "models--a--b" / "snapshots" / "abc" / "sub")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (folder / name).rename(blobs / "x")
    (folder / name).symlink_to(blobs / "x")
    (tmp_path / "linked").symlink_to(folder)
    trimtab.load_adapter(tiny_llama(), folder)
    trimtab.load_adapter(tiny_llama(), tmp_path / "linked")
    (blobs / "x").rename(tmp_path / "x")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "x")
    refused(folder, "leads out of the folder")


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    """A folder that is missing, a tensor too few or too many, a method of tomorrow."""
    refused(tmp_path / "none", "there is no such folder; adapters are not looked up on the hub")
    folder = saved(METHODS["lora"], tmp_path / "a")
    refused(folder / "adapter_config.json", "is a file; give the folder")
    refused(tmp_path, "adapter_config.json is missing")
    change(folder, peft_type="TOMORROW")
    refused(folder, "'TOMORROW' is of no known method; those known are ADALORA, IA3, LORA, ")
    change(folder, peft_type="LORA")
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.more.weight": torch.ones(2)}))
    refused(folder, "damaged, or of another base: it has, but the model lacks, more.weight")
    rewrite(folder, lambda tensors: [tensors.pop("base_model.model.more.weight"), tensors.pop(first(tensors))])
    refused(folder, "damaged, or of another base: it lacks")


def test_the_known_peft_types_are_those_that_load() -> None:
    """The list in the message is that of the methods."""
    from trimtab.methods.foldercheck import PEFT_TYPES

    known = set()
    for kind in (*PEFT_TYPES, "LOHA"):
        for method in trimtab.methods.registry().values():
            try:
                if method.from_saved({"peft_type": kind}) is not None:
                    known.add(kind)
            except trimtab.CheckpointError:
                known.add(kind)
    assert known == set(PEFT_TYPES)
