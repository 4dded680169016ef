"""Cached hidden states: what a later visit of an example computes, and what it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import batch_for
from hidden_parts import (
    FIVE,
    assert_same,
    collate,
    counting,
    examples,
    hearing,
    inside_blocks,
    open_cache,
    quiet,
    visit,
    weight_of,
    with_read,
)
from models_for_tests import tiny_llama, token_ids
from torch import nn

import trimtab
from trimtab.train.hidden.visit import constants


@pytest.mark.parametrize("storage", ["bf16", "int8", "exact"])
@pytest.mark.parametrize("family", [*FIVE, "gpt2", "qwen2", "distilbert", "marian", "whisper"])
def test_every_visit_has_the_same_loss_and_gradients(family: str, storage: str, tmp_path: Path) -> None:
    """Bit for bit at equal parameters: the first visit, the second, and one after the cache was opened again."""
    model, adapter = with_read(family)
    batch = batch_for(family) if family == "whisper" else collate(examples(family), more=2)
    with open_cache(adapter, tmp_path, storage) as cache:
        with counting(inside_blocks(adapter)) as before:
            first = visit(model, adapter, cache, batch)
        with counting(inside_blocks(adapter)) as calls:
            assert_same(visit(model, adapter, cache, batch), first)
    with open_cache(adapter, tmp_path, storage) as again, counting(inside_blocks(adapter)) as more:
        assert_same(visit(model, adapter, again, batch), first)
    assert before and not calls and not more


@pytest.mark.parametrize("family", FIVE)
def test_order_batch_size_and_padding_do_not_matter(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits reach the network for each token, from batches of other rows and lengths; no block runs.

    The sums over an epoch's tokens are in another order then, so that the epoch's loss and gradients are the same
    within the rounding of fp32 alone.
    """
    model, adapter = with_read(family)
    rows = examples(family)
    cache = open_cache(adapter, tmp_path)

    def epoch(order: list[int], size: int, more: int) -> tuple[dict[Any, torch.Tensor], float, dict[str, Any]]:
        read, losses, total, weights = {}, 0.0, {}, 0
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = collate([rows[i] for i in chosen], more=more)
            with hearing(monkeypatch) as heard:
                loss, gradients = visit(model, adapter, cache, batch)
            weight = weight_of(batch)
            weights += weight
            losses += float(loss) * weight
            for name, gradient in gradients.items():
                total[name] = total.get(name, 0) + gradient.double() * weight
            for call, (_, phi, _) in enumerate(heard):
                for row, i in enumerate(chosen):
                    read[call, i] = phi[row]
        return read, losses / weights, {name: gradient / weights for name, gradient in total.items()}

    read, loss, gradients = epoch([0, 1, 2, 3, 4, 5], size=3, more=0)
    with counting(inside_blocks(adapter)) as calls:
        other_read, other_loss, other_gradients = epoch([4, 2, 5, 0, 3, 1], size=2, more=3)
    assert not calls and len(cache) == len(rows)
    for place, phi in read.items():
        tokens = min(len(phi), len(other_read[place]))
        assert torch.equal(phi[:tokens], other_read[place][:tokens]), place
        assert not phi[tokens:].any() and not other_read[place][tokens:].any()
        assert phi.any()
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(other_gradients[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_batch_with_a_new_row_reads_what_is_stored_of_the_others(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored rows keep the bits of their first visit though the blocks run, and twins in a batch are one example."""
    model, adapter = with_read(family)
    rows = examples(family)
    cache = open_cache(adapter, tmp_path, "exact")
    with hearing(monkeypatch) as first:
        visit(model, adapter, cache, collate(rows[:2]))
    mixed = collate([rows[2], rows[1], rows[2], rows[0]], more=4)
    with counting(inside_blocks(adapter)) as calls, hearing(monkeypatch) as second:
        whole = visit(model, adapter, cache, mixed)
    assert calls and len(cache) == 3
    for (_, phi, _), (_, later, _) in zip(first, second, strict=True):
        tokens = phi.shape[1]
        assert torch.equal(phi[1], later[1, :tokens]) and torch.equal(phi[0], later[3, :tokens])
        assert torch.equal(later[0], later[2])
    assert_same(visit(model, adapter, cache, mixed), whole)


def train(model: nn.Module, adapter: trimtab.Adapter, cache: Any, family: str) -> list[torch.Tensor]:
    """Losses of two epochs over two batches, and the parameters that they lead to."""
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    rows, found = examples(family), []
    for step in range(1, 5):
        batch = collate(rows[:3] if step % 2 else rows[3:])
        with quiet():
            if cache is None:
                loss = model(**batch).loss
            else:
                with cache.batch(batch):
                    loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
        found.append(loss.detach())
    return [*found, *(entry.parameter.detach() for entry in adapter.trainable())]


@pytest.mark.parametrize(("dtype", "storage"), [(torch.bfloat16, "bf16"), (torch.float32, "exact")])
@pytest.mark.parametrize("family", FIVE)
def test_training_with_a_cache_is_training_without(
    family: str, dtype: torch.dtype, storage: str, tmp_path: Path
) -> None:
    """Nothing is rounded, so two epochs are the same bits: losses, and the parameters that they lead to.

    Padding changes nothing: no loss is of it, so that zeros in its place have no gradient either.
    """
    plain = train(*with_read(family, dtype=dtype), None, family)
    model, adapter = with_read(family, dtype=dtype)
    kept = train(model, adapter, open_cache(adapter, tmp_path, storage), family)
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))


def test_rounding_is_named_once_and_changes_little(tmp_path: Path) -> None:
    """bf16 keeps 8 bits: what is added to phi_N and the head's reading of it move by about 2^-9 of themselves."""
    model, adapter = with_read("llama")
    batch = collate(examples("llama"))
    cache = trimtab.HiddenCache(adapter, tmp_path)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        out: torch.Tensor = model(**batch).logits[batch["attention_mask"] != 0]
        return out

    def cached() -> torch.Tensor:
        with cache.batch(batch):
            return logits()

    exact = logits()
    with pytest.warns(UserWarning, match="hidden states in float32 are rounded to bfloat16"):
        rounded = cached()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached(), rounded)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 2**-7


def test_a_bf16_backbone_is_kept_exactly_and_nothing_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, adapter = with_read("llama", dtype=torch.bfloat16)
    batch = collate(examples("llama"))
    batch = {name: tensor[:1, :5] for name, tensor in batch.items()}  # no padding: all logits can be compared
    with torch.no_grad():
        plain = model(**batch).logits
        cache = trimtab.HiddenCache(adapter, tmp_path)
        for _ in range(2):
            with cache.batch(batch):
                assert torch.equal(model(**batch).logits, plain)
    assert not [w for w in recwarn if "storage" in str(w.message)]


def test_blocks_that_share_their_weights(tmp_path: Path) -> None:
    """ALBERT's one block is called four times, and each call has hidden states of its own."""
    model, adapter = with_read("albert", blocks=("albert_layer_groups",))
    model.eval()
    cache = open_cache(adapter, tmp_path)
    batch = batch_for("albert")
    first = visit(model, adapter, cache, batch)
    with counting(inside_blocks(adapter)) as calls:
        assert_same(visit(model, adapter, cache, batch), first)
    assert not calls and cache.bytes_per_token == 4 * 32 * 2


def test_a_quantised_backbone(tmp_path: Path) -> None:
    model = tiny_llama()
    trimtab.quantize(model, "nf4")
    adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn"))
    batch = collate(examples("llama"))
    first = visit(model, adapter, open_cache(adapter, tmp_path), batch)
    again = open_cache(adapter, tmp_path)
    assert_same(visit(model, adapter, again, batch), first)
    other = tiny_llama(seed=5)
    trimtab.quantize(other, "nf4")
    with pytest.raises(trimtab.CheckpointError, match="another backbone"):
        trimtab.HiddenCache(trimtab.attach(other, trimtab.READ(size=8)), tmp_path)


def test_autocast(tmp_path: Path) -> None:
    """Under autocast the hidden states are what it computes; without it the same cache is refused."""
    model, adapter = with_read("llama")
    batch = collate(examples("llama"))
    cache = open_cache(adapter, tmp_path)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), quiet(), cache.batch(batch):
            losses.append(model(**batch).loss)
    assert torch.equal(*losses)
    with pytest.raises(trimtab.CheckpointError, match="computed with autocast bfloat16, and it is off now"), quiet():
        visit(model, adapter, cache, batch)


def test_what_a_cross_attention_adds_to_all_keys_is_looked_at_once(tmp_path: Path) -> None:
    """T5 hands its blocks one tensor of zeros, large as their scores; another kind of bias is refused."""
    from trimtab.nn import probabilities

    seen: list[str] = []

    class Bias(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    bias = torch.zeros(1, 2, 3, 3).as_subclass(Bias)
    for j in range(3):
        assert constants({"position_bias": bias, "dropout": 0.0}, j) == {"dropout": 0.0}
    assert probabilities.is_even(bias) and seen.count("all") == 1
    with pytest.raises(trimtab.ConfigError, match="decoder block 1 is called with position_bias"):
        constants({"position_bias": torch.eye(3)[None, None]}, 1)


def test_a_decoder_without_its_encoders_network(tmp_path: Path) -> None:
    """joiner="none" reads the decoder's hidden states alone; the encoder then runs on."""
    model, adapter = with_read("t5", joiner="none")
    cache = open_cache(adapter, tmp_path)
    batch = collate(examples("t5"), more=1)
    first = visit(model, adapter, cache, batch)
    with counting(inside_blocks(adapter)) as calls, counting([model.encoder.block[0]]) as encoder:
        assert_same(visit(model, adapter, cache, batch), first)
    assert not calls and encoder and cache.bytes_per_token == 2 * 32 * 2


def test_the_model_is_left_as_it_was_after_errors_too(tmp_path: Path) -> None:
    model, adapter = with_read("t5")
    batch = collate(examples("t5"))
    cache = open_cache(adapter, tmp_path)
    plain = visit(model, adapter, None, batch)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    for _ in range(2):  # while hidden states are stored, and while they are read, when nothing in a block can fail
        for place in (model.decoder.block[1], model.decoder.block[1].layer[2], model.lm_head):
            handle = place.register_forward_pre_hook(stop)
            if place is model.lm_head or len(cache) == 0:
                with pytest.raises(Stop):
                    visit(model, adapter, cache, batch)
            handle.remove()
            assert torch.is_grad_enabled()
            assert not any("forward" in m.__dict__ or "_compiled_call_impl" in m.__dict__ for m in model.modules())
            assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
            assert_same(visit(model, adapter, None, batch), plain)
        visit(model, adapter, cache, batch)
    assert_same(visit(model, adapter, None, batch), plain)


def test_two_calls_of_one_batch(tmp_path: Path) -> None:
    """The second call within a context reads what the first has stored."""
    model, adapter = with_read("llama")
    batch = collate(examples("llama"))
    cache = open_cache(adapter, tmp_path)
    with quiet(), cache.batch(batch):
        one = model(**batch).loss
        with counting(inside_blocks(adapter)) as calls:
            two = model(**batch).loss
    assert torch.equal(one, two) and not calls


def test_generation_beside_it(tmp_path: Path) -> None:
    """Outside of a batch the model is itself: it generates as before."""
    model, adapter = with_read("llama")
    model.eval()
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = model.generate(token_ids(), **settings)
    cache = open_cache(adapter, tmp_path)
    batch = collate(examples("llama"))
    for _ in range(2):
        visit(model, adapter, cache, batch)
    assert torch.equal(model.generate(token_ids(), **settings), before)


def test_in_transformers_trainer(tmp_path: Path) -> None:
    """As docs/hidden-cache.md has it: the blocks run in the first of three epochs alone."""
    pytest.importorskip("accelerate")
    import transformers

    model, adapter = with_read("llama")
    cache = open_cache(adapter, tmp_path / "cache")

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with quiet(), cache.batch(inputs):
                return super().compute_loss(model, inputs, *args, **kwargs)

    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, num_train_epochs=3, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=examples("llama"), data_collator=collate)
    with counting([model.model.layers[0].mlp]) as calls:
        trainer.train()
    assert len(calls) == 2 and len(cache) == 6
