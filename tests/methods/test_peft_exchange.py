"""LoRA to PEFT and back: the same logits both ways, and files that cannot be read leave the model as it was."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_gpt2, tiny_llama, token_ids, train
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab

peft = pytest.importorskip("peft")

FAMILIES = ("llama", "gpt2", "bert", "t5")

#: Two linear layers and the input embedding of each family, by the end of their names.
SOME = {
    "llama": ("q_proj", "up_proj", "embed_tokens"),
    "gpt2": ("c_attn", "c_fc", "wpe"),
    "bert": ("query", "intermediate.dense", "word_embeddings"),
    "t5": ("SelfAttention.q", "wi", "relative_attention_bias"),
}

#: Ours, by what PEFT calls it; "some" stands for the targets of the family.
OURS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 4, "dora": True, "dropout": 0.1},
    "dora-rs": {"rank": 4, "alpha": 3, "dora": True, "rslora": True},
    "patterns": {"rank": 4, "targets": "linear", "rank_pattern": {"0": 3}, "alpha_pattern": {"1": 5.0}},
    "patterns-rs": {"rank": 4, "targets": "linear", "rslora": True, "rank_pattern": {"0": 3, "1": 2}},
    "bias-all": {"rank": 4, "bias": "all"},
    "bias-lora": {"rank": 4, "bias": "lora_only", "targets": "linear"},
    "bias-norms": {"rank": 4, "bias": "all", "train_also": ("norms",)},
    "embeddings": {"rank": 4, "targets": "some", "rank_pattern": {"2": 3}},
    "pissa": {"rank": 4, "alpha": 3, "init": "pissa"},
    "pissa-rs": {"rank": 4, "alpha": 3, "init": "pissa", "rslora": True, "rank_pattern": {"0": 3}},
    "pissa-dora": {"rank": 4, "alpha": 3, "init": "pissa", "dora": True},
    "pissa-wide": {"rank": 14, "alpha": 20, "init": "pissa"},
    "orthogonal": {"rank": 4, "init": "orthogonal"},
    "modules": {"rank": 4, "train_also": ("norms", "head")},
}


def ours(family: str, name: str) -> trimtab.LoRA:
    """A config, its short-hands replaced by the family's names."""
    settings = dict(OURS[name])
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {SOME[family][int(at)]: value for at, value in settings.get(key, {}).items()}
    if "targets" in settings:
        settings["targets"] = SOME[family] if settings["targets"] == "some" else SOME[family][:2]
    return trimtab.LoRA(**settings)


#: LLaMA and T5 have no biases; a tied head cannot be stored as a module of its own; T5's relative biases go unused.
PAIRS = [
    (family, name)
    for family in FAMILIES
    for name in OURS
    if not (name.startswith("bias") and family in ("llama", "t5")) and (family, name) not in {("gpt2", "modules")}
    if (family, name) != ("t5", "modules")
]


def trained(family: str, config: trimtab.LoRA) -> tuple[nn.Module, trimtab.Adapter]:
    model = MODELS[family]()
    adapter = trimtab.attach(model, config)
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    return model, adapter


def answer(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a PeftModel: of the model inside, which tells its family."""
    return logits(model.base_model.model, ids)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() < 2e-6 * b.norm())


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_peft_and_we_read_what_we_save(family: str, name: str, tmp_path: Path) -> None:
    """The trained model's logits come back in PEFT, and here in a fresh model that has trained nothing."""
    model, adapter = trained(family, ours(family, name))
    now, ids = logits(model, token_ids()), token_ids()
    base = logits(MODELS[family](), ids)
    assert (now - base).norm() > 1e-2 * base.norm()
    adapter.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses or does not know
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out|.*tie_word_embeddings|.*tied")
        theirs = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path))
    assert close(answer(theirs, ids), now)
    fresh = MODELS[family]()
    again = trimtab.load_adapter(fresh, tmp_path)
    assert close(logits(fresh, ids), now)
    assert {e.name for e in again.trainable()} == {e.name for e in adapter.trainable()}


#: PEFT's, by name; targets and patterns as above.
THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True, "lora_dropout": 0.1},
    "rs-patterns": {"use_rslora": True, "rank_pattern": {"0": 2, "1": 5}, "alpha_pattern": {"0": 3}},
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "embeddings": {"targets": 3},
    "modules": {"modules_to_save": {"llama": ["lm_head"], "bert": ["classifier"], "gpt2": ["ln_f"], "t5": None}},
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": {"llama": ["layers.0.mlp.up_proj"], "gpt2": ["h.1.mlp.c_fc"]}},
}


def their_config(family: str, name: str) -> Any:
    settings = dict(THEIRS[name])
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {SOME[family][int(at)]: value for at, value in settings.get(key, {}).items()}
    for key in ("modules_to_save", "exclude_modules"):
        if key in settings:
            settings[key] = settings[key].get(family)
    targets = list(SOME[family][: settings.pop("targets", 2)])
    return peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, init_lora_weights=False, **settings)


def moved(model: nn.Module) -> nn.Module:
    """A PEFT model with everything that trains off its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_we_read_what_peft_saves(family: str, name: str, tmp_path: Path) -> None:
    """Logits of PEFT's model come back here, and what we save of it is read by PEFT again."""
    theirs = moved(peft.get_peft_model(MODELS[family](), their_config(family, name)))
    theirs.save_pretrained(str(tmp_path / "a"))  # type: ignore[operator]
    ids = token_ids()
    now = answer(theirs, ids)
    model = MODELS[family]()
    base = logits(model, ids)
    assert (now - base).norm() > 1e-2 * base.norm()
    adapter = trimtab.load_adapter(model, tmp_path / "a")
    assert close(logits(model, ids), now)
    adapter.save(tmp_path / "b")
    back = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path / "b"))
    assert close(answer(back, ids), now)


#: Fields that PEFT takes: entries that match nothing, negative scales, and regular expressions.
ODD: dict[str, dict[str, Any]] = {
    "idle patterns": {"rank_pattern": {"nope": 3, "q_proj": 2}, "alpha_pattern": {"none_such": 1.0}},
    "shadowed pattern": {"alpha_pattern": {r"layers\..*q_proj": 5, "q_proj": 7}},
    "negative": {"lora_alpha": -12, "alpha_pattern": {"up_proj": 5}},
    "negative pattern": {"use_rslora": True, "alpha_pattern": {"up_proj": -5}},
    "negative dora": {"use_dora": True, "lora_alpha": -12},
    "negative embedding": {"lora_alpha": -12, "target_modules": ["embed_tokens", "up_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*\.1\..*(q|up)_proj"},
    "both patterns": {"exclude_modules": r".*\.1\..*", "target_modules": r".*q_proj|.*up_proj"},
    "idle exclusion": {"exclude_modules": ["nope", "0.self_attn.q_proj"]},
    "idle target": {"target_modules": ["q_proj", "query", "up_proj"]},
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_we_read_what_peft_takes_and_we_do_not(name: str, tmp_path: Path) -> None:
    """Where a file's meaning is clear it is read: the same logits, from the folder, and from what we save of it."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    theirs = moved(peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings | ODD[name])))
    theirs.save_pretrained(str(tmp_path / "a"))
    ids = token_ids()
    now = answer(theirs, ids)
    model = tiny_llama()
    assert (now - logits(model, ids)).norm() > 1e-2 * now.norm()
    adapter = trimtab.load_adapter(model, tmp_path / "a")
    assert close(logits(model, ids), now)
    adapter.save(tmp_path / "b")
    back = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"))
    assert close(answer(back, ids), now)


@pytest.mark.filterwarnings("ignore")
def test_we_read_peft_pissa(tmp_path: Path) -> None:
    """A PiSSA that PEFT saved as it is is decomposed here as there; what we save of it needs no decomposition."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = moved(peft.get_peft_model(tiny_llama(), config))
    theirs.save_pretrained(str(tmp_path / "a"))  # type: ignore[operator]
    model, ids = tiny_llama(), token_ids()
    before = copy.deepcopy(model.state_dict())
    adapter = trimtab.load_adapter(model, tmp_path / "a")
    assert torch.allclose(logits(model, ids), answer(theirs, ids), atol=1e-4)
    adapter.save(tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["init_lora_weights"] is True
    back = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "b"))
    assert torch.allclose(answer(back, ids), answer(theirs, ids), atol=1e-4)
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_of_a_tied_model_is_parted_by_name_only(tmp_path: Path) -> None:
    """PEFT adapts one side of tied weights; here that needs trimtab.untie or untie=True, which the file remembers."""
    config = peft.LoraConfig(r=4, target_modules=["wte"], init_lora_weights=False)
    theirs = moved(peft.get_peft_model(tiny_gpt2(), config))
    theirs.save_pretrained(str(tmp_path / "a"))  # type: ignore[operator]
    model, ids = tiny_gpt2(), token_ids()
    with pytest.raises(trimtab.CheckpointError, match=r"a: the adapter changes one .*trimtab\.untie\(model\) first"):
        trimtab.load_adapter(model, tmp_path / "a")
    trimtab.untie(model)
    trimtab.load_adapter(model, tmp_path / "a")
    assert close(logits(model, ids), answer(theirs, ids))
    adapted = tiny_gpt2()
    adapter = trimtab.attach(adapted, trimtab.LoRA(rank=4, targets=["wte"], untie=True))
    train(adapted, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    adapter.save(tmp_path / "b")
    again = tiny_gpt2()
    trimtab.load_adapter(again, tmp_path / "b")
    assert again.lm_head.weight is not again.transformer.wte.weight
    back = peft.PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "b"))
    assert close(logits(again, ids), logits(adapted, ids)) and close(answer(back, ids), logits(adapted, ids))


def test_a_trained_tied_weight_is_not_saved_as_one_side() -> None:
    """A file would part what is one tensor, so save refuses and names the ways out."""
    adapter = trimtab.attach(tiny_gpt2(), trimtab.LoRA(rank=4, train_also=("head",)))
    with pytest.raises(trimtab.CannotSave, match=r"one weight and was trained.*untie=True"):
        adapter.save("nowhere")
    assert not Path("nowhere").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter folder for the tiny LLaMA."""
    path = tmp_path_factory.mktemp("adapter")
    trained("llama", trimtab.LoRA(rank=2, targets=("q_proj", "embed_tokens"), train_also=("norms",)))[1].save(path)
    return path


def refuses(model: nn.Module, path: Path, message: str) -> None:
    """Loading raises one line that says `message`, and leaves weights, classes, flags and function as they were."""
    before, ids = copy.deepcopy(model), token_ids()
    with pytest.raises(trimtab.TrimtabError, match=message) as said:
        trimtab.load_adapter(model, path)
    assert "\n" not in str(said.value)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not trimtab.adapters(model) and torch.equal(logits(model, ids), logits(before, ids))
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and now.requires_grad == then.requires_grad, name


CHANGED: dict[str, dict[str, Any]] = {
    r"field_of_2030 = 'on' is not supported": {"field_of_2030": "on"},
    r"lora_bias = True is not supported": {"lora_bias": True},
    r"layer_replication = \[\[0, 1\]\] is not": {"layer_replication": [[0, 1]]},
    r"target_parameters = \['x'\] is not": {"target_parameters": ["x"]},
    r"trainable_token_indices = \[1\] is not": {"trainable_token_indices": [1]},
    r"exclude_modules = '.\*v' is not supported": {"exclude_modules": ".*v", "target_modules": "all-linear"},
    r"exclude_modules = 7 in its config is not a text": {"exclude_modules": 7},
    r"exclude_modules = '\(v' is no regular": {"exclude_modules": "(v"},
    r"lora_alpha = 0 gives no update": {"lora_alpha": 0},
    r"lora_alpha = 'two' in its config is not a number": {"lora_alpha": "two"},
    r"alpha_pattern\['q_proj'\] = 0.0 gives no update": {"alpha_pattern": {"q_proj": 0.0}},
    r"init_lora_weights = 'olora' replaced the base": {"init_lora_weights": "olora"},
    r"init_lora_weights = 'pissa_niter_4' replaced": {"init_lora_weights": "pissa_niter_4"},
    r"lacks lora_alpha": {"lora_alpha": ...},
    r"r = 'two' in its config is not a number": {"r": "two"},
    r"LoRA: bias = 'most'": {"bias": "most"},
    r"rank_pattern = \[1\]": {"rank_pattern": [1]},
    r"target_modules = 7": {"target_modules": 7},
    r"layers_to_transform = \['a'\] is no list": {"layers_to_transform": ["a"]},
    r"layers_to_transform goes with a list": {"target_modules": "q", "layers_to_transform": [1]},
    r"matches no linear layer": {"target_modules": ["qproj"]},
    r"rank = 4000 is above": {"r": 4000},
    r"lora_embedding_A is \(2, 97\) in the file and \(3, 97\)": {"r": 3},
    r"lacks model.layers.0.self_attn.k_proj.lora_A": {"target_modules": ["q_proj", "k_proj", "embed_tokens"]},
    r"has, but the model lacks,": {"target_modules": ["embed_tokens"]},
    r"lacks .*lora_magnitude_vector": {"use_dora": True, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("message", CHANGED)
def test_a_changed_config_is_refused(folder: Path, message: str, tmp_path: Path) -> None:
    """Unknown fields of a newer PEFT, fields without a form here, wrong types, and what does not fit the tensors."""
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    config = json.loads(file.read_text()) | CHANGED[message]
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    refuses(tiny_llama(), tmp_path / "a", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncate", "damaged"),
        ("header", "damaged"),
        ("drop", r"lacks model.layers.1.self_attn.q_proj.lora_B"),
        ("add", r"of another base: .* has no layer model.layers.7.*q_proj"),
        ("shape", r"lora_B is \(31, 2\) in the file and \(32, 2\) in the model"),
        ("nan", r"damaged: model.layers.1.self_attn.q_proj.lora_B.weight is not finite"),
        ("inf", r"damaged: model.layers.1.self_attn.q_proj.lora_B.weight is not finite"),
        ("integers", r"damaged: model.layers.1.self_attn.q_proj.lora_B.weight is int32"),
        ("table", r"brings model.embed_tokens.base_layer.weight, which is not the model's"),
        ("sample", "damaged"),
    ],
)
def test_changed_tensors_are_refused(folder: Path, change: str, message: str, tmp_path: Path) -> None:
    """A cut or overwritten file, a tensor too few, too many, of another shape or no numbers, and another table."""
    shutil.copytree(folder, tmp_path / "a")
    file, prefix = tmp_path / "a/adapter_model.safetensors", "base_model.model.model."
    raw, tensors = file.read_bytes(), load_file(file)
    key = f"{prefix}layers.1.self_attn.q_proj.lora_B.weight"
    if change == "truncate":
        file.write_bytes(raw[: len(raw) // 2])
    elif change == "header":
        file.write_bytes(b"\xff" * 16 + raw[16:])
    elif change == "sample":
        save_file(tensors, file, metadata={"trimtab": json.dumps({"base_sample": "&&"})})
    else:
        if change == "drop":
            del tensors[key]
        elif change == "add":
            tensors[f"{prefix}layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
        elif change == "shape":
            tensors[key] = tensors[key][:31].contiguous()
        elif change == "integers":
            tensors[key] = tensors[key].to(torch.int32)
        elif change in ("nan", "inf"):
            tensors[key][0, 1] = float(change)
        else:
            tensors[f"{prefix}embed_tokens.base_layer.weight"] = torch.zeros(97, 32)
        save_file(tensors, file)
    refuses(tiny_llama(), tmp_path / "a", message)


def test_another_base_is_refused(folder: Path) -> None:
    """Other weights of the same shapes, other shapes, and another family."""
    refuses(tiny_llama(seed=5), folder, "another base")
    refuses(tiny_llama(num_hidden_layers=1), folder, "another base")
    refuses(tiny_gpt2(), folder, "another base|matches no linear layer")
