"""The tokens of chats: what is learned is the answers and what ends them, for templates of every kind."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from chats_for_tests import CHATML, LLAMA3, MARKED, MISTRAL, OPENED, PHI3, THOUGHTS, VICUNA, chat_tokenizer
from tokenizers import processors

from trimtab.errors import DataError
from trimtab.tasks import Message, chattokens
from trimtab.tasks.chattokens import encode_chat, encode_chats, encode_prompt, end_of_turn, plain_chat


def chat(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """A chat in which user and assistant take turns."""
    turns = [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    return ((Message("system", system),) if system is not None else ()) + tuple(turns)


ONE = chat("What is the capital of France?", "Paris.")
TWO = chat("What is the capital of France?", "Paris.", "And of Italy?", "Rome, naïve 😀 one.")
SYSTEM = chat("And of Italy?", "Rome", system="Be short.")
# Words of an answer that stand elsewhere, too; an answer that is nearly nothing; white space; a token written out.
ODD = chat("assistant", "assistant", "user user", "u", "a\n\nb\n", "\n c\n\nd", "x", "See <|im_start|> here")


def spoken(tokenizer: Any, ids: list[int], learned: list[bool]) -> list[str]:
    """The text of each run of learned tokens."""
    runs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for is_learned, run in runs if is_learned]


@pytest.mark.parametrize("skeletons", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("messages", [ONE, TWO, SYSTEM, ODD], ids=["one", "two", "system", "odd"])
@pytest.mark.parametrize(
    ("template", "before", "end"),
    [
        (CHATML, "", "<|im_end|>"),
        (LLAMA3, "", "<|eot_id|>"),
        (MISTRAL, " ", "</s>"),
        (PHI3, "", "<|end|>"),
        (MARKED, "", "<|im_end|>"),
        (VICUNA, "", "</s>"),
    ],
    ids=["chatml", "llama3", "mistral", "phi3", "marked", "vicuna"],
)
def test_the_answers_and_their_ends_are_learned_and_nothing_else(
    template: str,
    before: str,
    end: str,
    messages: tuple[Message, ...],
    skeletons: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ids are those of the rendered chat; the learned ones decode to each answer and its end-of-turn token."""
    if template == MISTRAL and messages is SYSTEM:
        pytest.skip("this template has no system prompt")
    if not skeletons:
        monkeypatch.setattr(chattokens, "_skeleton", lambda *_: None)
    tokenizer = chat_tokenizer(template)
    ids, learned = encode_chat(tokenizer, messages)
    turns = [message._asdict() for message in messages]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    trim = str.strip if template == LLAMA3 else str
    expected = [f"{before}{trim(m.content)}{end}" for m in messages if m.role == "assistant"]
    said = spoken(tokenizer, ids, learned)
    if template == VICUNA:  # the blank of the generation prompt is in the answer's first token, where they merge
        assert said[0].startswith(" ")
        said = [words.removeprefix(" ") for words in said]
    assert said == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, PHI3, VICUNA])
def test_one_rendering_is_enough_for_a_chat_of_known_roles(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The skeletons of templates of every kind hold: after the first chat, none goes the long way."""
    encoder = chattokens.ChatEncoder(chat_tokenizer(template))
    encoder.encode([TWO, ONE])
    monkeypatch.setattr(chattokens, "_spans", lambda *_: pytest.fail("the long way"))
    others = chat("a\n b ", " c. d\n", "e", "f" * 50)
    assert any(encoder.encode([others])[0][1])


def test_many_chats_are_encoded_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, skeletons and order change nothing."""
    monkeypatch.setattr(chattokens, "_AT_ONCE", 3)
    tokenizer = chat_tokenizer(CHATML)
    chats = [ONE, TWO, SYSTEM, ODD, ONE, SYSTEM, TWO]
    assert encode_chats(tokenizer, chats) == [encode_chat(tokenizer, c) for c in chats]
    assert encode_chats(tokenizer, []) == []
    with pytest.raises(DataError, match=r"^chat 5 of 5: the chat has no answer"):
        encode_chats(tokenizer, [*chats[:4], chat("Hi")])


def test_a_rendering_that_only_begins_like_its_skeleton_goes_the_long_way() -> None:
    """A template that writes something behind some chats alone."""
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% elif 'b' in messages[-1].content %}Bye"
                               "{% endif %}")  # fmt: skip
    for words, learned in (("a", "a\n"), ("b", "b\nBye")):
        (said,) = spoken(tokenizer, *encode_chat(tokenizer, chat("Hi", words)))
        assert said.removeprefix(" ") == learned


def test_a_truncation_that_somebody_set_cuts_nothing() -> None:
    """transformers leaves in the tokenizer what its last call asked for."""
    tokenizer = chat_tokenizer(CHATML, pad_token="</s>")
    whole = encode_chat(tokenizer, TWO)
    tokenizer(["a b c d e f", "g"], truncation=True, max_length=3, padding="max_length")
    assert encode_chats(tokenizer, [TWO, ONE])[0] == whole


def test_nothing_after_the_last_answer_is_learned() -> None:
    """A question that is left open is context and no more."""
    tokenizer = chat_tokenizer(CHATML)
    ids, learned = encode_chat(tokenizer, chat("Hi", "Hello.", "Who?"))
    assert spoken(tokenizer, ids, learned) == ["Hello.<|im_end|>"]
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nWho?<|im_end|>\n")


def test_a_token_that_is_not_special_ends_a_turn_where_no_other_does() -> None:
    """Tokenizers are about that added <|end_of_turn|> as a plain token."""
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>", "<|stop|>").replace("<|im_start|>", "# "))
    tokenizer.add_tokens(["<|stop|>"], special_tokens=False)
    ids, learned = encode_chat(tokenizer, TWO)
    assert spoken(tokenizer, ids, learned) == ["Paris.<|stop|>", "Rome, naïve 😀 one.<|stop|>"]


def test_a_template_without_end_tokens_ends_a_turn_with_its_text() -> None:
    """Then what is between two turns ends the first."""
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    ids, learned = encode_chat(tokenizer, TWO)
    assert spoken(tokenizer, ids, learned) == [" Paris.\n\n", " Rome, naïve 😀 one.\n\n"]


def test_an_edge_is_found_by_characters_and_not_by_tokens() -> None:
    """The prompt's last token and the answer's first merge: ids are the whole text's, and that token is learned."""
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    tokenizer = chat_tokenizer(template)
    assert len(tokenizer(" capital", add_special_tokens=False).input_ids) == 1
    ids, learned = encode_chat(tokenizer, chat("The cap", "ital"))
    assert ids == tokenizer("The capital</s>", add_special_tokens=False).input_ids
    assert spoken(tokenizer, ids, learned) == [" capital</s>"]


def test_offsets_that_leave_white_space_out_lose_nothing() -> None:
    """GPT-2's post-processor trims the blank from a token's place; the token is found all the same."""
    tokenizer = chat_tokenizer(MISTRAL)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    try:
        for messages in (chat("Hi", "  two blanks  "), chat("Hi", " ")):
            ids, learned = encode_chat(tokenizer, messages)
            assert spoken(tokenizer, ids, learned) == [f" {messages[1].content}</s>"]
    finally:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    """Its chats of one answer are fine, and those of several where it changes nothing."""
    tokenizer = chat_tokenizer(THOUGHTS)
    thought = "<think>\nhm\n</think>\n\nRome"
    ids, learned = encode_chat(tokenizer, chat("And of Italy?", thought))
    assert spoken(tokenizer, ids, learned) == [f"{thought}<|im_end|>"]
    assert any(encode_chat(tokenizer, TWO)[1])
    with pytest.raises(DataError, match=r"message 2: the chat template changes this answer.* drop earlier thoughts"):
        encode_chat(tokenizer, chat("And of Italy?", thought, "Sure?", "Yes"))
    with pytest.raises(DataError, match=r"chat 3 of 4: message 2: the chat template changes"):
        encode_chats(tokenizer, [ONE, TWO, chat("a", thought, "b", "c"), ONE])


def test_a_generation_prompt_that_no_answer_begins_with_is_refused() -> None:
    """What would be learned is not what the model is asked for."""
    with pytest.raises(DataError, match=r"message 2: the chat template's generation prompt .*<think>.* is not how"):
        encode_chat(chat_tokenizer(OPENED), ONE)


def test_chats_that_a_template_refuses_are_named() -> None:
    """The template's own words are kept; other chats of the group are not blamed."""
    tokenizer = chat_tokenizer(MISTRAL)
    with pytest.raises(DataError, match=r"^chat 2 of 3: the chat template refuses the chat: Roles must alternate"):
        encode_chats(tokenizer, [ONE, SYSTEM, TWO])
    unmarked = MARKED.replace("m.role == 'assistant'", "m.role == 'model'")
    with pytest.raises(DataError, match=r"marks are around none of the answers"):
        encode_chat(chat_tokenizer(unmarked), ONE)


@pytest.mark.parametrize(
    ("messages", "error"),
    [(chat("Hi"), "no answer of the assistant"), ((), "no answer"), (chat("Hi", "Ho")[1:], "begins with an answer")],
)
@pytest.mark.parametrize("template", [True, False])
def test_a_chat_needs_an_answer_and_something_that_is_answered(
    messages: tuple[Message, ...], error: str, template: bool
) -> None:
    with pytest.raises(DataError, match=error):
        encode_chat(chat_tokenizer(CHATML), messages, template=template)


def test_what_the_tokenizer_lacks_is_said() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        encode_chat(chat_tokenizer(None), ONE, template=True)
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_chat(chat_tokenizer(None, eos_token=None), ONE, template=False)
    named = chat_tokenizer(None)
    named.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(DataError, match="cannot be chosen"):
        encode_chat(named, ONE)
    with pytest.raises(DataError, match="no fast form"):
        encode_chat(object(), ONE)


def test_without_a_template_a_prompt_goes_on_with_its_answer() -> None:
    """The documented form; bos comes where the tokenizer puts it; a prompt of one's own form is kept to the letter."""
    tokenizer = chat_tokenizer(None)
    text = "Be short.\n\nAnd of Italy? Rome</s>"
    assert plain_chat(SYSTEM, "</s>") == text
    ids, learned = encode_chat(tokenizer, SYSTEM, template=False)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert spoken(tokenizer, ids, learned) == [" Rome</s>"]
    assert encode_chat(tokenizer, SYSTEM) == (ids, learned)
    assert plain_chat(chat("a", "b", "c", "d"), "</s>") == "a b</s>c d</s>"
    assert plain_chat(chat("Q: a\nA:", " b"), "</s>") == "Q: a\nA: b</s>"
    assert plain_chat(chat("Q: a\n", "b"), "</s>") == "Q: a\nb</s>"
    assert plain_chat(chat("a", "b", "c"), "</s>") == "a b</s>c"


def test_without_a_template_the_tokenizer_begins_a_text_as_ever() -> None:
    """Its bos is there and not learned; an eos that it would add is not."""
    tokenizer = chat_tokenizer(None)
    backend = tokenizer.backend_tokenizer
    before, numbers = backend.post_processor, tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    special = list(zip(("<s>", "</s>"), numbers, strict=True))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    try:
        ids, learned = encode_chat(tokenizer, ONE, template=False)
    finally:
        backend.post_processor = before
    assert tokenizer.decode(ids) == "<s>What is the capital of France? Paris.</s>"
    assert spoken(tokenizer, ids, learned) == [" Paris.</s>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, PHI3, MARKED, None])
def test_a_prompt_is_what_stands_before_an_answer(template: str | None) -> None:
    """What is asked of a model is what it has learned to go on from, token for token."""
    tokenizer = chat_tokenizer(template)
    ids, learned = encode_chat(tokenizer, TWO)
    last = len(learned) - 1 - learned[::-1].index(False, learned[::-1].index(True))
    assert encode_prompt(tokenizer, TWO[:3]) == ids[: last + 1]


def test_the_end_of_a_turn_is_the_templates_own() -> None:
    """It need not be the tokenizer's end of text; a template of plain words has none."""
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>"), (PHI3, "<|end|>")):
        tokenizer = chat_tokenizer(template)
        assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end
    for template in (OPENED, "{% for m in messages %}{{ m.content }}\n{% endfor %}", None):
        assert end_of_turn(chat_tokenizer(template)) is None
