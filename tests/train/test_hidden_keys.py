"""Cached hidden states: which examples are the same, and which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hidden_parts import collate, examples
from torch import Tensor

import trimtab
from trimtab.train.hidden.examples import Tokens, examples_of

Batch = dict[str, Any]


def keys(batch: Batch, *sides: Any) -> list[str]:
    return examples_of(batch, sides or ("only",)).keys


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


BASE: Batch = {"input_ids": ids([5, 6, 7, 0], [8, 9, 0, 0]), "attention_mask": ids([1, 1, 1, 0], [1, 1, 0, 0])}


def test_padding_on_the_right_order_and_company_are_no_part_of_an_example() -> None:
    one, two = keys(BASE)
    assert one != two and keys(BASE) == [one, two]
    longer = {"input_ids": ids([8, 9, 4, 4, 4]), "attention_mask": ids([1, 1, 0, 0, 0])}
    assert keys(longer) == [two]
    assert keys({name: value.flip(0) for name, value in BASE.items()}) == [two, one]
    short = {"input_ids": ids([8, 9]), "attention_mask": ids([1, 1])}
    assert keys(short) == [two]


SAME: dict[str, Batch] = {
    "labels": {"labels": ids([1], [2])},
    "words that only name outputs": {"return_dict": True, "use_cache": False, "output_hidden_states": True},
    "nothing": {"position_ids": None},
    "the number of labels": {"num_items_in_batch": torch.tensor(7)},
    "what is under the padding": {"input_ids": ids([5, 6, 7, 3], [8, 9, 3, 3])},
}
OTHER: dict[str, Batch] = {
    "tokens": {"input_ids": ids([5, 6, 8, 0], [9, 9, 0, 0])},
    "a shorter mask": {"attention_mask": ids([1, 1, 0, 0], [1, 0, 0, 0])},
    "a hole in the mask": {"attention_mask": ids([1, 0, 1, 0], [0, 1, 0, 0])},
    "a mask that tells sequences apart": {"attention_mask": ids([1, 1, 2, 0], [2, 2, 0, 0])},
    "types": {"token_type_ids": ids([0, 0, 1, 0], [0, 1, 0, 0])},
    "positions": {"position_ids": ids([0, 2, 1, 0], [1, 0, 0, 0])},
    "a dtype": {"input_ids": ids([5, 6, 7, 0], [8, 9, 0, 0]).int()},
    "another input": {"pixel_values": torch.ones(2, 3, 4, 4)},
    "a number": {"interpolate_pos_encoding": True},
    "a tensor for all rows": {"scale": torch.tensor(2.0)},
}


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_reach_the_blocks_is_left_out(change: str) -> None:
    assert keys(BASE | SAME[change]) == keys(BASE)


@pytest.mark.filterwarnings("ignore:cache.batch.*pixel_values is not known")
@pytest.mark.parametrize("change", OTHER)
def test_what_reaches_the_blocks_tells_examples_apart(change: str) -> None:
    """Each of the two rows differs."""
    assert not set(keys(BASE | OTHER[change])) & set(keys(BASE))


FOR_ALL: dict[str, tuple[Tensor, Tensor]] = {
    "a vector of a number for each layer, say": (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])),
    "a matrix of layers and heads, say": (torch.ones(3, 4), torch.ones(3, 4).triu()),
    "images, of which a row may have two": (
        torch.zeros(3, 3, 4, 4),
        torch.zeros(3, 3, 4, 4).index_fill(0, ids([2])[0], 1),
    ),
}


@pytest.mark.parametrize("kind", FOR_ALL)
def test_what_may_be_for_all_rows_is_part_of_each_key_and_a_warning_says_so(kind: str) -> None:
    """Also where it is as long as the batch, and the same in a row's own place."""
    base = {"input_ids": ids([5, 6], [7, 8], [9, 3])}
    one, other = FOR_ALL[kind]
    assert torch.equal(one[0], other[0])
    with pytest.warns(UserWarning, match="steer is not known to have a row for each example"):
        first = keys(base | {"steer": one})
    with pytest.warns(UserWarning, match="steer is not known"):
        assert not set(first) & set(keys(base | {"steer": other}))


def test_what_a_model_of_its_own_reads_tells_the_rows() -> None:
    """By whatever name, if nothing else does."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert keys({"x": x.flip(0)}) == keys({"x": x})[::-1]


def test_positions_on_several_axes() -> None:
    """(3, B, S), as in M-RoPE, are told row by row; where B is 3, too, they count for all rows."""
    tokens = ids([5, 6], [7, 8], [9, 3], [4, 4])
    places = torch.arange(24).view(3, 4, 2)
    changed = places.clone()
    changed[1, 2] += 1
    plain, moved = (keys({"input_ids": tokens, "position_ids": p}) for p in (places, changed))
    assert [a == b for a, b in zip(plain, moved, strict=True)] == [True, True, False, True]
    assert keys({"input_ids": tokens[1:3], "position_ids": places[:, 1:3]}) == plain[1:3]
    three = [keys({"input_ids": tokens[:3], "position_ids": p[:, :3]}) for p in (places, changed)]
    assert not set(three[0]) & set(three[1])


def test_positions_for_all_rows_do_not_say_where_a_rows_tokens_are() -> None:
    """Tokens on the right stand at other positions of (1, S) than the same ones on the left; so with other tensors."""
    for shared in ({"position_ids": ids([0, 1, 2, 3])}, {"token_type_ids": ids([0, 0, 1, 1])}):
        found = []
        for mask, places in (
            (ids([0, 0, 1, 1], [1, 1, 1, 1]), [0, 0, 0, 1]),
            (ids([1, 1, 0, 0], [1, 1, 1, 1]), [0, 1, 0, 0]),
        ):
            tokens = torch.where(mask == 1, 5, 0)
            given = {"position_ids": ids(places, [0, 1, 2, 3])}
            found.append(keys({"input_ids": tokens, "attention_mask": mask, **given, **shared}))
        assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_padding_on_the_left_needs_positions() -> None:
    """A model counts positions from the row's beginning, unless they are given."""
    left = {"input_ids": ids([0, 0, 5, 6, 7]), "attention_mask": ids([0, 0, 1, 1, 1])}
    more = {"input_ids": ids([0, 0, 0, 5, 6, 7]), "attention_mask": ids([0, 0, 0, 1, 1, 1])}
    assert len({*keys(left), *keys(more), keys(BASE)[0]}) == 3
    placed = [
        batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)} for batch in (left, more, BASE)
    ]
    assert keys(placed[0])[0] == keys(placed[1])[0] == keys(placed[2])[0]


def test_without_a_mask_or_with_a_square_one_all_positions_count() -> None:
    plain = {"input_ids": BASE["input_ids"]}
    assert not set(keys(plain)) & set(keys(plain | {"input_ids": torch.nn.functional.pad(plain["input_ids"], (0, 1))}))
    square = torch.ones(2, 1, 4, 4)
    other = square.clone()
    other[:, :, 3, 0] = 0
    assert not set(keys(plain | {"attention_mask": square})) & set(keys(plain | {"attention_mask": other}))
    assert examples_of(plain | {"attention_mask": square}, ("only",)).tokens[0].mask is None


def test_a_pairs_labels_make_its_decoders_inputs() -> None:
    """They are part of the key there, up to the last one that counts; what follows it no token reads."""
    pair = ("encoder", "decoder")
    rows = examples("t5")
    short, padded = collate(rows[:2]), collate(rows[:2], more=3)
    assert keys(short, *pair) == keys(padded, *pair)
    told = examples_of(padded, pair)
    assert [tokens.counts(padded["input_ids"]) for tokens in told.tokens] == [[5, 6], [3, 4]]
    changed = short | {"labels": short["labels"].clone()}
    changed["labels"][0, 1] += 1
    assert keys(changed, *pair)[0] != keys(short, *pair)[0] and keys(changed, *pair)[1] == keys(short, *pair)[1]
    gap = short | {"labels": short["labels"].clone()}
    gap["labels"][:, 1] = -100
    assert examples_of(gap, pair).tokens[1].counts(gap["labels"]) == [3, 4]


def test_where_a_decoders_inputs_are_given_labels_tell_its_padding_alone() -> None:
    pair = ("encoder", "decoder")
    rows = examples("t5")
    short, padded = collate(rows[:2]), collate(rows[:2], more=3)
    given = short | {"decoder_input_ids": short["labels"].clamp(min=0)}
    more = padded | {"decoder_input_ids": padded["labels"].clamp(min=0)}
    other = given | {"labels": torch.where(given["labels"] < 0, -100, 9)}
    assert keys(given, *pair) == keys(more, *pair) == keys(other, *pair)
    assert not set(keys(given, *pair)) & set(keys(short, *pair))
    examples_of(given, pair).check_call({k: v for k, v in given.items() if k != "labels"}, pair=True)
    plain = {k: v for k, v in given.items() if k != "labels"}
    assert examples_of(plain, pair).tokens[1].mask is None
    masked = plain | {"decoder_attention_mask": ids([1, 1, 0, 0], [1, 0, 0, 0])}
    assert examples_of(masked, pair).tokens[1].counts(masked["decoder_input_ids"]) == [2, 1]


def test_a_decoder_fed_with_the_encoders_inputs_sees_their_padding() -> None:
    """A BART that classifies makes its decoder's inputs of all that the encoder reads."""
    pair = ("encoder", "decoder")
    padded = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in BASE.items()}
    assert not set(keys(BASE, *pair)) & set(keys(padded, *pair))


def test_gathering_and_spreading() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    mask = BASE["attention_mask"] != 0
    tokens = Tokens(mask)
    assert torch.equal(tokens.gather(x, "x"), x[mask])
    assert torch.equal(tokens.spread(x[mask], 2), x * mask[:, :, None])
    whole = Tokens(None)
    assert torch.equal(whole.spread(whole.gather(x, "x"), 2), x)
    none = Tokens(torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(none.spread(none.gather(x, "x"), 2), torch.zeros(2, 4, 3))
    with pytest.raises(trimtab.ConfigError, match="x has 5 positions, and the batch's mask tells of 4"):
        tokens.gather(torch.zeros(2, 5, 3), "x")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "no tensor with a row for each example"),
        ({"labels": ids([1])}, "no tensor with a row for each example"),
        (BASE | {"hook": print}, "hook: a builtin_function_or_method cannot be told"),
        (BASE | {"past_key_values": object()}, "past_key_values: hidden states are kept for whole inputs"),
        (BASE | {"encoder_outputs": (torch.ones(2, 4, 3),)}, "encoder_outputs: hidden states are kept for whole"),
    ],
)
def test_batches_that_cannot_be_told_are_refused(batch: Batch, message: str) -> None:
    with pytest.raises(trimtab.ConfigError, match=message):
        keys(batch)
