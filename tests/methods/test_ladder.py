"""Ladder Side-Tuning: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import shaken, trained_llama
from families_for_tests import batch_for
from models_for_tests import logits, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaModel, StaticCache, T5Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Stack

import trimtab
from trimtab.bench.meters import saved_bytes

Ladder = trimtab.Ladder
#: What the config of a LLaMA four times narrower than `tiny_llama` says.
NARROW = {
    "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    "max_position_embeddings": 64, "vocab_size": 1,
}  # fmt: skip


def left_padded() -> dict[str, Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def states_of(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """phi_0 .. phi_N of a LLaMA that nothing is attached to."""
    with torch.no_grad():
        # The last of these is behind the final norm, so the last block is asked itself.
        last: list[Tensor] = []
        handle = model.model.layers[-1].register_forward_hook(lambda _, args, out: last.append(out))
        found = model.eval()(**batch, output_hidden_states=True).hidden_states
        handle.remove()
    return [*found[:-1], *last]


def head_of(model: nn.Module, states: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.lm_head(model.model.norm(states))
    return out


def test_with_gates_at_one_it_is_the_narrow_model_alone() -> None:
    """transformers' own narrow LLaMA, with the side blocks' weights, over D_0 phi_0."""
    model, plain, batch = tiny_llama(), tiny_llama(), left_padded()
    adapter = trimtab.attach(model, Ladder(reduction=4))
    shaken(adapter)
    own = {name.rpartition("ladder.")[2]: p.detach() for name, p in adapter.own().items()}
    own["gates"].fill_(10.0)
    narrow = LlamaModel(LlamaConfig(num_hidden_layers=2, **NARROW)).eval()
    names = {f"layers.{n.removeprefix('blocks.')}": p for n, p in own.items() if n.startswith("blocks.")}
    left = narrow.load_state_dict(names | {"norm.weight": own["norm.weight"]}, strict=False)
    assert left.missing_keys == ["embed_tokens.weight"] and not left.unexpected_keys
    phi = states_of(plain, batch)
    with torch.no_grad():
        below = phi[0] @ own["downs.0.weight"].t() + own["downs.0.bias"]
        places = {"attention_mask": batch["attention_mask"], "position_ids": batch["position_ids"]}
        end = narrow(inputs_embeds=below, use_cache=False, **places).last_hidden_state
        wanted = head_of(plain, phi[-1] + end @ own["up.weight"].t() + own["up.bias"])
        found = model.eval()(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[seen], head_of(plain, phi[-1])[seen], atol=1e-2)


@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
def test_gates_mix_what_comes_from_beside(layers: tuple[int, ...] | None) -> None:
    """The paper's recursion, written out over the collected hidden states of three blocks."""
    model, plain = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    adapter = trimtab.attach(model, Ladder(reduction=4, layers=layers, temperature=0.3))
    shaken(adapter)
    side: Any = model.model.ladder
    ids = token_ids()
    phi, places = states_of(plain, {"input_ids": ids}), torch.arange(ids.shape[1])[None]
    rotary = LlamaRotaryEmbedding(LlamaConfig(**NARROW))(phi[0], places)
    kept = layers or (0, 1, 2)
    assert len(side.blocks) == len(kept)
    causal = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    with torch.no_grad():
        s = side.downs[0](phi[0])
        for at, number in enumerate(kept):
            m = torch.sigmoid(side.gates[at] / 0.3)
            s = m * s + (1 - m) * side.downs[1 + at](phi[number + 1])
            s = side.blocks[at](s, attention_mask=causal, position_embeddings=rotary, position_ids=places)
        wanted = head_of(plain, phi[-1] + side.up(side.norm(s)))
    torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-4, atol=1e-5)


def test_the_side_decoder_attends_to_the_side_encoder() -> None:
    """transformers' own narrow T5 stacks, one after the other, with gates at one."""
    model, ids = tiny_t5().eval(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}
    adapter = trimtab.attach(model, Ladder(reduction=4))
    shaken(adapter)
    sizes = {"d_model": 8, "d_kv": 2, "d_ff": 12, "num_layers": 2, "num_heads": 4, "vocab_size": 1, "use_cache": False}
    found: list[Tensor] = []
    model.decoder.block[1].register_forward_hook(lambda _, args, out: found.append(out[0]))
    end = None
    with torch.no_grad():
        for kind, read in (("encoder", ids), ("decoder", ids[:, :5])):
            stack = T5Stack(T5Config(**sizes, is_decoder=kind == "decoder")).eval()
            side: Any = getattr(model, kind).ladder
            side.gates.fill_(10.0)
            # Behind the first block, all side blocks get the model's own position bias.
            mine, theirs = (b[0].layer[0].SelfAttention for b in (side.blocks, getattr(model, kind).block))
            mine.relative_attention_bias.weight.copy_(theirs.relative_attention_bias.weight)
            stack.block.load_state_dict(side.blocks.state_dict())
            stack.final_layer_norm.load_state_dict(side.norm.state_dict())
            below = side.downs[0](model.shared(read))
            seen = {"attention_mask": mask} if end is None else {"encoder_attention_mask": mask}
            end = stack(inputs_embeds=below, encoder_hidden_states=end, **seen).last_hidden_state
        model(**batch)
        with adapter.disabled():
            model(**batch)
        added = side.up(end)
    torch.testing.assert_close(found[0] - found[1], added, rtol=1e-3, atol=1e-4)
    assert added.abs().max() > 0.1


def test_parameters_are_those_of_the_formula() -> None:
    """(|K| + 1) mappings down, one up, |K| gates, |K| narrow blocks and a norm."""
    for layers, count in ((None, 4), ((1, 3), 2)):
        adapter = trimtab.attach(tiny_llama(num_hidden_layers=4), Ladder(reduction=4, layers=layers))
        d, n, f = 32, 8, 12
        block = 2 * n * n + 2 * n * (n // 2) + 3 * n * f + 2 * n
        wanted = (count + 1) * (d * n + n) + (n * d + d) + count + count * block + n
        assert sum(entry.parameter.numel() for entry in adapter.trainable()) == wanted


def test_what_a_block_keeps_for_the_backward_is_counted() -> None:
    """phi_j of the backbone, and beyond it no more than a block r times narrower keeps by itself."""
    ids = token_ids(rows=4, length=16)

    def kept(blocks: int, config: trimtab.Method | None, **sizes: Any) -> int:
        model = tiny_llama(num_hidden_layers=blocks, **sizes).to(torch.bfloat16).train()
        if config is not None:
            trimtab.attach(model, config)
        return saved_bytes(lambda: model(input_ids=ids).logits)

    def each(config: trimtab.Method | None, **sizes: Any) -> float:
        return (kept(4, config, **sizes) - kept(3, config, **sizes)) / ids.numel()

    narrow = each(None, **{name: size for name, size in NARROW.items() if name != "vocab_size"})
    ladder = each(Ladder(reduction=4))
    mixture = 2 * 8 * 2 + 2 * 8  # what is mixed, and room for the norms' fp32 copies
    assert 32 * 2 < ladder <= 32 * 2 + narrow + mixture
    assert each(trimtab.READ(size=8)) < ladder < 0.5 * each(None)


@pytest.mark.parametrize(("first", "then"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_the_attention_is_the_models_also_when_it_is_changed_later(first: str, then: str) -> None:
    """BERT's masks are of another kind for each implementation, and the side network gets the model's."""
    model, batch = tiny_bert(), batch_for("bert")
    batch["attention_mask"][0, 5:] = 0
    model.set_attn_implementation(first)
    adapter = trimtab.attach(model, Ladder(reduction=4))
    shaken(adapter)
    with torch.no_grad():
        before = model.eval()(**batch).logits
        model.set_attn_implementation(then)
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
        batch["input_ids"][0, 5:] = 1
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_side_network_follows_the_model_and_the_backbones_is_off() -> None:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.config.resid_pdrop = 0.5
    adapter = trimtab.attach(model, Ladder(reduction=4))
    model.train()
    side: Any = model.transformer.ladder
    assert side.training and side.blocks[0].mlp.dropout.training and side.blocks[0].mlp.dropout.p == 0.5
    assert not any(module.training for module in model.transformer.h.modules())
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)  # U = 0: the backbone alone
        shaken(adapter)
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        model.eval()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not side.training


def test_checkpointing_the_side_blocks_changes_no_gradient() -> None:
    """Switched on after the adapter came; the frozen blocks have nothing to keep either way."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        model = tiny_llama().train()
        adapter = trimtab.attach(model, Ladder(reduction=4))
        shaken(adapter)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        return [entry.parameter.grad for entry in adapter.trainable()]

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_hidden_states_that_are_asked_for_are_the_models() -> None:
    for make, count in ((tiny_llama, 3), (tiny_bert, 3)):
        model = make().eval()
        adapter = trimtab.attach(model, Ladder(reduction=4))
        shaken(adapter)
        out = model(input_ids=token_ids(), output_hidden_states=True)
        assert [tuple(states.shape) for states in out.hidden_states] == [(3, 12, 32)] * count
        assert torch.equal(out.logits, model(input_ids=token_ids()).logits)


def test_bf16_is_computed_and_fp32_held() -> None:
    model = tiny_llama().to(torch.bfloat16)
    adapter = trimtab.attach(model, Ladder(reduction=4))
    assert {entry.parameter.dtype for entry in adapter.trainable()} == {torch.float32}
    shaken(adapter)
    out = model(input_ids=token_ids(), labels=token_ids())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(entry.parameter.grad.dtype == torch.float32 for entry in adapter.trainable())
    wide = tiny_llama()
    shaken(trimtab.attach(wide, Ladder(reduction=4, init="drawn")))
    with torch.autocast("cpu", torch.bfloat16):
        wide(input_ids=token_ids(), labels=token_ids()).loss.backward()


def test_a_seed_draws_the_same_network_again() -> None:
    def drawn(seed: int) -> list[Tensor]:
        return list(trimtab.attach(tiny_llama(), Ladder(reduction=4, init="drawn", seed=seed)).own().values())

    assert all(map(torch.equal, drawn(3), drawn(3)))
    assert not all(map(torch.equal, drawn(3), drawn(4)))


def test_states_of_another_model_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertLMHeadModel(BertConfig(vocab_size=97, is_decoder=True, add_cross_attention=True, **sizes)).eval()
    trimtab.attach(model, Ladder(reduction=4, init="drawn"))
    with pytest.raises(trimtab.ConfigError, match="encoder_hidden_states of another model"):
        model(input_ids=token_ids(), encoder_hidden_states=torch.randn(3, 4, 32))


def test_a_cache_is_refused_as_soon_as_it_would_matter() -> None:
    model, _ = trained_llama(Ladder(reduction=4))
    ids = token_ids(rows=1)
    out = model(input_ids=ids)  # makes a cache, as models do unasked
    with pytest.raises(trimtab.ConfigError, match="use_cache=False"):
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    with pytest.raises(trimtab.ConfigError, match="use_cache=False"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
