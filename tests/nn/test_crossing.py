"""A decoder's frozen cross-attention on values of our own: exact, with a gradient to them alone, and no trace left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import VOCAB, tiny_llama, tiny_t5
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    TrOCRConfig,
    UMT5Config,
    UMT5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation import GenerationMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.trocr.modeling_trocr import TrOCRDecoderLayer

from trimtab.bench.meters import saved_bytes
from trimtab.errors import ConfigError
from trimtab.nn.crossing import NAME, Crossing, _cross_attention

WIDE, HEADS, BLOCKS = 32, 4, 2
FRAMES = 14
_SIZES = {"d_model": WIDE, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "vocab_size": VOCAB, "init_std": 0.3}
_HEADS = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
_WITHIN = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128}
_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
_OFF = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def bart(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "forced_eos_token_id": None} | changes
    return BartForConditionalGeneration(BartConfig(**sizes))


def marian(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "forced_eos_token_id": None} | changes
    return MarianMTModel(MarianConfig(**sizes))


def whisper(**changes: Any) -> nn.Module:
    sizes = {**_SIZES, **_HEADS, **_WITHIN, **_TOKENS, **_OFF, "num_mel_bins": 8, "max_source_positions": FRAMES}
    own = {"max_target_positions": 128, "suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**(sizes | own | changes)))


def umt5(**changes: Any) -> nn.Module:
    sizes = {"d_model": WIDE, "d_kv": 8, "d_ff": 48, "num_layers": BLOCKS, "num_heads": HEADS, "vocab_size": VOCAB}
    return UMT5ForConditionalGeneration(UMT5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, **changes))


def bert_to_bert(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": WIDE, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": 48}
    off = {
        "vocab_size": VOCAB,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    encoder = BertModel(BertConfig(**sizes, **off))
    decoder = BertLMHeadModel(BertConfig(**sizes, **off, is_decoder=True, add_cross_attention=True, **changes))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.pad_token_id = model.generation_config.pad_token_id = 1
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    return model


def bert_to_gpt2(**changes: Any) -> nn.Module:
    sizes = {"n_embd": WIDE, "n_layer": BLOCKS, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": 128}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2}
    decoder = GPT2LMHeadModel(GPT2Config(**sizes, **off, add_cross_attention=True, initializer_range=0.3, **changes))
    return EncoderDecoderModel(encoder=bert_to_bert().encoder, decoder=decoder)


FAMILIES: dict[str, Callable[..., Any]] = {
    "t5": tiny_t5,
    "umt5": umt5,
    "bart": bart,
    "marian": marian,
    "whisper": whisper,
    "bert": bert_to_bert,
}
MAIN = ("t5", "bart", "marian", "whisper")


def build(family: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder's blocks."""
    decoder = model.get_decoder()
    lists = [
        m
        for m in decoder.modules()
        if isinstance(m, nn.ModuleList) and type(m[0]).__name__.endswith(("Block", "Layer"))
    ]
    return lists[0]


def batch_of(
    model: Any, *, padded: bool = False, queries: int = 7, keys: int = FRAMES, rows: int = 2
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (rows, queries), generator=generator)
    if isinstance(model, WhisperForConditionalGeneration):
        shape = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator, dtype=model.dtype), "decoder_input_ids": ids}
    mask = torch.ones(rows, keys, dtype=torch.long)
    if padded:
        mask[0, -4:] = 0
        mask[1, :2] = 0
    given = torch.randint(3, VOCAB, (rows, keys), generator=generator)
    return {"input_ids": given, "attention_mask": mask, "decoder_input_ids": ids}


class Tapper:
    """Values that are a linear map of the encoder's states, and a sink that keeps what it is given."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float64, d: int = WIDE) -> None:
        self.weight = torch.randn(width, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.weight = (self.weight / 6).to(dtype).requires_grad_()
        self.states: list[Tensor] = []
        self.c: list[tuple[int, Tensor]] = []
        self.modes: list[bool] = []

    def values(self, states: Tensor) -> Tensor:
        self.states.append(states)
        return states @ self.weight.t()

    def sink(self, j: int, c: Tensor) -> None:
        self.modes.append(torch.is_grad_enabled())
        self.c.append((j, c))


@contextmanager
def tapped(model: Any) -> Iterator[Tapper]:
    crossing = Crossing(blocks_of(model), type(model).__name__)
    tapper = Tapper(crossing.width, model.dtype)
    crossing.put_on(tapper.values, tapper.sink)
    try:
        yield tapper
    finally:
        crossing.take_off()


def expected(model: Any, batch: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    """c_j by plain operations, from the probabilities that the eager model's cross-attentions return."""
    own = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    seen: list[Tensor] = []
    modules = [_cross_attention(block, "")[1] for block in blocks_of(model)]
    handles = [module.register_forward_hook(lambda _, args, out: seen.append(out[-1])) for module in modules]
    with torch.no_grad():
        states = model(**batch).encoder_last_hidden_state
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(own)
    assert all(torch.allclose(P.sum(-1), torch.ones((), dtype=P.dtype)) for P in seen)
    split = (states @ weight.t()).view(*states.shape[:2], HEADS, -1).transpose(1, 2)
    return [(P @ split).transpose(1, 2).flatten(2) for P in seen]


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
        _, module = _cross_attention(block, "")
        children = dict(module.named_children())
        project = children.get("v", children.get("v_proj"))
        children.get("o", children.get("out_proj")).register_forward_pre_hook(lambda _, args: own.append(args[0]))
        Crossing([block], family).put_on(project, lambda _, c: got.append(c))
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


def test_gradient_mode_and_errors() -> None:
    """`values` runs with gradients, `sink` as the block does; after an error the config is the module's own."""
    model = build("t5")
    batch = batch_of(model)
    with tapped(model) as tap, torch.no_grad():
        model(**batch)
        assert not torch.is_grad_enabled()
    assert tap.modes == [False] * BLOCKS and all(c.requires_grad for _, c in tap.c)

    crossing = Crossing(blocks_of(model), "t5")

    def fails(states: Tensor) -> Tensor:
        raise KeyError("mine")

    crossing.put_on(fails, tap.sink)
    with torch.no_grad():
        with pytest.raises(KeyError, match="mine"):
            model(**batch)
        assert not torch.is_grad_enabled()
    assert all(m.config is model.decoder.config for m in model.decoder.modules() if type(m).__name__ == "T5Attention")
    crossing.take_off()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_errors_before_the_look_up(error: type[BaseException]) -> None:
    """A module that fails has its config back, at once or, after an interrupt, with the next forward or at the end."""
    model = build("t5")
    batch = batch_of(model)
    attention = blocks_of(model)[0].layer[1].EncDecAttention

    def fails(*_: Any) -> None:
        raise error

    with tapped(model) as tap:
        for _ in range(2):
            handle = attention.q.register_forward_pre_hook(fails)
            with pytest.raises(error):
                model(**batch)
            handle.remove()
            assert error is KeyboardInterrupt or attention.config is model.decoder.config
            tap.c.clear()
            model(**batch)
            assert attention.config is model.decoder.config and len(tap.c) == BLOCKS
        attention.q.register_forward_pre_hook(fails)
        with pytest.raises(error):
            model(**batch)
    assert attention.config is model.decoder.config


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


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_off_leaves_nothing(family: str) -> None:
    """Attributes, their order, the config's identity and the hooks are what they were, after a forward, too."""
    model = build(family, dtype=torch.float32)

    def look() -> list[list[tuple[str, int, int]]]:
        return [
            [(name, id(value), len(value) if isinstance(value, dict) else 0) for name, value in vars(module).items()]
            for module in model.modules()
        ]

    before = look()
    with tapped(model):
        assert look() != before
        model(**batch_of(model))
    assert look() == before


def test_between_forwards_the_config_is_the_models(tmp_path: Path) -> None:
    """While taps are on, modules share the model's config, which saves plainly and may change its implementation."""
    model = build("bart")
    batch = batch_of(model, padded=True)
    with tapped(model) as tap:
        model(**batch)
        attention = blocks_of(model)[0].encoder_attn
        assert attention.config is model.config and model.config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        assert NAME not in (tmp_path / "config.json").read_text()
        model.set_attn_implementation("eager")
        out = model(**batch, output_attentions=True)
        assert out.cross_attentions[0].shape == (2, HEADS, 7, FRAMES)
    first, second = tap.c[:BLOCKS], tap.c[BLOCKS:]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize("via", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_has_taps_of_its_own(via: Callable[[Any], Any]) -> None:
    """Methods of an object are copied along with it, so that the copy's taps feed the copy; both can be taken off."""
    model = build("t5")
    crossing = Crossing(blocks_of(model), "t5")
    tapper = Tapper(crossing.width)
    tapper.weight = tapper.weight.detach()
    crossing.put_on(tapper.values, tapper.sink)
    model2, crossing2, tapper2 = via((model, crossing, tapper))
    model2(**batch_of(model2))
    assert len(tapper2.c) == BLOCKS and not tapper.c
    crossing2.take_off()
    model2(**batch_of(model2))
    assert len(tapper2.c) == BLOCKS
    model(**batch_of(model))
    assert len(tapper.c) == BLOCKS


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


def test_compiled_blocks() -> None:
    """A compiled block is broken in two at its tap, and gives what it gave."""
    model = build("t5", dtype=torch.float32).requires_grad_(False)
    batch = batch_of(model, padded=True)
    with tapped(model) as tap:
        before = model(**batch).logits
        blocks_of(model)[0].compile(backend="eager")
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(tap.c[:BLOCKS], tap.c[BLOCKS:], strict=True))
    assert torch.equal(model(**batch).logits, before) and len(tap.c) == 2 * BLOCKS


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


# -- what is refused -----------------------------------------------------------------------------------


def test_old_code_is_refused() -> None:
    """Attention that transformers has not moved to its registry, as TrOCR's, is named with the way out."""
    sizes = {"d_model": WIDE, "decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 48}
    block = TrOCRDecoderLayer(TrOCRConfig(**sizes, is_decoder=True, cross_attention_hidden_size=WIDE))
    with pytest.raises(ConfigError, match=r"my TrOCR: decoder block 0: encoder_attn does not look.*joiner='none'"):
        Crossing([block], "my TrOCR")


def test_no_cross_attention_is_refused() -> None:
    """Blocks of a decoder-only model have no cross-attention."""
    with pytest.raises(ConfigError, match=r"LLaMA: decoder block 0 has no cross-attention.*joiner='none'"):
        Crossing(tiny_llama().model.layers, "LLaMA")
    with pytest.raises(ConfigError, match="no blocks"):
        Crossing([], "nothing")


def test_several_or_unlike_cross_attentions_are_refused() -> None:
    """Each block has exactly one, and all are of one width."""
    model, wide = tiny_t5(), BartForConditionalGeneration(bart(d_model=64).config)
    both = nn.ModuleDict({"cross_a": blocks_of(model)[0].layer[1], "cross_b": blocks_of(model)[1].layer[1]})
    with pytest.raises(ConfigError, match="has 2 cross-attentions"):
        Crossing([both], "twice")
    with pytest.raises(ConfigError, match="of one width is needed"):
        Crossing([blocks_of(model)[0], blocks_of(wide)[0]], "unlike")


def test_wrong_values_are_refused() -> None:
    """V' of another length or width is no value of these keys."""
    model = build("bart")
    for shape in ((2, FRAMES, WIDE + 4), (2, FRAMES - 1, WIDE), (1, FRAMES, WIDE)):
        crossing = Crossing(blocks_of(model), "bart")
        crossing.put_on(lambda _, shape=shape: torch.zeros(shape, dtype=torch.float64), lambda j, c: None)
        with pytest.raises(ConfigError, match=r"encoder_attn of decoder block 0 attends to values"):
            model(**batch_of(model))
        crossing.take_off()


def test_what_cannot_be_called_twice_is_refused() -> None:
    """An implementation without a gradient here, one that writes to a cache, one that is not registered."""
    model = build("bart")
    crossing = Crossing(blocks_of(model), "bart")
    for name, why in (("flex_attention", "no gradient on a CPU"), ("paged|eager", "cache"), ("mine", "not registered")):
        model.config._attn_implementation = name
        with pytest.raises(ConfigError, match=rf"attn_implementation='{name[:4]}.*{why}.*joiner='none'"):
            crossing.put_on(lambda _: None, lambda j, c: None)
    model.config._attn_implementation = "sdpa"
    crossing.put_on(lambda _: None, lambda j, c: None)
    for other in (crossing, Crossing(blocks_of(model), "bart")):
        with pytest.raises(ConfigError, match="is tapped already"):
            other.put_on(lambda _: None, lambda j, c: None)
    crossing.take_off()
    model.config._attn_implementation = NAME
    with pytest.raises(ConfigError, match="trimtab's own"):
        model(**batch_of(model))


class Stubborn(nn.Module):
    """Names the registry, and does not ask it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.v_proj = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, ask: bool = False) -> Tensor:
        if ask:
            return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, len)(x)
        return self.v_proj(x)


def test_a_look_up_that_does_not_happen() -> None:
    """The first forward finds that an attention went another way, or was no cross-attention."""
    module = Stubborn(bart().config)
    module.config._attn_implementation = "sdpa"
    config = module.config
    crossing = Crossing([nn.ModuleDict({"cross": module})], "stubborn")
    crossing.put_on(lambda _: None, lambda j, c: None)
    x = torch.zeros(1, 2, WIDE)
    with pytest.raises(ConfigError, match=r"cross of decoder block 0 did not look.*joiner='none'"):
        module(x, x)
    with pytest.raises(ConfigError, match=r"called without the encoder's states.*joiner='none'"):
        module(x)
    assert module.config is config
