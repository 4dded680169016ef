"""VeRA's folders: their size, what guards them, and the exchange with PEFT on logits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, logits, tiny_llama, token_ids, train
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import trimtab

PAIRS = ("per_width", "peft")
FAMILIES = ("llama", "gpt2", "bert", "t5")


def trained(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, trimtab.Adapter]:
    model = MODELS[family]().to(dtype)
    adapter = trimtab.attach(model, trimtab.VeRA(**({"rank": 8, "seed": 3} | settings)))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=0.1)), range(1, 4))
    return model, adapter


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Change a folder's config, tensors and our metadata."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    settings, tensors, extra = json.loads(config.read_text()), load_file(file), json.loads(header["trimtab"])
    change(settings, tensors, extra)
    config.write_text(json.dumps(settings))
    save_file(tensors, file, metadata={**header, "trimtab": json.dumps(extra)})


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_the_same_after_save_and_load(family: str, pair: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits of a fresh base with the loaded adapter are bit-equal; the file holds no matrix."""
    model, adapter = trained(family, dtype, pair=pair)
    adapter.save(tmp_path)
    assert {t.dim() for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {1}
    fresh = MODELS[family]().to(dtype)
    before = logits(fresh, token_ids())
    loaded = trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))
    assert not torch.equal(before, logits(fresh, token_ids()))
    assert isinstance(loaded.config, trimtab.VeRA) and loaded.config.pair == pair and loaded.config.seed == 3


@pytest.mark.parametrize("pair", PAIRS)
def test_the_size_of_the_file(pair: str, tmp_path: Path) -> None:
    """q and v of 12 layers, d = 768, r = 256: 24,576 fp32 numbers, and the whole folder at most 10 KB more."""
    config = RobertaConfig(vocab_size=50, max_position_embeddings=20, intermediate_size=8)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    adapter = trimtab.attach(model, trimtab.VeRA(targets=("query", "value"), pair=pair))  # type: ignore[arg-type]
    adapter.save(tmp_path)
    numbers = load_file(tmp_path / "adapter_model.safetensors").values()
    assert sum(t.numel() for t in numbers) == 24_576 and {t.dtype for t in numbers} == {torch.float32}
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 4 * 24_576 < size <= 4 * 24_576 + 10_000


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_our_folder(family: str, tmp_path: Path) -> None:
    """peft.PeftModel draws the same pair from the key and gives our logits, with layers of several shapes."""
    peft = pytest.importorskip("peft")
    model, adapter = trained(family, pair="peft")
    adapter.save(tmp_path, layout="peft")  # type: ignore[call-arg]
    theirs = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path)).get_base_model()
    assert torch.allclose(logits(theirs, token_ids()), logits(model, token_ids()), atol=1e-5)
    assert not torch.allclose(logits(MODELS[family](), token_ids()), logits(model, token_ids()), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("save_projection", [False, True])
def test_we_read_a_peft_folder(family: str, save_projection: bool, tmp_path: Path) -> None:
    """A VeRA that peft made, with its pair in the file or without, gives the same logits here, and goes back."""
    peft = pytest.importorskip("peft")
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc"], "bert": ["query", "dense"], "t5": ["q", "wo"]}[family]
    config = peft.VeraConfig(
        r=6, target_modules=targets, projection_prng_key=11, save_projection=save_projection, vera_dropout=0.1
    )
    theirs = peft.get_peft_model(MODELS[family](), config)
    scramble(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = MODELS[family]()
    adapter = trimtab.load_adapter(ours, tmp_path / "theirs")
    expected = logits(theirs.get_base_model(), token_ids())
    assert torch.allclose(logits(ours, token_ids()), expected, atol=1e-5)
    assert not torch.allclose(logits(MODELS[family](), token_ids()), expected, atol=1e-2)
    assert adapter.config.dropout == 0.1  # type: ignore[attr-defined]
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(MODELS[family](), str(tmp_path / "ours")).get_base_model()
    assert torch.allclose(logits(again, token_ids()), expected, atol=1e-5)


def scramble(model: nn.Module) -> None:
    """Values that an adapter may have after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_a_pair_that_no_seed_gives_is_kept(tmp_path: Path) -> None:
    """A PEFT file whose matrices were drawn elsewhere: its own are used, saved again, and read by both."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_llama(), peft.VeraConfig(r=6, target_modules="all-linear"))
    scramble(theirs)
    with torch.no_grad():
        theirs.base_model.vera_A["default"].mul_(-0.5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = logits(theirs.get_base_model(), token_ids())
    ours = tiny_llama()
    trimtab.load_adapter(ours, tmp_path / "theirs").save(tmp_path / "ours")
    assert torch.allclose(logits(ours, token_ids()), expected, atol=1e-5)
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh, token_ids()), logits(ours, token_ids()))
    assert torch.equal(logits(fresh.double(), token_ids()).float(), logits(ours.double(), token_ids()).float())
    again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "ours")).get_base_model()
    assert torch.allclose(logits(again, token_ids()), expected, atol=1e-5)


def test_peft_cannot_take_the_other_pair_for_its_own(tmp_path: Path) -> None:
    """layout="peft" names the way out; without it the folder carries a type that PEFT refuses by name."""
    peft = pytest.importorskip("peft")
    _, adapter = trained("llama")
    with pytest.raises(trimtab.CannotSave, match=r"VeRA\(pair='peft'\)"):
        adapter.save(tmp_path, layout="peft")  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())
    with pytest.raises(trimtab.ConfigError, match="layout='PEFT'"):
        adapter.save(tmp_path, layout="PEFT")  # type: ignore[call-arg]
    adapter.save(tmp_path)
    with pytest.raises(KeyError, match="TRIMTAB_VERA_PER_WIDTH"):
        peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


@pytest.mark.parametrize("pair", PAIRS)
def test_what_trains_beside_it_is_in_the_folder(pair: str, tmp_path: Path) -> None:
    """Norms and head trained in full come back with the vectors, in PEFT's layout in peft as well."""
    model, adapter = trained("llama", pair=pair, train_also=("norms", "head"))
    adapter.save(tmp_path)
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, token_ids()), logits(model, token_ids()))
    if pair == "peft":
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).get_base_model()
        assert torch.allclose(logits(theirs, token_ids()), logits(model, token_ids()), atol=1e-5)


def changes() -> dict[str, tuple[Callable[..., Any], str]]:
    """What may be wrong with a folder, and what is then said."""
    first = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_"
    return {
        "another seed": (lambda c, t, e: c.update(projection_prng_key=4), "random matrix A32 that seed 4 gives"),
        "another checksum": (lambda c, t, e: e["pair"].update(B48="0" * 64), "random matrix B48"),
        "a checksum gone": (lambda c, t, e: e["pair"].pop("B48"), "of another base"),
        "no checksums": (lambda c, t, e: e.update(pair="none"), "widths 'none'"),
        "another rank": (lambda c, t, e: c.update(r=4), "random matrix"),
        "another rank of a vector": (lambda c, t, e: t.update({first + "d": torch.zeros(4)}), r"is \(4,\) in the file"),
        "a vector gone": (lambda c, t, e: t.pop(first + "b"), "lacks model.layers.0.self_attn.q_proj.vera_lambda_b"),
        "a strange tensor": (lambda c, t, e: t.update(strange=torch.zeros(1)), "the model lacks, strange"),
        "a lone matrix": (lambda c, t, e: t.update({"base_model.vera_A": torch.zeros(8, 48)}), "not whole"),
        "promised matrices": (lambda c, t, e: c.update(save_projection=True), "lacks vera_A and vera_B"),
        "a new field": (lambda c, t, e: c.update(vera_magic=1), "vera_magic = 1"),
        "layers by index": (lambda c, t, e: c.update(layers_to_transform=["a"]), "layers_to_transform"),
        "biases": (lambda c, t, e: c.update(bias="all"), "bias = 'all'"),
        "no targets": (lambda c, t, e: c.update(target_modules=None), "target_modules"),
        "a rank of nothing": (lambda c, t, e: c.update(r=0), "rank = 0"),
        "no rank": (lambda c, t, e: c.pop("r"), "lacks r"),
        "a pattern to exclude": (lambda c, t, e: c.update(exclude_modules=".*q"), "exclude_modules"),
    }


@pytest.mark.parametrize("what", changes())
@pytest.mark.parametrize("pair", PAIRS)
def test_wrong_folders_are_refused_and_leave_the_model_free(what: str, pair: str, tmp_path: Path) -> None:
    """Each fault is a CheckpointError that names it; the model is the base still and free for an adapter."""
    change, message = changes()[what]
    _, adapter = trained("llama", pair=pair)
    adapter.save(tmp_path)
    if pair == "peft":
        message = message.replace("A32", "A48")
    rewrite(tmp_path, change)
    model = tiny_llama()
    before = logits(model, token_ids())
    with pytest.raises(trimtab.CheckpointError, match=message) as said:
        trimtab.load_adapter(model, tmp_path)
    assert "\n" not in str(said.value)
    assert torch.equal(logits(model, token_ids()), before)
    trimtab.attach(model, trimtab.VeRA(rank=2)).detach()


@pytest.mark.parametrize("pair", PAIRS)
def test_another_base_is_refused(pair: str, tmp_path: Path) -> None:
    """Other weights, other widths, other depth: refused, also where the file has no sample of the base."""
    _, adapter = trained("llama", pair=pair)
    adapter.save(tmp_path)
    with pytest.raises(trimtab.CheckpointError, match="of another base"):
        trimtab.load_adapter(tiny_llama(seed=1), tmp_path)
    rewrite(tmp_path, lambda config, tensors, extra: extra.pop("base_sample"))
    for other in ({"hidden_size": 48}, {"intermediate_size": 64}):
        with pytest.raises(trimtab.CheckpointError, match="of another base"):
            trimtab.load_adapter(tiny_llama(**other), tmp_path)
    with pytest.raises(trimtab.TrimtabError, match=r"layers\.1"):
        trimtab.load_adapter(tiny_llama(num_hidden_layers=1), tmp_path)
    rewrite(tmp_path, lambda config, tensors, extra: extra.pop("pair"))
    with pytest.raises(trimtab.CheckpointError, match="of another base"):
        trimtab.load_adapter(tiny_llama(intermediate_size=64), tmp_path)


def test_two_adapters_on_one_base(tmp_path: Path) -> None:
    """Two VeRAs with seeds of their own are switched without touching the base or each other's pair."""
    one, first = trained("llama", seed=1)
    two, second = trained("llama", seed=2, rank=4, pair="peft")
    first.save(tmp_path / "one")
    second.save(tmp_path / "two")
    model = tiny_llama()
    before = logits(model, token_ids())
    trimtab.load_adapter(model, tmp_path / "one", name="one")
    trimtab.load_adapter(model, tmp_path / "two", name="two")
    assert torch.equal(logits(model, token_ids()), logits(two, token_ids()))
    rewrite(tmp_path / "one", lambda config, tensors, extra: config.update(projection_prng_key=7))
    with pytest.raises(trimtab.CheckpointError, match="seed 7"):
        trimtab.load_adapter(model, tmp_path / "one", name="three")
    for name, expected in (("two", two), ("one", one), ("two", two)):
        trimtab.activate(model, name)
        assert torch.equal(logits(model, token_ids()), logits(expected, token_ids()))
    trimtab.activate(model, None)
    assert torch.equal(logits(model, token_ids()), before)
