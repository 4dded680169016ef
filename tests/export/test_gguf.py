"""`export --gguf`: read back with the gguf package, loaded by transformers, applied by llama.cpp's rule."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from checkpoints import everything, move, save
from models_for_tests import VOCAB, logits, tiny_gpt2, tiny_llama, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import trimtab
from trimtab.data.tokenizer import train_bpe
from trimtab.export.gguflora import export_lora
from trimtab.export.ggufmodel import export_model

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
WORDS = 300
TEXTS = [f"The {n}th year was a good one for the union, it's said: {n * 7919}." for n in range(60)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of this library, with fewer words than the models have embeddings."""
    return train_bpe(iter(TEXTS), WORDS).hf


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": WORDS + 4}
    match kind:
        case "llama":
            return tiny_llama(vocab_size=WORDS + 4, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        case "llama, tied":
            return tiny_llama(vocab_size=WORDS + 4, tie_word_embeddings=True)
        case "llama, wide heads":
            return tiny_llama(vocab_size=WORDS + 4, head_dim=16)
        case "mistral":
            return MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**sizes))
    raise AssertionError(kind)


def written(kind: str, folder: Path, **how: object) -> PreTrainedModel:
    """A model with its tokenizer in `folder`, every parameter moved off its initial value."""
    model = model_of(kind)
    move(model, everything)
    save(model, folder, **how)
    tokenizer().save_pretrained(folder)
    return model


KINDS = ["llama", "llama, tied", "llama, wide heads", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model_back(kind: str, tmp_path: Path) -> None:
    """`from_pretrained(gguf_file=...)` gives the logits and the token ids of the checkpoint."""
    model = written(kind, tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.allclose(logits(back, token_ids()), logits(model, token_ids()), atol=1e-5)
    if kind.startswith("qwen"):  # there transformers reads Qwen's own tokenizer into any file
        return
    words = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in (*TEXTS[:5], "  two spaces\n\nand lines <|endoftext|>", "Ünïcödé 文字 🙂"):
        assert words(text)["input_ids"] == tokenizer()(text)["input_ids"]


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape([int(n) for n in tensor.shape[::-1]])
        for tensor in gguf.GGUFReader(path).tensors
    }


def field(path: Path, key: str) -> object:
    return gguf.GGUFReader(path).get_field(key).contents()


def neighbours(weight: torch.Tensor, heads: int) -> np.ndarray:
    """Row i and row i + d/2 of a head side by side, one row at a time: an oracle for the reordering."""
    size = weight.shape[0] // heads
    order = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return weight[order].numpy()


def test_the_file_holds_the_tensors_and_the_numbers(tmp_path: Path) -> None:
    """Every tensor stands under llama.cpp's name, q and k reordered, and the metadata is that of the config."""
    model = written("llama", tmp_path / "model")
    count = export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    found, weights = tensors_of(tmp_path / "model.gguf"), dict(model.state_dict())
    assert count == len(found) == len(weights)
    for ours, theirs in {
        "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
        "model.layers.1.self_attn.v_proj": "blk.1.attn_v", "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate", "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down", "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    }.items():  # fmt: skip
        assert np.array_equal(found[f"{theirs}.weight"], weights[f"{ours}.weight"].numpy())
    attention = "model.layers.0.self_attn"
    assert np.array_equal(found["blk.0.attn_q.weight"], neighbours(weights[f"{attention}.q_proj.weight"], 4))
    assert np.array_equal(found["blk.0.attn_k.weight"], neighbours(weights[f"{attention}.k_proj.weight"], 2))
    for key, value in {
        "general.architecture": "llama", "general.type": "model", "llama.block_count": 2, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 48, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 5e5,
        "llama.vocab_size": WORDS + 4, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": tokenizer().eos_token_id, "tokenizer.ggml.add_bos_token": False,
    }.items():  # fmt: skip
        assert field(tmp_path / "model.gguf", key) == value
    assert len(field(tmp_path / "model.gguf", "tokenizer.ggml.tokens")) == WORDS + 4


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 0), (torch.float16, 1), (torch.bfloat16, 32)])
def test_matrices_are_rounded_once_and_vectors_stay_wide(dtype: torch.dtype, number: int, tmp_path: Path) -> None:
    """Matrices are the checkpoint's in the wanted dtype, rounded to nearest; norms are fp32."""
    model = written("llama", tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype)
    found = tensors_of(tmp_path / "model.gguf")
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert np.array_equal(found["blk.0.ffn_up.weight"], weight.to(dtype).float().numpy())
    assert np.array_equal(
        found["blk.0.ffn_norm.weight"], model.model.layers[0].post_attention_layernorm.weight.detach()
    )
    assert field(tmp_path / "model.gguf", "general.file_type") == number


def test_a_sharded_bf16_checkpoint_keeps_its_dtype(tmp_path: Path) -> None:
    """Without --dtype matrices stay bf16, from as many files as there are."""
    model = written("llama", tmp_path / "model")
    save(model.to(torch.bfloat16), tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    found = tensors_of(tmp_path / "model.gguf")
    assert np.array_equal(found["output.weight"], model.lm_head.weight.detach().float().numpy())
    assert field(tmp_path / "model.gguf", "general.file_type") == 32


def test_llama_3s_frequencies_are_written(tmp_path: Path) -> None:
    """Dividing the plain frequencies by rope_freqs gives those of transformers."""
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = tiny_llama(vocab_size=WORDS, head_dim=32, rope_parameters=rope)
    save(model, tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    factors = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    plain = 1e4 ** (-np.arange(0, 32, 2) / 32)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert len(set(factors.tolist())) > 3


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """BPE with byte fallback becomes llama.cpp's own kind: scores, bytes, and the same ids when read back."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    tree = json.loads(bpe.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]
    bpe = Tokenizer.from_str(json.dumps(tree))
    bpe.add_tokens([AddedToken("<tool>", normalized=False)])
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    save(tiny_llama(vocab_size=len(hf)), tmp_path / "model")
    hf.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    assert field(tmp_path / "model.gguf", "tokenizer.ggml.model") == "llama"
    kinds = field(tmp_path / "model.gguf", "tokenizer.ggml.token_type")
    assert [kinds[0], kinds[1], kinds[3], kinds[258], kinds[259], kinds[-1]] == [2, 3, 6, 6, 1, 4]
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf", add_bos_token=False)
    for text in (*TEXTS[:9], "a <tool> b", "Ünïcödé 文字 🙂"):
        assert back(text, add_special_tokens=False)["input_ids"] == hf(text, add_special_tokens=False)["input_ids"]


def lora_folder(kind: str, folder: Path, **settings: object) -> PreTrainedModel:
    """A PEFT adapter of a model with random A and B in `folder`; returns the merged model."""
    torch.manual_seed(3)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **{"r": 4, "lora_alpha": 6, **settings})
    model = peft.get_peft_model(model_of(kind), config)
    model.save_pretrained(str(folder))
    return model.merge_and_unload()


LORAS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}},
    "alphas": {"alpha_pattern": {"k_proj": 11}, "rank_pattern": {"k_proj": 3}},
    "all": {"use_rslora": True, "alpha_pattern": {"q_proj": 5}, "rank_pattern": {"q_proj": 8}},
}


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS.keys())
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_llama_cpps_rule_gives_the_merged_model(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    """W + (alpha / r) B A on the base's file is the file of the model that PEFT merged."""
    save(model_of(kind), tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    merged = lora_folder(kind, tmp_path / "lora", **settings)
    save(merged, tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    for name in ("base", "merged"):
        export_model(str(tmp_path / name), tmp_path / f"{name}.gguf")
    assert export_lora(tmp_path / "lora", tmp_path / "lora.gguf", str(tmp_path / "base")) == 12
    base, wanted = tensors_of(tmp_path / "base.gguf"), tensors_of(tmp_path / "merged.gguf")
    lora = tensors_of(tmp_path / "lora.gguf")
    alpha = field(tmp_path / "lora.gguf", "adapter.lora.alpha")
    assert field(tmp_path / "lora.gguf", "general.type") == "adapter"
    assert field(tmp_path / "lora.gguf", "adapter.type") == "lora"
    assert field(tmp_path / "lora.gguf", "general.architecture") == kind
    assert len(lora) == 24
    changed = 0
    for name, weight in base.items():
        if f"{name}.lora_a" in lora:
            a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
            assert not np.allclose(weight, wanted[name], atol=1e-3)
            weight = weight + alpha / b.shape[1] * (b @ a)
            changed += 1
        assert np.allclose(weight, wanted[name], atol=2e-5), name
    assert changed == 12


def test_our_own_adapter_is_as_good_as_pefts(tmp_path: Path) -> None:
    """A folder of `adapter.save` is written too, and the base is found by the name in it."""
    save(model_of("llama"), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = trimtab.attach(model, trimtab.LoRA(rank=3, targets=("q_proj",)))
    adapter.save(tmp_path / "lora")
    assert export_lora(tmp_path / "lora", tmp_path / "lora.gguf", dtype=torch.float16) == 2
    assert set(tensors_of(tmp_path / "lora.gguf")) == {
        f"blk.{n}.attn_q.weight.lora_{part}" for n in range(2) for part in "ab"
    }


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_LORAS = {
    "not finished": ({"r": None}, "r = None in its config"),
    "another method": ({"peft_type": "VERA"}, "of the kind 'VERA'; llama.cpp knows LoRA alone"),
    "dora": ({"use_dora": True}, "use_dora = True is nothing that llama.cpp's adapters have"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "a newer peft": ({"use_tomorrow": {"x": 1}}, "use_tomorrow"),
    "no base": ({"base_model_name_or_path": None}, "name it with --base"),
    "missing base": ({"base_model_name_or_path": "./none"}, r"there is no folder \./none"),
    "alpha as a word": ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
    "a pattern as a list": ({"alpha_pattern": [1]}, "alpha_pattern"),
}


@pytest.mark.parametrize(("values", "message"), BAD_LORAS.values(), ids=BAD_LORAS.keys())
def test_an_adapter_that_llama_cpp_would_not_compute_is_refused(
    values: dict[str, object], message: str, tmp_path: Path
) -> None:
    """What a GGUF adapter cannot say is an error, never left out; no file is written."""
    lora_folder("llama", tmp_path / "lora")
    change(tmp_path / "lora", "adapter_config.json", **values)
    with pytest.raises(trimtab.TrimtabError, match=message) as said:
        export_lora(tmp_path / "lora", tmp_path / "lora.gguf")
    assert "\n" not in str(said.value)
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("settings", "base", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save|holds lm_head.weight"),
        ({"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}, "adapts lm_head, which is tied"),
        ({"target_modules": ["embed_tokens"]}, {}, "lora_embedding"),
        ({}, {"hidden_size": 48}, "of another base: model.layers.0.self_attn.q_proj is"),
        ({}, {"num_hidden_layers": 1}, "of another base: the model has no layer model.layers.1"),
    ],
    ids=["head in full", "tied head", "embedding", "width", "depth"],
)
def test_an_adapter_of_what_a_gguf_lacks_is_refused(
    settings: dict[str, object], base: dict[str, object], message: str, tmp_path: Path
) -> None:
    """A whole head, a tied head, embeddings, or layers of another base: one line each."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    model = peft.get_peft_model(tiny_llama(), config)
    model.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    save(tiny_llama(**base), tmp_path / "base")
    with pytest.raises(trimtab.CheckpointError, match=message) as said:
        export_lora(tmp_path / "lora", tmp_path / "lora.gguf", str(tmp_path / "base"))
    assert "\n" not in str(said.value)
    assert not (tmp_path / "lora.gguf").exists()


def test_a_model_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Another architecture, no tokenizer, too many words, an unknown rotation, an fp16 overflow, a file in the way."""
    save(tiny_gpt2(), tmp_path / "gpt2")
    save(tiny_llama(), tmp_path / "bare")
    small = save(tiny_llama(vocab_size=VOCAB), tmp_path / "small")
    tokenizer().save_pretrained(small)
    written("llama", tmp_path / "yarn")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    change(tmp_path / "yarn", "config.json", rope_parameters=yarn)
    huge = model_of("llama")
    with torch.no_grad():
        huge.lm_head.weight[0, 0] = 1e6
    tokenizer().save_pretrained(save(huge, tmp_path / "huge"))
    (tmp_path / "there.gguf").touch()
    before = sorted(tmp_path.rglob("*"))
    for source, dtype, out, message in [
        ("gpt2", None, "a.gguf", "is a GPT2LMHeadModel, which cannot be written as GGUF here; those that can: Llama"),
        ("bare", None, "a.gguf", "holds no tokenizer that can be read"),
        ("small", None, "a.gguf", "the id 299 and the model only 97 embeddings"),
        ("yarn", None, "a.gguf", "rotation is of the type 'yarn'"),
        ("huge", torch.float16, "a.gguf", "too large for fp16; take --dtype bf16"),
        ("huge", None, "there.gguf", "there.gguf exists"),
        ("huge", None, "none/a.gguf", "there is no folder"),
        ("none/x/y", None, "a.gguf", "there is no folder none/x/y"),
    ]:
        source = str(tmp_path / source) if "/" not in source else source
        with pytest.raises(trimtab.TrimtabError, match=message) as said:
            export_model(source, tmp_path / out, dtype)
        assert "\n" not in str(said.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fills up in the middle, neither the file nor a torn one under another name is left."""
    written("llama", tmp_path / "model")
    plain, calls = gguf.GGUFWriter.write_tensor_data, []

    def fill(self: gguf.GGUFWriter, tensor: np.ndarray) -> None:
        calls.append(tensor)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        plain(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fill)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(trimtab.CheckpointError, match="could not be written: No space left on device"):
        export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_package_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gguf the error names the extra."""
    written("llama", tmp_path / "model")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(trimtab.ConfigError, match=r"pip install 'trimtab\[gguf\]'"):
        export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
