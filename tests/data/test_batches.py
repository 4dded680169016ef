import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.data.batches import Batch, TrainBatches, validation_batches
from trimtab.data.store import Split

EOS = 0


def split(n: int, documents_of: int = 7, byte_lengths: bool = True) -> Split:
    """Tokens 1, 2, 3, ... with an end-of-text token at every `documents_of`-th place; token t covers t % 5 bytes."""
    tokens = np.arange(1, n + 1, dtype=np.uint16)
    tokens[documents_of - 1 :: documents_of] = EOS
    widths = np.where(tokens == EOS, 0, tokens % 5).astype(np.uint32)
    return Split(tokens, widths if byte_lengths else None, documents=n // documents_of, text_bytes=int(widths.sum()))


def test_labels_are_the_inputs_one_later() -> None:
    """labels[t] follows input_ids[t] in the text, also at the end of a sequence."""
    part = split(1000)
    batch = TrainBatches(part, 16, 4, 1, eos_id=EOS).batch(3)
    assert batch.input_ids.shape == batch.labels.shape == (4, 16)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert batch.n_valid == 64
    text = part.tokens.astype(np.int64).tolist()
    for ids, label in zip(batch.input_ids.tolist(), batch.labels[:, -1].tolist(), strict=True):
        start = next(i for i in range(0, 1000, 16) if text[i : i + 16] == ids)
        assert text[start + 16] == label


def test_an_epoch_scores_every_token_but_the_first_once() -> None:
    """All labels of one epoch together are the whole text but its first token, each once."""
    part = Split(np.arange(16 * 30 + 1, dtype=np.uint32), None, 1, 1)
    batches = TrainBatches(part, 16, 5, 9, eos_id=10**6)
    labels = torch.cat([batches.batch(step).labels.reshape(-1) for step in range(6)])
    assert batches.epoch(6) == 1.0
    assert torch.equal(labels.sort().values, torch.arange(1, 16 * 30 + 1))


def test_ranks_slice_the_same_global_batch() -> None:
    """The slices of 1, 2 and 4 ranks, put together, are one and the same batch."""
    part = split(1000)
    whole = TrainBatches(part, 8, 8, 3, eos_id=EOS, document_mask=True)
    for world in (2, 4):
        ranks = [TrainBatches(part, 8, 8, 3, rank=r, world=world, eos_id=EOS, document_mask=True) for r in range(world)]
        for step in (0, 11, 40):
            slices = [b.batch(step) for b in ranks]
            for name in ("input_ids", "labels", "position_ids", "attention_mask"):
                assert torch.equal(torch.cat([getattr(s, name) for s in slices]), getattr(whole.batch(step), name))
            assert sum(s.n_valid for s in slices) == whole.batch(step).n_valid


def test_a_batch_across_the_end_of_an_epoch_takes_from_both() -> None:
    """With 7 samples and 3 a step, steps 0 ... 6 see each sample exactly three times, epoch by epoch."""
    part = Split(np.arange(7 * 4 + 1, dtype=np.uint16), None, 1, 1)
    batches = TrainBatches(part, 4, 3, 0, eos_id=60000)
    seen = torch.cat([batches.batch(step).input_ids[:, 0] // 4 for step in range(7)]).reshape(3, 7)
    assert torch.equal(seen.sort(dim=1).values, torch.arange(7).repeat(3, 1))
    assert not torch.equal(seen[0], seen[1])
    assert batches.epoch(7) == 3.0
    assert [batches.distinct(steps) for steps in range(5)] == [0, 3, 6, 7, 7]


def test_a_step_is_a_pure_function() -> None:
    """A fresh object asked for one late step alone gives what one that walked there gives."""
    part = split(3000)
    walked = TrainBatches(part, 8, 4, 5, eos_id=EOS)
    for step in range(200):
        last = walked.batch(step)
    assert torch.equal(last.input_ids, TrainBatches(part, 8, 4, 5, eos_id=EOS).batch(199).input_ids)
    assert not torch.equal(last.input_ids, TrainBatches(part, 8, 4, 6, eos_id=EOS).batch(199).input_ids)


def test_sequences_that_ranks_cannot_share_are_an_error() -> None:
    """The message names both numbers; a rank out of range and a text shorter than one sequence are errors, too."""
    with pytest.raises(ValueError, match=r"sequences=6 .* world=4"):
        TrainBatches(split(1000), 8, 6, 0, world=4, eos_id=EOS)
    with pytest.raises(ValueError, match="rank=2"):
        TrainBatches(split(1000), 8, 6, 0, rank=2, world=2, eos_id=EOS)
    with pytest.raises(ValueError, match="seq_len=8"):
        TrainBatches(split(8), 8, 6, 0, eos_id=EOS)


def test_micro_batches_are_the_batch() -> None:
    """Splitting and joining gives the batch back; valid counts add up; a remainder is kept."""
    batch = TrainBatches(split(1000), 8, 7, 0, eos_id=EOS, document_mask=True).batch(2)
    micro = list(batch.split(3))
    assert [len(m) for m in micro] == [3, 3, 1]
    assert torch.equal(torch.cat([m.labels for m in micro]), batch.labels)
    assert torch.equal(torch.cat([m.attention_mask for m in micro]), batch.attention_mask)
    assert [m.n_valid for m in micro] == [int((m.labels != -100).sum()) for m in micro]
    assert batch.to("cpu").n_valid == batch.n_valid
    with pytest.raises(ValueError, match="micro-batch"):
        next(batch.split(0))


def test_document_mask_by_hand() -> None:
    """Two documents and the start of a third: who sees whom, positions and labels, worked out by hand."""
    part = Split(np.array([5, 6, EOS, 7, EOS, 8, 9], dtype=np.uint16), None, 2, 1)
    batch = TrainBatches(part, 6, 1, 0, eos_id=EOS, document_mask=True).batch(0)
    assert batch.position_ids is not None
    assert batch.attention_mask is not None
    assert batch.input_ids.tolist() == [[5, 6, 0, 7, 0, 8]]
    assert batch.labels.tolist() == [[6, 0, -100, 0, -100, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.n_valid == 4
    assert batch.attention_mask.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [0, 0, 0, 1, 0, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 0, 0, 1],
            ]
        ]
    ]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(shape).eval()


def logits(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits


def masked_batch(tokens: list[int], document_mask: bool) -> Batch:
    part = Split(np.array(tokens, dtype=np.uint16), None, 1, 1)
    return TrainBatches(part, len(tokens) - 1, 1, 0, eos_id=EOS, document_mask=document_mask).batch(0)


@pytest.mark.parametrize("changed", [slice(0, 4), slice(5, 9), slice(10, 14)])
def test_perturbing_a_packed_document_leaves_its_neighbours_alone(changed: slice) -> None:
    """Logits outside the changed document stay bit-equal with the mask; without it later ones move."""
    model = tiny_llama()
    tokens = [3, 4, 5, 6, EOS, 7, 8, 9, 10, EOS, 11, 12, 13, 14, EOS, 1]
    other = list(tokens)
    other[changed] = [t + 20 for t in tokens[changed]]
    outside = torch.ones(len(tokens) - 1, dtype=torch.bool)
    outside[changed.start : changed.stop + 1] = False  # the end-of-text token belongs to its document
    before, after = (logits(model, masked_batch(t, True))[0] for t in (tokens, other))
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])
    before, after = (logits(model, masked_batch(t, False))[0] for t in (tokens, other))
    assert torch.equal(before[outside], after[outside]) == (changed.start == 10)


def test_a_packed_document_is_read_as_if_alone() -> None:
    """With restarted positions and the mask, a document in the middle has the logits it has alone."""
    model = tiny_llama()
    packed = logits(model, masked_batch([3, 4, EOS, 7, 8, 9, EOS, 5, 6], True))[0, 3:7]
    alone = logits(model, masked_batch([7, 8, 9, EOS, 1], False))[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("wanted", [1, 15, 16, 17, 100, 203, 10**6])
def test_validation_scores_exactly_what_is_asked(wanted: int, document_mask: bool) -> None:
    """The first `wanted` tokens that can be scored are scored, each once, in order, with exactly their bytes."""
    part = split(205)
    assert part.byte_lengths is not None
    can = np.arange(1, 205)
    if document_mask:
        can = can[part.tokens[can - 1] != EOS]
    expected = can[:wanted]
    labels: list[int] = []
    size = count = 0
    for batch, covered in validation_batches(part, 16, wanted, 3, document_mask=document_mask, eos_id=EOS):
        assert batch.input_ids.shape[1] == 16
        assert (batch.attention_mask is None) == (not document_mask)
        labels += batch.labels[batch.labels != -100].tolist()
        size += covered
        count += batch.n_valid
    assert labels == part.tokens[expected].tolist()
    assert count == len(expected)
    assert size == int(part.byte_lengths[expected].sum())


def test_validation_needs_byte_lengths() -> None:
    """The training part, which has none, is refused with a message."""
    with pytest.raises(ValueError, match="byte lengths"):
        next(validation_batches(split(100, byte_lengths=False), 16, 10, 2, eos_id=EOS))
