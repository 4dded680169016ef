import functools

import numpy as np
import pytest
from data_for_tests import KINDS, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import trimtab.data.encode as encode
from trimtab.data.encode import Encoder, bytes_covered
from trimtab.errors import DataError

ODD = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("é😀日ﬁ①  \n\t\u200d\u0301\ufeff\x00ẞİ </s>[EOS]<|endoftext|>"),
    ),
    max_size=60,
)
SPELLED = {"byte_bpe": "<|endoftext|>", "sentencepiece": "</s>", "unigram": "</s>", "wordpiece": "[EOS]"}


@functools.cache
def encoder(kind: str) -> Encoder:
    tokenizer = KINDS[kind]()
    return Encoder(tokenizer.to_json(), tokenizer.eos_id, "uint16")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=ODD)
def test_bytes_of_tokens_add_up_to_the_text(kind: str, text: str) -> None:
    """Over odd Unicode and every kind of tokenizer, byte lengths sum to the UTF-8 size of the text."""
    ids, widths = encoder(kind).tokens(text)
    assert len(ids) == len(widths)
    assert int(widths.sum()) == (len(text.encode()) if len(ids) else 0)
    assert encoder(kind).eos_id not in ids


@settings(max_examples=150, deadline=None)
@given(text=ODD)
def test_a_byte_level_tokenizer_loses_nothing(text: str) -> None:
    """Decoding gives the text back, whatever it holds, and each prefix of bytes ends on a whole character."""
    ids, widths = encoder("byte_bpe").tokens(text)
    assert encoder("byte_bpe")._tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    data = text.encode()
    for end in np.cumsum(widths):
        data[:end].decode()  # raises inside a character


def test_a_split_character_counts_for_the_token_that_completes_it() -> None:
    """Four byte tokens of one emoji: the last one covers its four bytes."""
    ids, widths = encoder("sentencepiece").tokens("a😀b")
    names = [encoder("sentencepiece")._tokenizer.id_to_token(int(i)) for i in ids]
    emoji = names.index("<0xF0>")
    assert names[emoji : emoji + 4] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert widths[emoji : emoji + 4].tolist() == [0, 0, 0, 4]


def test_dropped_characters_count_for_the_next_token() -> None:
    """WordPiece keeps no white space: it counts for the word after it, and at the end for the last word."""
    _, widths = encoder("wordpiece").tokens("the  ship \n")
    assert widths.sum() == 11
    assert widths[0] <= 3
    assert encoder("wordpiece").tokens(" \n ")[0].size == 0


def test_borders_by_hand() -> None:
    """Overlapping, empty and missing spans, worked out by hand for "aé😀" (1, 2 and 4 bytes)."""
    spans = np.array([[0, 2], [1, 2], [0, 0], [2, 3]])
    assert bytes_covered("aé😀", spans).tolist() == [1, 2, 0, 4]
    assert bytes_covered("aé😀", np.array([[1, 2]])).tolist() == [7]


@pytest.mark.parametrize("kind", KINDS)
def test_spelling_out_a_special_token_makes_none(kind: str) -> None:
    """The end-of-text token's name in a text stays text, in both ways of encoding, once or in a row."""
    for sample in (f"a {SPELLED[kind]} b", SPELLED[kind] * 3, SPELLED[kind]):
        ids, widths = encoder(kind).tokens(sample)
        (fast,) = encoder(kind).many([sample])
        assert ids.tolist() == fast.tolist()
        assert encoder(kind).eos_id not in ids
        assert len(ids) > 0
        assert widths.sum() == len(sample)


def test_a_text_that_must_become_end_of_text_is_an_error() -> None:
    """A tokenizer whose end-of-text token is one plain character cannot keep documents apart."""
    inner = Tokenizer(models.WordLevel({"a": 0, "§": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(DataError, match="'§' into its end-of-text token"):
        Encoder(inner.to_str(), 1, "uint16").tokens("a § a")


@pytest.mark.parametrize("kind", KINDS)
def test_fast_and_exact_encoding_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training documents (fast) and validation documents (with bytes) get the same tokens, also when cut in pieces."""
    texts = [text(i, words) for i, words in enumerate((1, 40, 300, 5, 900, 2))]
    for piece in (1 << 20, 256):
        monkeypatch.setattr(encode, "PIECE", piece)
        fast = [ids.tolist() for ids in encoder(kind).many(texts)]
        assert fast == [encoder(kind).tokens(t)[0].tolist() for t in texts]


def test_long_documents_are_cut_at_lines_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are bounded, join to the text, and begin at a line or a space where there is one."""
    monkeypatch.setattr(encode, "PIECE", 100)
    for sample in (text(1, 400), "x" * 1000, "\n" * 350, "word " * 200):
        pieces = list(encode._pieces(sample))
        assert all(0 < b - a <= 100 for a, b in pieces)
        assert [a for a, _ in pieces][1:] == [b for _, b in pieces][:-1]
        assert "".join(sample[a:b] for a, b in pieces) == sample
        ids, widths = encoder("byte_bpe").tokens(sample)
        assert encoder("byte_bpe")._tokenizer.decode(ids.tolist()) == sample
        assert widths.sum() == len(sample.encode())
    assert all(("word " * 200)[a] == " " for a, _ in list(encode._pieces("word " * 200))[1:])
    assert all(("a line\n" * 90)[a] == "a" for a, _ in encode._pieces("a line\n" * 90))
