"""Batches of examples: a pure function of (seed, step), and the same loss however they are laid out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints_for_tests import save_checkpoint, sentences
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab
from trimtab.methods import Method
from trimtab.tasks import Written
from trimtab.tasks.batches import ExampleBatches, LayCausal, PadHead, PadPairs, in_order, pack
from trimtab.tasks.encode import Encoded, Encoder
from trimtab.tasks.ragged import Ragged
from trimtab.train.objective import Objective


def encoded(lengths: list[int]) -> Encoded:
    """Sequences of counted tokens, all learned but their first."""
    ids = Ragged.of([list(range(1, length + 1)) for length in lengths])
    learned = Ragged(np.ones(len(ids.flat), dtype=bool), ids.starts)
    learned.flat[ids.starts[:-1]] = False
    return Encoded(ids, np.arange(len(lengths)), learned=learned)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=24), st.integers(2, 120))
def test_packing_lays_each_sequence_once_and_never_takes_more_room(lengths: list[int], limit: int) -> None:
    bins, width = pack(lengths, limit)
    assert sorted(n for members in bins for n in members) == list(range(len(lengths)))
    assert max(sum(lengths[n] for n in members) for members in bins) == width <= max(limit, max(lengths))
    assert len(bins) * width <= len(lengths) * max(lengths)


def test_packing_fills_rows_that_can_be_filled() -> None:
    """Three rows of ten hold 10, 6 + 4, 5 + 5 with nothing to spare."""
    bins, width = pack([5, 10, 4, 5, 6], 10)
    assert (len(bins), width) == (3, 10)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_each_example_once_and_the_next_another_order(grouped: bool) -> None:
    data = encoded([2 + n % 17 for n in range(103)])
    batches = ExampleBatches(data, LayCausal(0, 64, False), 8, 3, grouped=grouped)
    again = ExampleBatches(data, LayCausal(0, 64, False), 8, 3, grouped=grouped)

    def rows(batches: ExampleBatches, step: int) -> list[int]:
        return batches.batch(step).rows.tolist()

    epochs = [[rows(batches, epoch * 13 + step) for step in range(13)] for epoch in (0, 1)]
    assert batches.per_epoch == 13
    for epoch in epochs:
        assert sorted(n for batch in epoch for n in batch) == list(range(103))
        assert sorted(len(batch) for batch in epoch) == [7] + [8] * 12
    assert epochs[0] != epochs[1]
    assert [rows(again, step) for step in (20, 3)] == [rows(batches, step) for step in (20, 3)]
    assert ExampleBatches(data, LayCausal(0, 64, False), 8, 4).batch(0).rows.tolist() != epochs[0][0]


@pytest.mark.parametrize("grouped", [False, True])
def test_tokens_are_counted_without_padding(grouped: bool) -> None:
    data = encoded([2 + n % 17 for n in range(30)])
    batches = ExampleBatches(data, LayCausal(0, 64, False), 4, 0, grouped=grouped)
    done = 0
    for step in range(2 * batches.per_epoch + 3):
        assert batches.tokens(step) == done
        done += batches.batch(step).tokens
        assert batches.batch(step).tokens == sum(part.tokens for part in batches.batch(step).split(3))


def test_grouping_and_packing_leave_little_padding() -> None:
    data = encoded([2 + 37 * n % 61 for n in range(400)])
    shares = {
        name: ExampleBatches(data, LayCausal(0, 128, packing), 8, 0, grouped=grouped).padding()
        for name, packing, grouped in (("neither", False, False), ("grouped", False, True), ("packed", True, False))
    }
    assert shares["neither"] > 0.3
    assert shares["grouped"] < 0.05
    assert shares["packed"] < 0.1


def test_every_example_is_scored_once_in_order() -> None:
    data = encoded([2 + n % 5 for n in range(23)])
    rows = [row for _, rows in in_order(data, LayCausal(0, 64, True), 4) for row in rows]
    assert sorted(rows) == list(range(23))


# -- the same loss and gradient, however they are laid out ---------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("packed"), "llama")


METHODS: list[Method] = [
    trimtab.Full(),
    trimtab.LoRA(rank=4),
    trimtab.VeRA(rank=8),
    trimtab.Bottleneck(size=4),
    trimtab.IA3(),
    trimtab.PrefixTuning(length=3),
    trimtab.PromptTuning(length=3),
    trimtab.READ(size=8),
    trimtab.Ladder(reduction=4),
]


def gradient(folder: Path, method: Method, packing: bool, micro: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of a batch and its gradient, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    adapter = trimtab.attach(model, method)
    drawn = torch.Generator().manual_seed(0)
    for entry in adapter.trainable():  # away from the start, at which most of it has no effect
        with torch.no_grad():
            entry.parameter.add_(0.05 * torch.randn(entry.parameter.shape, generator=drawn).to(entry.parameter))
    texts = sentences(9, seed=5)
    examples = [Written(text, (" ".join(reversed(text.split())),)) for text in texts]
    data = Encoder(tokenizer, "causal", 160)(examples, "train")
    batch = ExampleBatches(data, LayCausal(tokenizer.pad_token_id, 160, packing), 9, 0).batch(0)
    objective = Objective(model, chunked=False)
    total = 0.0
    for part in batch.split(micro):
        loss = objective(part) / batch.n_valid
        loss.backward()
        total += float(loss.detach())
        shared = part.input_ids.shape[0] < len(part)
        assert shared == (packing and len(part) > 1), "the packed side packs, the other does not"
    found = {e.name: e.parameter.grad.double() for e in adapter.trainable() if e.parameter.grad is not None}
    return total, found


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_packed_examples_learn_what_padded_ones_learn(method: Method, llama: Path) -> None:
    """No example sees another, and no token is scored twice: loss and gradient are those of one at a time."""
    loss, grads = gradient(llama, method, packing=True, micro=9)
    alone, wanted = gradient(llama, method, packing=False, micro=1)
    assert loss == pytest.approx(alone, rel=1e-6)  # the loss is in fp32
    assert grads.keys() == wanted.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def test_without_isolation_the_loss_would_be_another_one(llama: Path) -> None:
    """A control: the same rows without mask and positions, so that the test above can fail."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    data = Encoder(tokenizer, "causal", 160)([Written(text, (text,)) for text in sentences(4)], "train")
    part = LayCausal(tokenizer.pad_token_id, 160, True)(data, [0, 1, 2, 3])
    objective = Objective(model, chunked=False)
    with torch.no_grad():
        isolated = float(objective(part))
        part = LayCausal(tokenizer.pad_token_id, 160, True)(data, [0, 1, 2, 3])
        object.__setattr__(part, "attention_mask", None)
        object.__setattr__(part, "position_ids", None)
        assert abs(float(objective(part)) - isolated) > 1e-4 * isolated


# -- tensors ---------------------------------------------------------------------------------------


def heads() -> Iterator[Encoded]:
    for types in (None, Ragged.of([[0, 0, 1], [0, 1]], np.int8)):
        yield Encoded(Ragged.of([[5, 6, 7], [8, 9]]), np.arange(2), types=types, labels=np.asarray([1.0, 0.0]))


def test_a_head_gets_padding_that_its_mask_hides() -> None:
    for data in heads():
        part = PadHead(0)(data, [1, 0])
        assert part.input_ids.tolist() == [[8, 9, 0], [5, 6, 7]]
        assert part.attention_mask is not None
        assert part.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
        assert part.labels.tolist() == [0.0, 1.0]
        assert (part.tokens, part.positions, part.n_valid, len(part)) == (5, 6, 2, 2)
        if data.types is not None:
            assert part.token_type_ids is not None
            assert part.token_type_ids.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_decoder_reads_its_targets_shifted_as_transformers_does(tmp_path: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(save_checkpoint(tmp_path, "t5"))
    data = Encoded(Ragged.of([[5, 6, 7], [8, 9]]), np.arange(2), targets=Ragged.of([[11, 1], [12, 13, 1]]))
    part = PadPairs(model.config.pad_token_id, model.config.decoder_start_token_id)(data, [0, 1])
    assert part.decoder_input_ids is not None
    assert torch.equal(part.decoder_input_ids, model.prepare_decoder_input_ids_from_labels(part.labels))
    assert (part.tokens, part.n_valid) == (10, 5)
    own = model(input_ids=part.input_ids, attention_mask=part.attention_mask, labels=part.labels).loss
    torch.testing.assert_close(Objective(model)(part) / part.n_valid, own)
