"""Narrower stacks: the configs that they are made from, and the rows and columns that they are cut out of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from models_for_tests import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import Tensor, nn

import trimtab
from trimtab.nn.reduced import head_width, reduced_config

SIZES = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}


def side_of(model: nn.Module, owner: str, **settings: Any) -> Any:
    trimtab.attach(model, trimtab.Ladder(reduction=4, train_also=(), **settings))
    return model.get_submodule(owner).ladder


def largest(importance: Tensor, count: int) -> list[int]:
    return sorted(importance.argsort(descending=True)[:count].tolist())


def weights(block: nn.Module, *names: str) -> list[Tensor]:
    return [block.get_parameter(f"{name}.weight").detach() for name in names]


def test_llamas_largest_coordinates_units_and_evenly_spaced_positions_are_kept() -> None:
    """One set of coordinates for all blocks, one of units for each; heads keep the frequencies of narrower ones."""
    model = tiny_llama()
    stream = torch.zeros(32)
    for block in model.model.layers:
        read = weights(block, *(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj", "mlp.up_proj")
        written = weights(block, "self_attn.o_proj", "mlp.down_proj")
        stream += sum(w.abs().sum(0) for w in read) + sum(w.abs().sum(1) for w in written)
    kept = largest(stream, 8)
    heads = [32 // 4 * head + at for head in range(4) for at in (0, 4)]
    side = side_of(model, "model")
    for block, cut in zip(model.model.layers, side.blocks, strict=True):
        gate, up, down = weights(block, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        units = largest(gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0), 12)
        assert torch.equal(cut.mlp.up_proj.weight, up[units][:, kept])
        assert torch.equal(cut.mlp.down_proj.weight, down[kept][:, units])
        assert torch.equal(cut.self_attn.q_proj.weight, block.self_attn.q_proj.weight[heads][:, kept])
        assert torch.equal(cut.self_attn.k_proj.weight, block.self_attn.k_proj.weight[heads[:4]][:, kept])
        assert torch.equal(cut.self_attn.o_proj.weight, block.self_attn.o_proj.weight[kept][:, heads])
        assert torch.equal(cut.input_layernorm.weight, block.input_layernorm.weight[kept])
    assert torch.equal(side.norm.weight, model.model.norm.weight[kept])
    states = torch.randn(2, 3, 32)
    for down in side.downs:
        assert torch.equal(down(states), states[..., kept])
    whole = model.model.rotary_emb.inv_freq
    assert torch.equal(side.rotary["rotary_emb"].inv_freq, whole[[0]])


def test_bert_keeps_the_largest_positions_within_heads() -> None:
    """The same of each head of an attention, in queries, keys, values, their biases, and the columns that read them."""
    model = tiny_bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    side = side_of(model, "bert.encoder")
    kept = side.downs[0].weight.argmax(1).tolist()
    for block, cut in zip(model.bert.encoder.layer, side.blocks, strict=True):
        names = [f"attention.self.{x}" for x in ("query", "key", "value")]
        (end,) = weights(block, "attention.output.dense")
        mass = sum(w.abs().sum(1) for w in weights(block, *names)) + end.abs().sum(0)
        positions = largest(mass.view(4, 8).sum(0), 2)
        rows = [8 * head + at for head in range(4) for at in positions]
        for name in names:
            wide, narrow = block.get_submodule(name), cut.get_submodule(name)
            assert torch.equal(narrow.weight, wide.weight[rows][:, kept])
            assert torch.equal(narrow.bias, wide.bias[rows])
        assert torch.equal(cut.attention.output.dense.weight, end[kept][:, rows])
        assert torch.equal(cut.attention.output.dense.bias, block.attention.output.dense.bias[kept])
        assert torch.equal(cut.attention.output.LayerNorm.bias, block.attention.output.LayerNorm.bias[kept])


def test_fused_and_transposed_weights_are_cut_alike() -> None:
    """GPT-2's one matrix of queries, keys and values, whose rows are inputs."""
    model = tiny_gpt2()
    side = side_of(model, "transformer")
    kept = side.downs[0].weight.argmax(1).tolist()
    for block, cut in zip(model.transformer.h, side.blocks, strict=True):
        fused, end = block.attn.c_attn.weight.detach(), block.attn.c_proj.weight.detach()
        positions = largest(fused.abs().sum(0).view(12, 8).sum(0) + end.abs().sum(1).view(4, 8).sum(0), 2)
        columns = [8 * part + at for part in range(12) for at in positions]
        assert torch.equal(cut.attn.c_attn.weight, fused[kept][:, columns])
        assert torch.equal(cut.attn.c_proj.weight, end[columns[:8]][:, kept])


def test_encoder_and_decoder_keep_the_same_coordinates() -> None:
    """Or the decoder's keys and values would read others than the encoder gives."""
    model = tiny_t5()
    encoder = side_of(model, "encoder")
    decoder: Any = model.decoder.ladder
    assert torch.equal(encoder.downs[0].weight, decoder.downs[0].weight)
    wide, narrow = (b[1].layer[1].EncDecAttention for b in (model.decoder.block, decoder.blocks))
    kept = encoder.downs[0].weight.argmax(1).tolist()
    rows = [row for row in range(32) if wide.k.weight[row, kept].tolist() in narrow.k.weight.tolist()]
    assert len(rows) == 8 and torch.equal(narrow.k.weight, wide.k.weight[rows][:, kept])
    mine, theirs = (b[0].layer[0].SelfAttention.relative_attention_bias for b in (decoder.blocks, model.decoder.block))
    assert torch.equal(mine.weight, theirs.weight)


def test_four_bit_weights_are_cut_from_their_values() -> None:
    model = tiny_llama()
    trimtab.quantize(model, "nf4")
    plain = tiny_llama()
    trimtab.quantize(plain, "nf4")
    trimtab.dequantize(plain)
    four, dense = side_of(model, "model"), side_of(plain, "model")
    for name, parameter in four.named_parameters():
        torch.testing.assert_close(parameter, dense.get_parameter(name))


def test_norms_of_queries_and_keys_keep_positions() -> None:
    """Also where they are as wide as the hidden states."""
    torch.manual_seed(0)
    model: Any = tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES, pad_token_id=0))
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_norm.weight.copy_(torch.arange(32.0))
    side = side_of(model, "model")
    assert side.blocks[0].self_attn.q_norm.weight.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]


def test_what_cannot_be_told_apart_is_refused_and_can_be_drawn() -> None:
    def make() -> Any:
        return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))

    with pytest.raises(trimtab.ConfigError, match=r"init='pruned'.*use init='drawn'"):
        side_of(make(), "model")
    side_of(make(), "model", init="drawn")


def test_widths_are_divided_and_what_need_not_fit_is_rounded_down() -> None:
    config = tf.LlamaConfig(**SIZES, head_dim=12)
    small = reduced_config(config, 4)
    assert (small.hidden_size, small.intermediate_size, small.head_dim) == (8, 12, 4)  # of 3, which cannot be rotated
    assert (small.num_attention_heads, small.num_hidden_layers) == (4, 2)
    assert (config.hidden_size, config.vocab_size) == (32, 97)
    assert reduced_config(config, 32).head_dim == 2
    small = reduced_config(tf.T5Config(d_model=32, d_kv=8, d_ff=50, num_heads=4), 16)
    assert (small.d_model, small.d_kv, small.d_ff) == (2, 1, 3)
    bart = tf.BartConfig(d_model=32, encoder_attention_heads=2, decoder_attention_heads=4)
    assert (head_width(bart, "encoder"), head_width(bart, "decoder")) == (16, 8)


def test_a_width_that_nobody_knows_of_is_found_out() -> None:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    config = tf.DeepseekV3Config(**SIZES, **sizes, **experts, moe_intermediate_size=16, num_key_value_heads=4)
    with pytest.raises(trimtab.ConfigError, match="q_b_proj is 64 x 16 in the narrower stack, too"):
        side_of(tf.DeepseekV3ForCausalLM(config), "model", init="drawn")


def test_what_cannot_run_narrower_says_so() -> None:
    """GPT-J rotates as many positions of a narrower head."""
    config = tf.GPTJConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)
    model = tf.GPTJForCausalLM(config)
    side_of(model, "transformer", init="drawn")
    with pytest.raises(trimtab.ConfigError, match="8 wide, cannot run as the model's does"):
        model(input_ids=torch.arange(5)[None])
