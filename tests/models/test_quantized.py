"""Loading into 4 bits shard by shard, and folders of quantised models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_gpt2, tiny_llama, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import trimtab
from trimtab.bench.meters import live_bytes
from trimtab.errors import CheckpointError, ConfigError, TargetError
from trimtab.nn.nf4layer import NF4Linear

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


def stored(tmp_path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> Path:
    folder = tmp_path / family
    MODELS[family]().to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("double", [None, False])
@pytest.mark.parametrize("shard", ["10GB", "12KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_quantised_is_quantising_what_was_loaded(
    family: str, shard: str, double: bool | None, tmp_path: Path
) -> None:
    """From one file or many, every tensor is what quantize() makes of the loaded model, and so is the output."""
    folder = stored(tmp_path, family, torch.bfloat16, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (shard == "12KB")
    model = trimtab.load_quantized(folder, "nf4", double=double)
    expected = type(MODELS[family]()).from_pretrained(folder, dtype=torch.bfloat16)
    names = trimtab.quantize(expected, double=double is None)
    assert [name for name, module in model.named_modules() if isinstance(module, NF4Linear)] == names
    assert same_state(model, expected) and type(model) is type(expected)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(logits(model, token_ids()), logits(expected, token_ids()))
    tied = {"gpt2": "transformer.wte", "t5": "shared"}.get(family)
    if tied and expected.get_submodule(tied).weight is expected.lm_head.weight:
        assert model.get_submodule(tied).weight is model.lm_head.weight


def test_the_full_model_is_never_in_memory(tmp_path: Path) -> None:
    """While loading, no more lives than the quantised model and a few times the largest tensor."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4}
    folder = tmp_path / "wide"
    tiny_llama(**sizes, num_key_value_heads=4).save_pretrained(folder, max_shard_size="2MB")
    kept: list[nn.Module] = []
    found = live_bytes(lambda: kept.append(trimtab.load_quantized(folder)))
    full = sum(p.numel() for p in tiny_llama(**sizes, num_key_value_heads=4).parameters()) * 4
    largest = 512 * 256 * 4
    held = sum(t.nbytes for t in kept[0].state_dict().values())
    assert full > 12 * largest
    assert found.above <= held + 6 * largest
    assert found.above < full / 3


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_quantised_model_comes_back_bit_for_bit(family: str, double: bool, tmp_path: Path) -> None:
    """save_quantized and load_quantized give the same codes, scales and other tensors; quantising again is refused."""
    folder = stored(tmp_path, family, torch.bfloat16)
    model = trimtab.load_quantized(folder, double=double)
    trimtab.save_quantized(model, tmp_path / "q")
    again = trimtab.load_quantized(tmp_path / "q")
    assert same_state(again, model)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
    adapter = trimtab.attach(again, trimtab.LoRA(rank=2))
    adapter.merge()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    large = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "q" / "quantized.safetensors").stat().st_size < large
    with pytest.raises(ConfigError, match=r"double has no effect.*quantised already"):
        trimtab.load_quantized(tmp_path / "q", double=False)


def test_settings_of_the_load_reach_the_layers(tmp_path: Path) -> None:
    """skip, dtype, compute_dtype and master do what quantize() says of them."""
    folder = stored(tmp_path)
    model = trimtab.load_quantized(
        folder, skip=["down_proj"], dtype=torch.bfloat16, compute_dtype=torch.float32, master="host"
    )
    layer = model.model.layers[0].self_attn.q_proj
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.lm_head.weight.dtype == model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert layer.holder.compute == layer.compute_dtype == torch.float32
    assert torch.equal(layer.holder.carry, tiny_llama().model.layers[0].self_attn.q_proj.weight)
    with pytest.raises(TargetError, match="closest"):
        trimtab.load_quantized(folder, skip=["down_porj"])
    with pytest.raises(ConfigError, match="kind = 'int3'"):
        trimtab.load_quantized(folder, "int3")


def test_settings_of_a_saved_model_come_back(tmp_path: Path) -> None:
    """compute_dtype and min_kept are stored; the load's own win, and older folders have the defaults."""
    model = tiny_llama()
    trimtab.quantize(model, compute_dtype=torch.bfloat16, min_kept=0.2)
    trimtab.save_quantized(model, tmp_path / "q")

    def found(**options: object) -> tuple[object, float]:
        holder = trimtab.load_quantized(tmp_path / "q", **options).model.layers[1].mlp.up_proj.holder  # type: ignore[arg-type]
        return holder.compute, holder.min_kept

    assert found() == (torch.bfloat16, 0.2)
    assert found(compute_dtype=torch.float64, min_kept=0.0) == (torch.float64, 0.0)
    again = trimtab.load_quantized(tmp_path / "q")
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
    tampered(tmp_path / "q", lambda said: [(d.pop("compute"), d.pop("min_kept")) for d in said["layers"].values()])
    assert found() == (None, 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": torch.int8}, "dtype = torch.int8 is no floating dtype"),
        ({"dtype": "bf16"}, "dtype = 'bf16' is no floating dtype"),
        ({"device": "nowhere"}, "device = 'nowhere' cannot be used"),
        ({"model_class": AutoModelForCausalLM}, "model_class = .*is no model class"),
    ],
)
def test_a_wrong_setting_of_the_load_is_one_clear_error(options: dict[str, object], says: str, tmp_path: Path) -> None:
    """The setting, its value and what is wrong with it, before a file is read; no master's file is left."""
    folder = stored(tmp_path)
    with pytest.raises(ConfigError, match=says) as info:
        trimtab.load_quantized(folder, master=tmp_path / "m", **options)  # type: ignore[arg-type]
    assert "\n" not in str(info.value) and not (tmp_path / "m").exists()


@pytest.mark.parametrize("named", ["AutoModel", "set_seed", "Trainer", "pipeline", "__name__"])
def test_only_model_classes_are_called(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else of transformers a config names is not called."""
    called: list[object] = []
    if named == "set_seed":
        monkeypatch.setattr("transformers.set_seed", called.append)
    folder = stored(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [named]}))
    with pytest.raises(ConfigError, match=rf"architectures = \['{named}'\] in config.json is no model class"):
        trimtab.load_quantized(folder)
    assert not called


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(value: float, double: bool, tmp_path: Path) -> None:
    """A damaged scale is a CheckpointError that names the layer; no master's file is left behind."""
    model = tiny_llama()
    trimtab.quantize(model, double=double)
    layer = model.model.layers[1].mlp.up_proj
    for name in layer.scale_names[-2:]:
        before = getattr(layer, name).clone()
        if before.is_floating_point():
            getattr(layer, name).view(-1)[-1] = value
            trimtab.save_quantized(model, tmp_path / name)
            with pytest.raises(CheckpointError, match=r"scales of model.layers.1.mlp.up_proj are not finite"):
                trimtab.load_quantized(tmp_path / name, master=tmp_path / "m")
            getattr(layer, name).copy_(before)
    assert len(list(tmp_path.glob("absmax*"))) == 1 + double and not list(tmp_path.rglob("*.fp32"))


def test_a_quantised_folder_can_begin_a_master(tmp_path: Path) -> None:
    """Its master begins with what the codes decode to."""
    model = tiny_llama()
    trimtab.quantize(model)
    trimtab.save_quantized(model, tmp_path / "q")
    again = trimtab.load_quantized(tmp_path / "q", master=tmp_path / "masters")
    ours, theirs = model.model.layers[0].mlp.up_proj, again.model.layers[0].mlp.up_proj
    assert torch.equal(theirs.holder.carry, ours.holder.rows(ours.weight, slice(None)))


def test_a_bare_models_checkpoint_fits_a_model_with_a_head(tmp_path: Path) -> None:
    """GPT-2's public checkpoints lack the prefix of the model with a head (and store the tied head once)."""
    whole = tiny_gpt2()
    whole.transformer.save_pretrained(tmp_path / "bare")
    model = trimtab.load_quantized(tmp_path / "bare", model_class=type(whole))
    trimtab.quantize(whole)
    assert same_state(model, whole)


def test_other_loaders_say_that_they_cannot_read_it(tmp_path: Path) -> None:
    """transformers and a plain training run refuse the folder of a quantised model, instead of reading nonsense."""
    from trimtab.models.load import read_config

    model = tiny_llama()
    trimtab.quantize(model)
    trimtab.save_quantized(model, tmp_path / "q")
    with pytest.raises(ConfigError, match="holds quantised weights"):
        read_config(str(tmp_path / "q"))
    with pytest.raises(Exception, match=r"no file named .*safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))


def more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def escaping_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model.safetensors cannot be read"),
        (only_pickles, "pickled weights are not read"),
        (other_shape, r"gate_proj.weight is \[48, 32\], and the config makes it \[56, 32\]"),
        (more_layers, "does not store model.layers.2"),
        (escaping_index, "outside its folder"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(damage: object, says: str, tmp_path: Path) -> None:
    """Torn, foreign and escaping files are CheckpointErrors of one line."""
    folder = stored(tmp_path)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=says) as info:
        trimtab.load_quantized(folder)
    assert "\n" not in str(info.value)


def tampered(folder: Path, edit: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config["quantization_config"])  # type: ignore[operator]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda said: said.update(format=2), "format that this version does not know"),
        (lambda said: said["layers"].update({"model.no_such": {}}), "model.no_such, which the model does not have"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].pop("dtype"), "does not say how"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].update(dtype="save"), "does not say how"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].update(compute="int8"), "does not say how"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].update(min_kept="all"), "does not say how"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].update(min_kept=None), "does not say how"),
        (lambda said: said["layers"]["model.layers.0.mlp.up_proj"].update(double=False), "does not store .*absmax"),
        (
            lambda said: said["layers"].pop("model.layers.0.mlp.up_proj"),
            "up_proj.weight is torch.int8, which is no plain weight",
        ),
    ],
)
def test_a_tampered_quantised_folder_is_one_clear_error(edit: object, says: str, tmp_path: Path) -> None:
    """What the config says of a layer must be what the file holds."""
    model = tiny_llama()
    trimtab.quantize(model)
    trimtab.save_quantized(model, tmp_path / "q")
    tampered(tmp_path / "q", edit)
    with pytest.raises(CheckpointError, match=says):
        trimtab.load_quantized(tmp_path / "q")


def test_only_quantised_models_without_adapter_are_saved_so(tmp_path: Path) -> None:
    """A plain model, or one with an adapter, is an error that says what to do."""
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"call trimtab.quantize\(model\) first"):
        trimtab.save_quantized(model, tmp_path / "a")
    trimtab.quantize(model)
    trimtab.attach(model, trimtab.LoRA(rank=2))
    with pytest.raises(ConfigError, match="has an adapter"):
        trimtab.save_quantized(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_building_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """After a load, failed or not, modules register their parameters as ever."""
    before = nn.Module.register_parameter
    folder = stored(tmp_path)
    model: PreTrainedModel = trimtab.load_quantized(folder, model_class=LlamaForCausalLM)
    assert not model.training
    with pytest.raises(ConfigError, match="cannot be built"):
        trimtab.load_quantized(folder, model_class=dict)
    assert nn.Module.register_parameter is before and nn.Linear(2, 2).weight.device.type == "cpu"


def test_how_it_writes_comes_along(tmp_path: Path) -> None:
    """A checkpoint's settings of generation, from the plain folder and from the quantised one."""
    model = tiny_llama()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "plain")
    loaded = trimtab.load_quantized(tmp_path / "plain")
    assert loaded.generation_config.max_new_tokens == 7
    trimtab.save_quantized(loaded, tmp_path / "packed")
    assert trimtab.load_quantized(tmp_path / "packed").generation_config.max_new_tokens == 7
    (tmp_path / "plain" / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        trimtab.load_quantized(tmp_path / "plain")
