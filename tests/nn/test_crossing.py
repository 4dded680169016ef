"""A decoder's frozen cross-attention on values of our own: exact, lean, and with a gradient to them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from crossing_for_tests import (
    BLOCKS,
    FAMILIES,
    FRAMES,
    HEADS,
    MAIN,
    WIDE,
    bart,
    batch_of,
    bert_to_gpt2,
    blocks_of,
    build,
    expected,
    tapped,
)
from models_for_tests import VOCAB
from torch import Tensor
from transformers import (
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)
from transformers.generation import GenerationMixin

from trimtab.bench.meters import saved_bytes
from trimtab.errors import ConfigError
from trimtab.nn.crossing import Crossing


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_c_is_the_probabilities_times_the_values(family: str, implementation: str, padded: bool) -> None:
    """c_j = P_j V' with the model's own P_j, heads split as it does; the gradient of V' is plain autograd's."""
    model = build(family, implementation)
    batch = batch_of(model, padded=padded)
    with tapped(model) as tap, torch.no_grad():
        out = model(**batch)
    assert all(states is out.encoder_last_hidden_state for states in tap.states)
    theirs = expected(model, batch, tap.weight)
    assert [j for j, _ in tap.c] == list(range(BLOCKS))
    for (_, c), other in zip(tap.c, theirs, strict=True):
        assert torch.allclose(c, other, rtol=1e-10, atol=1e-12)
    pull = [torch.randn_like(c) for c in theirs]
    (ours,) = torch.autograd.grad([c for _, c in tap.c], tap.weight, pull)
    (plain,) = torch.autograd.grad(theirs, tap.weight, pull)
    assert plain.abs().max() > 0.1
    assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MAIN)
def test_with_the_models_own_values(family: str, implementation: str) -> None:
    """Handed what its own projection makes of the states, c is what the module's output projection reads."""
    model = build(family, implementation)
    own: list[Tensor] = []
    got: list[Tensor] = []
    for block in blocks_of(model):
        crossing = Crossing([block], family)
        parts = dict(crossing.modules[0].named_children())
        parts.get("o", parts.get("out_proj")).register_forward_pre_hook(lambda _, args: own.append(args[0]))
        crossing.put_on(parts.get("v", parts.get("v_proj")), lambda _, c: got.append(c))
    model(**batch_of(model, padded=True))
    assert len(own) == len(got) == BLOCKS
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(own, got, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str, implementation: str) -> None:
    """Logits and the model's own gradients are bit-equal with taps on, with gradients and without."""
    model = build(family, implementation, torch.float32)
    batch = batch_of(model, padded=True)

    def run() -> tuple[Tensor, Tensor, list[Tensor | None]]:
        with torch.no_grad():
            quiet = model(**batch).logits
        loud = model(**batch).logits
        grads = torch.autograd.grad(
            loud.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        return quiet, loud, list(grads)

    before = run()
    with tapped(model) as tap:
        after = run()
    assert len(tap.c) == 2 * BLOCKS
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    for a, b in zip(before[2], after[2], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_nothing_of_the_model_gets_a_gradient() -> None:
    """c depends on V' alone: not on queries, keys, or whatever of the model requires a gradient."""
    model = build("t5")
    fixed = torch.randn(2, FRAMES, WIDE, dtype=torch.float64, requires_grad=True)
    got: list[Tensor] = []
    crossing = Crossing(blocks_of(model), "t5")
    crossing.put_on(lambda _: fixed, lambda _, c: got.append(c))
    assert model(**batch_of(model)).logits.requires_grad
    sum(c.square().sum() for c in got).backward()
    assert fixed.grad is not None
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize(("beams", "cached"), [(1, True), (1, False), (3, True), (3, False)])
def test_generate(family: str, beams: int, cached: bool) -> None:
    """generate() gives the same tokens and the same scores, and every step of every block is tapped."""
    model = build(family, dtype=torch.float32)
    batch = {name: t for name, t in batch_of(model, padded=True).items() if name != "decoder_input_ids"}
    more = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "use_cache": cached, "do_sample": False}

    def run() -> Any:
        out = GenerationMixin.generate(model, **batch, **more, output_scores=True, return_dict_in_generate=True)
        return out.sequences, torch.stack(out.scores)

    before = run()
    with tapped(model) as tap:
        after = run()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert len(tap.c) == 6 * BLOCKS
    assert tap.c[-1][1].shape == (2 * beams, 1 if cached else 6, WIDE)
    assert all(states.shape[0] == 2 * beams for states in tap.states)


@pytest.mark.parametrize("family", MAIN)
def test_keys_from_the_cache(family: str) -> None:
    """c of cached steps is that of one forward over all tokens; the caches are as long as without taps."""
    model = build(family)
    batch = batch_of(model, padded=True)
    ids = batch.pop("decoder_input_ids")
    with tapped(model) as tap, torch.no_grad():
        encoded = model.get_encoder()(**batch)
        rest = {name: t for name, t in batch.items() if name == "attention_mask"}
        model(encoder_outputs=encoded, decoder_input_ids=ids, **rest, use_cache=False)
        whole, tap.c = tap.c, []
        cache = None
        for t in range(ids.shape[1]):
            step = ids[:, t : t + 1]
            out = model(encoder_outputs=encoded, decoder_input_ids=step, **rest, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    assert cache.get_seq_length() == ids.shape[1]
    assert cache.cross_attention_cache.get_seq_length() == FRAMES
    for j, c in whole:
        steps = torch.cat([part for i, part in tap.c if i == j], dim=1)
        assert torch.allclose(steps, c, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_alone_are_kept(family: str, implementation: str) -> None:
    """For the backward a block keeps its queries and keys and a row of mask: nothing of Tq x Tk."""
    torch.manual_seed(0)
    queries, keys = 48, 80
    model = FAMILIES[family](**({"max_source_positions": keys} if family == "whisper" else {})).eval()
    model.set_attn_implementation(implementation)
    model.requires_grad_(False)
    batch = batch_of(model, padded=True, queries=queries, keys=keys, rows=2)
    fixed = torch.randn(2, keys, WIDE, requires_grad=True)
    got: list[Tensor] = []
    crossing = Crossing(blocks_of(model), family)
    crossing.put_on(lambda _: fixed, lambda _, c: got.append(c))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch)
    assert max(kept) == 2 * keys * WIDE < 2 * queries * keys
    own = BLOCKS * 2 * (queries + keys) * WIDE * 4
    rows = BLOCKS * 2 * keys * 4 * (1 + HEADS)  # of a mask in fp32, and of a bias of all heads
    assert own <= saved_bytes(lambda: model(**batch)) <= own + rows
    sum(c.sum() for c in got).backward()
    assert fixed.grad is not None and fixed.grad.abs().sum() > 0


def test_no_gradient_no_graph() -> None:
    """V' without a gradient, as an evaluation gives it, makes c without a graph; None makes no c at all."""
    model = build("bart")
    crossing = Crossing(blocks_of(model), "bart")
    got: list[Tensor] = []
    answers: list[Tensor | None] = [torch.zeros(2, FRAMES, WIDE, dtype=torch.float64), None]
    crossing.put_on(lambda _: answers[0] if len(got) == 0 else answers[1], lambda _, c: got.append(c))
    model(**batch_of(model))
    assert len(got) == 1 and not got[0].requires_grad


def test_dropout_belongs_to_the_model() -> None:
    """In training mode the model drops what it would have dropped, and the tap drops nothing and draws nothing."""
    torch.manual_seed(0)
    model = bart(attention_dropout=0.5).double().train()
    batch = batch_of(model)
    torch.manual_seed(1)
    before = model(**batch).logits
    with tapped(model) as tap:
        torch.manual_seed(1)
        after = model(**batch).logits
        dropped, tap.c = tap.c, []
        torch.manual_seed(1)
        model(**batch)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(dropped, tap.c, strict=True))
    assert torch.equal(before, after)
    ones = torch.ones(2, FRAMES, WIDE, dtype=torch.float64)
    got: list[Tensor] = []
    crossing = Crossing(blocks_of(model), "bart")
    crossing.put_on(lambda _: ones, lambda _, c: got.append(c))
    model(**batch)
    assert all(torch.allclose(c, torch.ones_like(c)) for c in got)  # probabilities sum to 1, undropped


def test_a_decoder_without_encoder_is_not_tapped() -> None:
    """A call in which the decoder does not look at an encoder has no c."""
    model = build("bart")
    with tapped(model) as tap:
        model.get_decoder()(input_ids=torch.tensor([[5, 6]]))
    assert not tap.c


def test_autocast() -> None:
    """Under autocast c is of its dtype and near the fp64 one, and V' has its gradient in its own."""
    model = build("t5", dtype=torch.float32)
    batch = batch_of(model, padded=True)
    with tapped(model) as tap:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
        sum(c.float().square().sum() for _, c in tap.c).backward()
    exact = expected(copy.deepcopy(model).double(), batch, tap.weight.detach().double())
    assert all(c.dtype == torch.bfloat16 for _, c in tap.c)
    assert all((c - e).abs().max() < 0.05 * e.abs().max() for (_, c), e in zip(tap.c, exact, strict=True))
    assert tap.weight.grad is not None and tap.weight.grad.dtype == torch.float32


def test_grouped_and_capped_attention() -> None:
    """Values have the width of the key and value heads, c that of the queries'; what else shapes P is in c."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDE, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 0.5}
    part = T5GemmaModuleConfig(**sizes, **heads, initializer_range=0.3)
    whole = T5GemmaConfig(encoder=part, decoder=copy.deepcopy(part), vocab_size=VOCAB, attn_implementation="eager")
    model = T5GemmaForConditionalGeneration(whole).double().eval()
    crossing = Crossing(blocks_of(model), "T5Gemma")
    assert (crossing.width, crossing.result_width) == (16, WIDE)
    batch = batch_of(model, padded=True)
    with tapped(model) as tap, torch.no_grad():
        out = model(**batch, output_attentions=True)
    split = (out.encoder_last_hidden_state @ tap.weight.t()).view(2, FRAMES, 2, 8).transpose(1, 2)
    theirs = [(P @ split.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2) for P in out.cross_attentions]
    for (_, c), other in zip(tap.c, theirs, strict=True):
        assert torch.allclose(c, other, rtol=1e-10, atol=1e-12)
        pull = torch.randn_like(c)
        (ours,), (plain,) = (torch.autograd.grad(x, tap.weight, pull, retain_graph=True) for x in (c, other))
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-11)


def test_gpt2_as_a_decoder() -> None:
    """A projection to keys and values in one is known; code that asks for the implementation by name is refused."""
    torch.manual_seed(0)
    model = bert_to_gpt2().double().eval()
    model.set_attn_implementation("sdpa")
    batch = batch_of(model, padded=True)
    with tapped(model) as tap, torch.no_grad():
        model(**batch)
    theirs = expected(model, batch, tap.weight)
    assert all(torch.allclose(c, e, rtol=1e-9, atol=1e-11) for (_, c), e in zip(tap.c, theirs, strict=True))
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"asks for it by name.*set_attn_implementation.*joiner='none'"):
        Crossing(blocks_of(model), "GPT-2").put_on(tap.values, tap.sink)
