"""`trimtab merge`: file to file, the same result as in memory, within the memory of a few tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from checkpoints import everything, merged, move, save, trained_adapter
from models_for_tests import MODELS, logits, tiny_gpt2, tiny_llama, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def in_memory(family: str, base: Path, adapter: Path, out: Path) -> nn.Module:
    """The same merge through the library."""
    model = type(MODELS[family]()).from_pretrained(base, dtype="auto")
    trimtab.load_adapter(model, adapter).merge()
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_it_is_the_merge_in_memory_bit_for_bit(family: str, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    """Every tensor equals that of load_adapter + merge + save_pretrained; the files are the base's."""
    model = MODELS[family]().to(dtype)
    move(model, everything)
    save(model, tmp_path / "base", **({"max_shard_size": "20KB"} if sharded else {}))
    trained_adapter(family, tmp_path / "base", tmp_path / "adapter")
    wanted = in_memory(family, tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    report = merged(tmp_path)
    found, expected, before = (tensors_in(tmp_path / name) for name in ("out", "wanted", "base"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert report.changed == sorted(name for name in found if not torch.equal(found[name], before[name]))
    assert len(report.changed) > 5
    weights = {path.name for path in (tmp_path / "base").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == weights
    assert (len(weights) > 3) == sharded
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(again, token_ids()), logits(wanted, token_ids()))


VARIANTS = {
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "patterns": {"name": "lora", "rank": 4, "alpha_pattern": {".*": 3.0}},
    "biases": {"name": "lora", "rank": 4, "bias": "all"},
    "untied": {"name": "lora", "rank": 4, "train_also": ["embeddings", "norms", "head"], "untie": True},
    "adalora": {"name": "adalora", "total_steps": 30},
    "bitfit": {"name": "bitfit"},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "rank": 8, "pair": "peft"},
}
#: LLaMA has no biases.
SETTINGS = [
    (f, v) for f in ("llama", "gpt2") for v in VARIANTS if (f, v) not in {("llama", "biases"), ("llama", "bitfit")}
]


@pytest.mark.parametrize(("family", "variant"), SETTINGS)
def test_every_method_merges_as_in_memory(family: str, variant: str, tmp_path: Path) -> None:
    """No method is known to the merge, and each gives in files what it gives in memory, bit for bit."""
    model = MODELS[family]().to(torch.bfloat16)
    save(model, tmp_path / "base")
    config = dict(VARIANTS[variant])
    if variant == "vera":
        config["targets"] = ["q_proj"] if family == "llama" else ["c_attn"]
    if variant == "patterns":
        config["rank_pattern"] = {"q_proj" if family == "llama" else "c_attn": 2}
    trained_adapter(family, tmp_path / "base", tmp_path / "adapter", config)  # type: ignore[arg-type]
    in_memory(family, tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted")
    report = merged(tmp_path, untie=variant == "untied")
    found, expected = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "wanted")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert report.changed


@pytest.mark.parametrize("config", [{"name": "prompt", "length": 4}, {"name": "prefix", "length": 4}])
def test_a_method_without_a_merged_form_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    """CannotMerge, and nothing is written."""
    save(tiny_llama(), tmp_path / "base")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter", config)  # type: ignore[arg-type]
    with pytest.raises(trimtab.CannotMerge):
        merged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_pefts_own_folder(family: str, tmp_path: Path) -> None:
    """An adapter that peft made, with modules stored in full, gives what peft's merge gives."""
    save(MODELS[family](), tmp_path / "base")
    modules = {"llama": ["lm_head", "norm"], "bert": ["classifier"], "gpt2": ["ln_f"]}[family]
    torch.manual_seed(5)
    targets = {"llama": ["q_proj", "up_proj"], "bert": ["query", "value"], "gpt2": ["c_attn"]}[family]
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=modules, init_lora_weights=False)
    theirs = peft.get_peft_model(MODELS[family](), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    merged(tmp_path)
    ours = type(MODELS[family]()).from_pretrained(tmp_path / "out")
    wanted = logits(theirs.merge_and_unload(), token_ids())
    assert torch.allclose(logits(ours, token_ids()), wanted, atol=1e-5)
    assert not torch.allclose(logits(MODELS[family](), token_ids()), wanted, atol=1e-2)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16")],
)
def test_another_dtype_is_rounded_once(stored: str, wanted: str, tmp_path: Path) -> None:
    """--dtype: the exact sum in the wanted dtype, not the sum in the stored one and then that; the config says it."""
    base = tiny_llama().to(getattr(torch, stored))
    save(base, tmp_path / "base")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    merged(tmp_path, dtype=getattr(torch, wanted))
    found = tensors_in(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {getattr(torch, wanted)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = base.get_parameter(f"{name}.weight").double() + 16 / 4 * b @ a
    assert torch.equal(found[f"{name}.weight"], exact.float().to(getattr(torch, wanted)))


def test_config_and_tokenizer_come_along_and_nothing_else(tmp_path: Path) -> None:
    """Known files are copied; pickles and code are not, whatever they are called."""
    base = save(tiny_llama(), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (base / name).write_text("{}")
    for name in ("modeling_x.py", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "notes.txt"):
        (base / name).write_text("x")
    trained_adapter("llama", base, tmp_path / "adapter")
    merged(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def head_adapter(folder: Path, model: nn.Module, modules: list[str]) -> nn.Module:
    """A PEFT adapter that stores `modules` in full, changed."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=modules))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("modules", [["lm_head"], ["wte", "lm_head"]])
def test_one_of_two_tied_weights_is_refused_or_untied(modules: list[str], tmp_path: Path) -> None:
    """A change of one of a tied pair is an error that names --untie; with it there are two tensors, and the logits."""
    save(tiny_gpt2(), tmp_path / "base")
    theirs = head_adapter(tmp_path / "adapter", tiny_gpt2(), modules)
    with pytest.raises(trimtab.CheckpointError, match=r"tied weights .*wte.* = lm_head.* --untie"):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()
    report = merged(tmp_path, untie=True)
    assert report.untied == ["transformer.wte.weight", "lm_head.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    ours = type(tiny_gpt2()).from_pretrained(tmp_path / "out")
    assert ours.lm_head.weight is not ours.transformer.wte.weight
    assert torch.allclose(logits(ours, token_ids()), logits(theirs, token_ids()), atol=1e-5)


@pytest.mark.parametrize("torn", ["lm_head", "encoder.embed_tokens"])
def test_a_tie_that_no_config_ends_is_never_torn(torn: str, tmp_path: Path) -> None:
    """T5's head can be untied; the embedding that encoder and decoder share cannot."""
    save(MODELS["t5"](), tmp_path / "base")
    model = peft.get_peft_model(MODELS["t5"](), peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=[torn]))
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{torn}.modules_to_save.default").weight.add_(0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.pop("scale_decoder_outputs")  # an older file, where the tie says whether outputs are scaled
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    if torn != "lm_head":
        with pytest.raises(trimtab.CheckpointError, match="and this model always ties them"):
            merged(tmp_path, untie=True)
        return
    assert merged(tmp_path, untie=True).untied[-1] == "lm_head.weight"
    ours = type(MODELS["t5"]()).from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(ours, token_ids()), logits(model.get_base_model(), token_ids()), atol=1e-5)


def test_untie_changes_nothing_where_nothing_is_torn(tmp_path: Path) -> None:
    """--untie on a tied base whose pair the adapter leaves alone keeps it tied."""
    save(tiny_gpt2(), tmp_path / "base")
    trained_adapter("gpt2", tmp_path / "base", tmp_path / "adapter")
    assert merged(tmp_path, untie=True).untied == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")


def test_names_without_the_bodys_prefix(tmp_path: Path) -> None:
    """A checkpoint that calls transformer.h.0 h.0, as the first GPT-2 files do, is merged under its own names."""
    save(tiny_gpt2(), tmp_path / "base")
    trained_adapter("gpt2", tmp_path / "base", tmp_path / "adapter")
    merged(tmp_path)
    wanted = tensors_in(tmp_path / "out")
    file = tmp_path / "base" / "model.safetensors"
    short = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file({**short, "h.0.attn.masked_bias": torch.tensor(-1e4)}, file, metadata={"format": "pt"})
    (tmp_path / "out").rename(tmp_path / "first")
    merged(tmp_path)
    found = tensors_in(tmp_path / "out")
    assert float(found.pop("h.0.attn.masked_bias")) == -1e4
    assert found.keys() == short.keys()
    assert all(torch.equal(found[name.removeprefix("transformer.")], value) for name, value in wanted.items())


MEASURED = """
import sys
from pathlib import Path
import torch
from trimtab.export.merge import merge_checkpoint
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
merge_checkpoint(str(folder / "small"), folder / "small_adapter", folder / "small_out")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = resident("VmRSS")
merge_checkpoint(str(folder / "base"), folder / "adapter", folder / "out")
print(resident("VmHWM") - before)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """A model of 60 times its largest tensor is merged within twelve times that tensor."""
    config = trimtab.LoRA(rank=2, targets=("q_proj", "down_proj"))
    wide = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=15, num_key_value_heads=4)
    for name, model in (("small", tiny_llama()), ("base", wide)):
        save(model, tmp_path / name)
        trained_adapter("llama", tmp_path / name, tmp_path / f"{name}_adapter", config)
    (tmp_path / "base_adapter").rename(tmp_path / "adapter")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    largest = 512 * 2048 * 4
    assert size > 55 * largest
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(trimtab.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert 0 < int(done.stdout) < 12 * largest, int(done.stdout) / largest
