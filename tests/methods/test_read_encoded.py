"""What READ found in the encoder: bound to the encoder's output, and let go."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from families_for_tests import batch_for
from models_for_tests import VOCAB, tiny_t5, token_ids
from transformers import T5Config, T5ForConditionalGeneration

import trimtab
from trimtab.bench.meters import saved_bytes


def attached(**settings: Any) -> tuple[Any, trimtab.Adapter, dict[str, Any]]:
    model = tiny_t5()
    adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn", **settings))
    return model.eval(), adapter, batch_for("t5")


def test_the_encoders_output_is_known_after_it_was_repeated() -> None:
    model, _, batch = attached()
    labels = batch["labels"]
    with torch.no_grad():
        own = model.get_encoder()(input_ids=batch["input_ids"])
        first = model(encoder_outputs=own, labels=labels).logits
        twice = own.last_hidden_state.repeat_interleave(2, dim=0)
        doubled = model(encoder_outputs=(twice,), labels=labels.repeat_interleave(2, dim=0)).logits
        torch.testing.assert_close(doubled[::2], first)
        assert torch.equal(model(encoder_outputs=own, labels=labels).logits, first)


@pytest.mark.parametrize("repeats", [1, 2])
def test_an_output_that_was_written_into_is_refused(repeats: int) -> None:
    model, _, batch = attached()
    labels = batch["labels"].repeat_interleave(repeats, dim=0)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=batch["input_ids"]).last_hidden_state
        states = states if repeats == 1 else states.repeat_interleave(repeats, dim=0)
        model(encoder_outputs=(states,), labels=labels)
        states.mul_(2.0)
        with pytest.raises(trimtab.ConfigError, match="run the encoder again"):
            model(encoder_outputs=(states,), labels=labels)


def test_inference_mode_generates_the_same() -> None:
    """Its tensors have no version."""
    model, _, batch = attached(scale=3.0)
    settings = {"input_ids": batch["input_ids"], "max_new_tokens": 4, "num_beams": 2, "eos_token_id": None}
    wanted = model.generate(**settings)
    with torch.inference_mode():
        assert torch.equal(model.generate(**settings), wanted)


@pytest.mark.parametrize("method", [trimtab.READ(size=8), trimtab.Ladder(reduction=4)], ids=["read", "ladder"])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_training_step_is_held_after_it(method: trimtab.Method, backward: bool) -> None:
    model = tiny_t5().train()
    trimtab.attach(model, method)
    seen: list[Any] = []
    model.get_encoder().register_forward_hook(lambda *call: seen.append(weakref.ref(call[-1][0])))
    loss = model(**batch_for("t5")).loss
    if backward:
        loss.backward()
    nodes = weakref.ref(loss)
    del loss
    gc.collect()
    assert nodes() is None and seen[0]() is None


def test_a_fused_optimizer_step_is_seen_by_the_joiner() -> None:
    """It moves the weight and not its version; the values are formed from the weight as it is."""
    model, adapter, batch = attached(scale=3.0)
    model.get_encoder().requires_grad_(False)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=0.1), fused=True)
    model(**batch).loss.backward()
    own = model.get_encoder()(input_ids=batch["input_ids"])
    model(encoder_outputs=own, labels=batch["labels"])
    optimizer.step()
    moved = model(encoder_outputs=own, labels=batch["labels"]).logits
    joiner = model.decoder.read.joiner_weight
    with torch.no_grad():
        joiner.add_(0.0)  # moves its version
    assert torch.equal(model(encoder_outputs=own, labels=batch["labels"]).logits, moved)
    with torch.no_grad():
        before = model(encoder_outputs=own, labels=batch["labels"]).logits
    torch.testing.assert_close(before, moved)


def test_what_is_kept_of_a_decoder_block_is_counted() -> None:
    """phi_j, h_j (and an LSTM's cell state), c_j, and the cross-attention's queries; its keys of each encoder token."""

    def kept(blocks: int, words: int, **settings: Any) -> int:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": VOCAB}
        config = T5Config(**sizes, num_layers=2, num_decoder_layers=blocks, dropout_rate=0.0, decoder_start_token_id=0)
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).to(torch.bfloat16).train()
        trimtab.attach(model, trimtab.READ(size=8, **settings))
        ids, labels = token_ids(rows=4, length=words), token_ids(rows=4, length=16)
        return saved_bytes(lambda: model(input_ids=ids, labels=labels).loss)

    def each(words: int, **settings: Any) -> int:
        return kept(4, words, **settings) - kept(3, words, **settings)

    queries, states = 4 * 16, 32 + 8 + 32  # phi_j, h_j, c_j
    assert each(16) == 2 * (queries * (states + 32) + 4 * 16 * 32)
    assert each(20) == 2 * (queries * (states + 32) + 4 * 20 * 32)
    assert each(16, cell="lstm") - each(16) == 2 * queries * 8
    assert each(16, joiner="none") == 2 * queries * (32 + 8)


def test_drawn_is_as_torch_draws_a_linear_layer() -> None:
    """Weight and bias from U(-1/sqrt(k), 1/sqrt(k)), not as wide as the hidden states."""
    own = trimtab.attach(tiny_t5(), trimtab.READ(size=4, init="drawn")).own()
    for name in ("output_weight", "output_bias"):
        (values,) = (p for full, p in own.items() if full.endswith(name))
        assert 0.3 < values.abs().max() <= 0.5
