"""Examples as tokens: what a model reads, what is learned, what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints_for_tests import save_checkpoint, sentences

from trimtab.errors import DataError
from trimtab.tasks import Chat, Labelled, Message, Plain, Written
from trimtab.tasks.encode import Encoder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_checkpoint(tmp_path_factory.mktemp("encode"), "llama")
    return transformers.AutoTokenizer.from_pretrained(folder)


def bert_like() -> Any:
    """A tokenizer that puts tokens around a text and between two, and numbers the two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def test_labelled_texts_are_as_the_tokenizer_makes_them() -> None:
    tokenizer = bert_like()
    pairs = [("a b c d e", "f g"), ("a", "b c d e f g h"), ("a b", None)]
    data = Encoder(tokenizer, "head", 8)([Labelled(a, b, 1.0) for a, b in pairs], "train")
    for n, (a, b) in enumerate(pairs):
        own = tokenizer(a, b, truncation=True, max_length=8)
        assert data.ids[n].tolist() == own["input_ids"]
        assert data.types is not None
        assert data.types[n].tolist() == own["token_type_ids"]
    assert data.notes == ["2 of 3 texts are longer than data.seq_len = 8 and are cut."]
    assert data.due.tolist() == [1, 1, 1]


def test_what_is_too_long_is_skipped_or_refused_when_asked() -> None:
    examples = [Labelled("a b c d e f g h", None, 0.0), Labelled("a", None, 1.0)]
    data = Encoder(bert_like(), "head", 5, "skip")(examples, "train")
    assert (data.source.tolist(), data.labels.tolist() if data.labels is not None else None) == ([1], [1.0])
    assert "1 of 2 texts are longer than data.seq_len = 5 and are left out." in data.notes
    with pytest.raises(DataError, match=r"^split 'train': example 1 is longer than data\.seq_len = 5.*data\.too_long"):
        Encoder(bert_like(), "head", 5, "error")(examples, "train")
    with pytest.raises(DataError, match=r"^split 'test': example 2 \(a\.csv:7\) and 2 others are longer"):
        Encoder(bert_like(), "head", 5, "error")([examples[1], *examples[:1] * 3], "test", ["", "a.csv:7", "", ""])
    with pytest.raises(DataError, match="nothing is left"):
        Encoder(bert_like(), "head", 5, "skip")(examples[:1], "train")


@pytest.mark.parametrize(
    ("seq_len", "kept"), [(2, []), (3, [0, 1, 2]), (4, [0, 1, 2]), (5, [0, 1, 2, 3])], ids=lambda value: str(value)
)
def test_a_text_of_which_nothing_would_be_left_is_left_out(seq_len: int, kept: list[int]) -> None:
    """Special tokens alone say nothing; a tokenizer cuts nothing where there is no room for these."""
    texts = [("a b c d", None), ("a", None), ("b", None), ("a b c", "d e f")]
    examples = [Labelled(text, pair, float(n)) for n, (text, pair) in enumerate(texts)]
    if not kept:
        with pytest.raises(DataError, match=r"nothing is left of its 4 examples: .* 4 of 4 texts have no word within"):
            Encoder(bert_like(), "head", seq_len)(examples, "train")
        return
    data = Encoder(bert_like(), "head", seq_len)(examples, "train")
    assert data.source.tolist() == kept and (data.ids.lengths <= seq_len).all()
    left_out = "1 of 4 texts have no word within data.seq_len and are left out."
    assert (left_out in data.notes) == (len(kept) < 4)


def test_the_answer_and_its_end_are_learned_and_nothing_else(words: Any) -> None:
    texts = sentences(5)
    data = Encoder(words, "causal", 200)([Written(text, (text[::-1], "never")) for text in texts], "train")
    for n, text in enumerate(texts):
        ids, learned = data.ids[n], data.learned[n]  # type: ignore[index]
        assert words.decode(ids) == f"{text}\n{text[::-1]}{words.eos_token}"
        assert words.decode(ids[learned]) == f"{text[::-1]}{words.eos_token}"
        assert data.due[n] == learned.sum()


def test_a_prompt_is_what_stands_before_the_answer_in_training(words: Any) -> None:
    examples = [Written(text, (" x",)) for text in sentences(3)]
    encoder = Encoder(words, "causal", 200)
    data = encoder(examples, "train")
    for n, prompt in enumerate(encoder.prompts(examples)):
        assert data.ids[n][: len(prompt)].tolist() == prompt
        assert not data.learned[n][: len(prompt)].any()  # type: ignore[index]


def test_of_a_long_example_the_answer_and_the_end_of_the_source_stay(words: Any) -> None:
    long = " ".join(sentences(4))
    data = Encoder(words, "causal", 20)([Written(f"{long} Label:", ("cold",)), Written("the cat", ("y",))], "train")
    assert data.notes == ["1 of 2 examples are longer than data.seq_len = 20 and are cut."]
    ids, learned = data.ids[0], data.learned[0]  # type: ignore[index]
    assert len(ids) == 20
    assert words.decode(ids[learned]) == f"cold{words.eos_token}"
    assert words.decode(ids[~learned]).endswith(" Label:\n")
    asked = Encoder(words, "causal", 20).prompts([Written(f"{long} Label:", ("cold",))], 20 - int(learned.sum()))
    assert asked[0] == ids[~learned].tolist()


def test_a_chat_whose_answer_is_cut_away_leaves_nothing_to_learn(words: Any) -> None:
    long, short = " ".join(sentences(4)), "the cat"
    chats = [Chat((Message("user", text), Message("assistant", "y"))) for text in (long, short)]
    data = Encoder(words, "causal", 60)(chats, "train")
    assert data.source.tolist() == [1]
    assert data.notes[1] == "1 of 2 chats have no answer within data.seq_len and are left out."
    with pytest.raises(DataError, match="nothing is left of its 1 example:"):
        Encoder(words, "causal", 60)(chats[:1], "train")


def test_chats_are_learned_by_their_answers(words: Any) -> None:
    chat = Chat(
        (Message("user", "the cat"), Message("assistant", "the dog"), Message("user", "a"), Message("assistant", "b"))
    )
    data = Encoder(words, "causal", 200)([chat], "train")
    assert data.learned is not None
    assert "the dog" in words.decode(data.ids[0][data.learned[0]])
    assert "the cat" not in words.decode(data.ids[0][data.learned[0]])


def test_each_token_of_a_text_is_learned_but_the_first_of_a_piece(words: Any) -> None:
    text = " ".join(sentences(6))
    whole = Encoder(words, "causal", 1000)([Plain(text)], "train")
    pieces = Encoder(words, "causal", 16)([Plain(text), Plain("the cat sat")], "train")
    assert whole.notes == []
    assert words.decode(whole.ids[0]) == text + words.eos_token
    assert whole.due[0] == len(whole.ids[0]) - 1
    first_word = len(words.decode(whole.ids[0][:1]).encode())
    assert whole.text_bytes is not None
    assert whole.text_bytes[0] == len(text.encode()) - first_word
    own = [n for n in range(len(pieces)) if pieces.source[n] == 0]
    assert [token for n in own for token in pieces.ids[n].tolist()] == whole.ids[0].tolist()
    assert all(pieces.due[n] == len(pieces.ids[n]) - 1 for n in own)
    assert pieces.text_bytes is not None
    lost = sum(len(words.decode(pieces.ids[n][:1]).encode()) for n in own)
    assert sum(pieces.text_bytes[own]) == len(text.encode()) - lost
    assert "pieces more" in pieces.notes[0]


def test_a_decoder_writes_to_the_end(words: Any) -> None:
    """This tokenizer adds no end by itself, and a decoder that never learned to end would not."""
    data = Encoder(words, "pair", 12)(
        [Written("the cat", ("the dog",)), Written("a", (" ".join(sentences(3)),))], "train"
    )
    assert data.targets is not None
    assert words.decode(data.targets[0]) == f"the dog{words.eos_token}"
    assert len(data.targets[1]) == 12
    assert data.targets[1][-1] == words.eos_token_id
    assert data.due.tolist() == [len(data.targets[0]), 12]
