from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from trimtab import ConfigError
from trimtab.config import ModelConfig
from trimtab.models.load import build_model, shadow_model

LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def build(name: object, vocab_size: int = 64, seq_len: int = 16, seed: int = 0) -> torch.nn.Module:
    return build_model(ModelConfig(name=str(name)), vocab_size=vocab_size, seq_len=seq_len, seed=seed)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LLAMA).save_pretrained(folder)
    return folder


def test_a_presets_weights_depend_on_the_seed_alone() -> None:
    """Neither the global random state nor the number of threads changes a preset's weights; the seed does."""
    first = weights(build("llama-9m"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(123)
        before = torch.get_rng_state()
        second = weights(build("llama-9m"))
        assert torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    assert equal(first, second)
    assert not equal(first, weights(build("llama-9m", seed=1)))


def test_a_presets_weights_are_drawn_as_the_paper_draws_them() -> None:
    """Matrices have mean 0 and std 0.02 and differ from each other; norms are 1; everything is fp32."""
    model = build("llama-9m", vocab_size=1000)
    drawn = weights(model)
    assert {tensor.dtype for tensor in drawn.values()} == {torch.float32}
    for name, tensor in drawn.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert abs(float(tensor.std()) - 0.02) < 1e-3, name
            assert abs(float(tensor.mean())) < 1e-3, name
    q, k = (drawn[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    assert not torch.equal(q, k)
    assert torch.isfinite(model(input_ids=torch.arange(8).unsqueeze(0)).logits).all()


def test_a_folder_is_loaded_in_fp32(llama: Path, tmp_path: Path) -> None:
    """What save_pretrained wrote comes back, a bf16 checkpoint widened to fp32."""
    model = LlamaForCausalLM.from_pretrained(llama)
    assert equal(weights(model), weights(build(llama)))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = weights(build(tmp_path))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    assert equal(loaded, {name: tensor.float() for name, tensor in weights(model).items()})


def test_gradient_checkpointing_is_switched_on() -> None:
    """The setting reaches the model."""
    config = ModelConfig(name="llama-9m", gradient_checkpointing=True)
    on, off = build_model(config, vocab_size=64, seq_len=16), build("llama-9m")
    ids = torch.arange(8).unsqueeze(0)

    def saved(model: torch.nn.Module) -> int:
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(input_ids=ids, use_cache=False)
        return count

    assert saved(on) < saved(off) / 4


def test_a_shadow_has_the_shapes_of_the_model(llama: Path) -> None:
    """The model on the meta device counts like the loaded one, tied or not."""
    for name in (str(llama), "llama-9m"):
        shadow = shadow_model(ModelConfig(name=name), vocab_size=64, seq_len=16)
        shapes = {name: parameter.shape for name, parameter in shadow.named_parameters()}
        assert shapes == {name: tensor.shape for name, tensor in weights(build(name)).items()}
        assert {parameter.device.type for parameter in shadow.parameters()} == {"meta"}


def test_a_vocabulary_that_is_too_small_is_refused(llama: Path) -> None:
    """A tokenizer with more words than the model has rows is an error of one line, in the shadow, too."""
    with pytest.raises(ConfigError, match="vocabulary of 64 and the tokenizer one of 65"):
        build(llama, vocab_size=65)
    with pytest.raises(ConfigError, match="vocabulary of 64"):
        shadow_model(ModelConfig(name=str(llama)), vocab_size=65, seq_len=16)


def test_a_sequence_beyond_the_positions_is_refused(llama: Path) -> None:
    """seq_len may not exceed what the model's positions reach."""
    with pytest.raises(ConfigError, match=r"data\.seq_len: 65 is longer than the 64 positions"):
        build(llama, seq_len=65)


@pytest.mark.parametrize("name", ["llama-9mm", "llamma-60m", "lama-7b", "x y"])
def test_a_name_that_is_almost_a_preset_is_not_asked_of_a_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt preset is an error at once."""

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("trimtab.models.load.AutoConfig.from_pretrained", fail)
    with pytest.raises(ConfigError, match="no preset is called"):
        build(name)


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Offline, a name that is no preset and no folder gives one line, and nothing else is printed."""
    config = ModelConfig(name="nobody/nothing")
    with pytest.raises(ConfigError, match="is no folder here, and the hub cannot be reached"):
        shadow_model(config, vocab_size=8, seq_len=4, offline=True)
    assert capsys.readouterr() == ("", "")


def test_what_is_no_folder_and_no_name_is_told(tmp_path: Path) -> None:
    """A missing folder, an empty one, and a file."""
    with pytest.raises(ConfigError, match="there is no folder"):
        build(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        build(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        build(tmp_path / "model.safetensors")


def damaged(llama: Path, folder: Path, kind: str) -> Path:
    """A copy of the folder with one thing wrong."""
    shutil.copytree(llama, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    match kind:
        case "torn":
            file.write_bytes(file.read_bytes()[:-100])
        case "no weights":
            file.unlink()
        case "pickled":
            file.unlink()
            torch.save({}, folder / "pytorch_model.bin")
        case "no json":
            config.write_text("{")
        case "other shapes":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 96}))
        case "unknown kind":
            config.write_text('{"model_type": "zebra"}')
        case "its own code":
            config.write_text('{"model_type": "zebra", "auto_map": {"AutoConfig": "zebra.Config"}}')
        case "quantised":
            quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
            config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantised}))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torn", "cannot be read"),
        ("no weights", "holds no weights"),
        ("pickled", "only pickled weights, which are not read"),
        ("no json", "cannot be read"),
        ("other shapes", "do not have the shapes"),
        ("unknown kind", "cannot be read"),
        ("its own code", "cannot be read"),
        ("quantised", "quantised weights"),
    ],
)
def test_a_damaged_folder_is_told_in_a_line(
    llama: Path, tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with a folder is one line, and the libraries below print nothing."""
    with pytest.raises(ConfigError, match=message) as error:
        build(damaged(llama, tmp_path / "copy", kind))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model.name: ")
    assert str(error.value).count("model.name: ") == 1
    assert capsys.readouterr() == ("", "")


def test_what_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    """An encoder-decoder, an encoder that sees later words, and a model without its head."""
    T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="is a t5, which has no causal language model"):
        build(tmp_path / "t5")
    BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="sees later words"):
        build(tmp_path / "bert")
    LlamaModel(LLAMA).save_pretrained(tmp_path / "headless")
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's tensors, lm_head\.weight"):
        build(tmp_path / "headless")


def test_gpt2_is_a_causal_language_model(tmp_path: Path) -> None:
    """A model of another family, with a tied head and learned positions, loads."""
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    assert build(tmp_path)(input_ids=torch.arange(8).unsqueeze(0)).logits.shape == (1, 8, 64)
    with pytest.raises(ConfigError, match="32 positions"):
        build(tmp_path, seq_len=33)
