"""Taps on a cross-attention: what they leave behind, what copies have of them, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossing_for_tests import (
    BLOCKS,
    FAMILIES,
    FRAMES,
    HEADS,
    WIDE,
    Tapper,
    bart,
    batch_of,
    blocks_of,
    build,
    tapped,
)
from models_for_tests import tiny_llama, tiny_t5
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    TrOCRConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.trocr.modeling_trocr import TrOCRDecoderLayer

from trimtab.errors import ConfigError
from trimtab.nn.crossing import NAME, Crossing


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
