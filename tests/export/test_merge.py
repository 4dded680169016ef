"""`trimtab merge`: file to file, the same result as in memory, within the memory of a few tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from checkpoints import everything, move, save
from models_for_tests import MODELS, VOCAB, logits, tiny_gpt2, tiny_llama, token_ids, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import trimtab
from trimtab.export.merge import Merged, merge_checkpoint

FAMILIES = ["llama", "gpt2", "bert", "t5"]


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def trained_adapter(family: str, base: Path, out: Path, config: trimtab.Method | None = None) -> None:
    """Train an adapter for three steps on the checkpoint at `base` and save it."""
    model = type(MODELS[family]()).from_pretrained(base, dtype="auto")
    adapter = trimtab.attach(model, config or trimtab.LoRA(rank=4))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    adapter.save(out)


def in_memory(family: str, base: Path, adapter: Path, out: Path) -> nn.Module:
    """The same merge through the library."""
    model = type(MODELS[family]()).from_pretrained(base, dtype="auto")
    trimtab.load_adapter(model, adapter).merge()
    model.save_pretrained(out)
    return model


def merged(folder: Path, **how: object) -> Merged:
    return merge_checkpoint(str(folder / "base"), folder / "adapter", folder / "out", **how)  # type: ignore[arg-type]


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


# -- wrong inputs ---------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def tampered_header(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[20:40] = b"\xff" * 20
    file.write_bytes(raw)


def long_header(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def shard(folder: Path) -> dict[str, str]:
    save(tiny_llama(), folder / "base", max_shard_size="20KB")
    (folder / "base" / "model.safetensors").unlink(missing_ok=True)
    return json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]


def remap(folder: Path, where: str) -> None:
    weight_map = shard(folder)
    weight_map["lm_head.weight"] = where
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def out_of_folder(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(VOCAB, 32)}, folder / "secret.safetensors")
    remap(folder, "../secret.safetensors")


def absolute(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(VOCAB, 32)}, folder / "secret.safetensors")
    remap(folder, str(folder / "secret.safetensors"))


def link_out(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "base" / "model.safetensors").symlink_to("../elsewhere.safetensors")


def linked_tokenizer(folder: Path) -> None:
    (folder / "secret.json").write_text("{}")
    (folder / "base" / "tokenizer.json").symlink_to(folder / "secret.json")


def missing_shard(folder: Path) -> None:
    shard(folder)
    next((folder / "base").glob("model-00002*")).unlink()


def wrong_map(folder: Path) -> None:
    remap(folder, "model-00001-of-00009.safetensors")
    weight_map = json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    first = sorted(set(weight_map.values()) - {"model-00001-of-00009.safetensors"})[0]
    remap(folder, first)


def broken_index(folder: Path) -> None:
    shard(folder)
    (folder / "base" / "model.safetensors.index.json").write_text("[1, 2")


def only_pickles(folder: Path) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / "pytorch_model.bin")


def pickle_shard(folder: Path) -> None:
    (folder / "base" / "x.bin").touch()
    remap(folder, "x.bin")


def other_shapes(folder: Path) -> None:
    save(tiny_llama(hidden_size=48), folder / "base")


def config_lies(folder: Path) -> None:
    change(folder / "base" / "config.json", intermediate_size=64)


def lacks_a_tensor(folder: Path) -> None:
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def another_base(folder: Path) -> None:
    save(tiny_llama(seed=9), folder / "base")


def own_code(folder: Path) -> None:
    change(folder / "base" / "config.json", model_type="mine", architectures=["Mine"], auto_map={"AutoModel": "m.M"})


def unknown_class(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures=["MyLlama"])


def not_a_model_class(folder: Path) -> None:
    change(folder / "base" / "config.json", architectures=["pipeline"])


def quantised(folder: Path) -> None:
    change(folder / "base" / "config.json", quantization_config={"quant_method": "gptq"})


def no_config(folder: Path) -> None:
    (folder / "base" / "config.json").unlink()


def no_base(folder: Path) -> None:
    (folder / "base").rename(folder / "gone")


def truncated_adapter(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def no_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_config.json").unlink()


def newer_peft(folder: Path) -> None:
    change(folder / "adapter" / "adapter_config.json", peft_type="TOMORROW")


def out_in_use(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").touch()


def out_is_a_file(folder: Path) -> None:
    (folder / "out").touch()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WRONG = [
    (truncated, "model.safetensors is damaged"), (tampered_header, "model.safetensors is damaged"),
    (long_header, "model.safetensors is damaged"), (out_of_folder, "leads out of the folder"),
    (absolute, "leads out of the folder"), (link_out, "leads out of the folder"),
    (linked_tokenizer, "leads out of the folder"), (missing_shard, "lacks model-00002"),
    (wrong_map, "does not fit the files beside it"), (broken_index, "index.json cannot be read"),
    (only_pickles, "only pickled weights"), (pickle_shard, "only .safetensors files are read"),
    (other_shapes, "of another base"), (config_lies, "by config.json"), (lacks_a_tensor, "model.norm.weight first"),
    (another_base, "of another base"), (own_code, "its config.json gives no model"),
    (unknown_class, "has no model class 'MyLlama'"), (not_a_model_class, "has no model class 'pipeline'"),
    (quantised, "holds quantised weights"), (no_config, "config.json is missing"), (no_base, "there is no folder"),
    (truncated_adapter, "adapter_model.safetensors is damaged"), (no_adapter, "adapter_config.json is missing"),
    (newer_peft, "TOMORROW"), (out_in_use, "exists and is not empty"), (out_is_a_file, "exists and is no folder"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_wrong_inputs_are_one_line_and_leave_nothing(spoil: object, message: str, tmp_path: Path) -> None:
    """Each is one of our errors in one line that says what is wrong, and no file is left or changed."""
    save(tiny_llama(), tmp_path / "base")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    spoil(tmp_path)  # type: ignore[operator]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(trimtab.TrimtabError, match=message) as said:
        merged(tmp_path)
    assert "\n" not in str(said.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_hub_name_without_a_network_says_so(tmp_path: Path) -> None:
    """Offline, a name that is no folder is one line; a name that can be none is said to be no folder."""
    for name, message in [("someone/no-such-model", "the hub cannot be reached"), ("./none", "there is no folder")]:
        with pytest.raises(trimtab.ConfigError, match=message) as said:
            merge_checkpoint(name, tmp_path / "adapter", tmp_path / "out")
        assert "\n" not in str(said.value)


def test_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """A snapshot folder is made of links to blobs beside it; these do not lead out."""
    save(tiny_llama(), tmp_path / "plain")
    trained_adapter("llama", tmp_path / "plain", tmp_path / "adapter")
    repo = tmp_path / "models--a--b"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    for path in (tmp_path / "plain").iterdir():
        path.rename(repo / "blobs" / f"x{path.name}")
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/x{path.name}")
    merge_checkpoint(str(repo / "snapshots" / "abc"), tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "config.json").is_symlink()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the base's own files is not put down to OUT."""
    import trimtab.export.merge as engine

    save(tiny_llama(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(engine.shutil, "copyfile", refuse)
    with pytest.raises(trimtab.CheckpointError, match=r"json: Permission denied; .*out was not written"):
        merged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing stops in the second of several files, neither OUT nor a torn folder is left."""
    import trimtab.export.merge as engine

    shard(tmp_path)
    trained_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    plain, calls = engine.stream_tensors, []

    def fail(*args: object) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise failure
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "stream_tensors", fail)
    before = sorted(tmp_path.rglob("*"))
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else trimtab.CheckpointError
    with pytest.raises(expected):
        merged(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "torn").touch()
    merged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
