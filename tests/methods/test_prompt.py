"""Prompt tuning: where it starts, what stands before the tokens, and what is not understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import VOCAB, logits, tiny_gpt2, tiny_llama, tiny_t5, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

import trimtab
from trimtab.methods.prompt import PromptTuningAdapter


def attached(model: torch.nn.Module, **settings: Any) -> PromptTuningAdapter:
    adapter = trimtab.attach(model, trimtab.PromptTuning(**settings))
    assert isinstance(adapter, PromptTuningAdapter)
    return adapter


def saved_tokenizer(folder: Path) -> str:
    """Three words."""
    words = {"<unk>": 0, "good": 4, "or": 9, "bad": 7}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(str(folder))
    return str(folder)


def test_vocabulary_embeddings_are_rows_of_the_table() -> None:
    """init=vocab: every row is a token's embedding, drawn by the seed; the draw does not touch torch's state."""
    model = tiny_llama()
    table = model.get_input_embeddings().weight.detach()
    state = torch.get_rng_state()
    adapter = attached(model, length=30)
    assert torch.equal(torch.get_rng_state(), state)
    rows = [int((table == row).all(1).nonzero()[0]) for row in adapter.prompt()]
    assert len(set(rows)) > 15
    assert torch.equal(attached(tiny_llama(), length=30).prompt(), adapter.prompt())
    assert not torch.equal(attached(tiny_llama(), length=30, seed=1).prompt(), adapter.prompt())


def test_random_is_a_normal_distribution() -> None:
    """init=random: mean 0, deviation 1, as PEFT's."""
    drawn = attached(tiny_llama(max_position_embeddings=2000), length=500, init="random").prompt()
    assert abs(drawn.mean().item()) < 0.03 and drawn.std().item() == pytest.approx(1.0, abs=0.03)


def test_text_is_repeated_and_cut_as_pefts(tmp_path: Path) -> None:
    """Token ids, or a text with a tokenizer, give the same rows, and PEFT starts at them, too."""
    peft = pytest.importorskip("peft")
    tokenizer = saved_tokenizer(tmp_path)
    table = tiny_gpt2().get_input_embeddings().weight.detach()
    for length, expected in ((2, [4, 9]), (3, [4, 9, 7]), (7, [4, 9, 7, 4, 9, 7, 4])):
        by_ids = attached(tiny_gpt2(), length=length, init="text", text=(4, 9, 7)).prompt()
        by_text = attached(tiny_gpt2(), length=length, init="text", text="good or bad", tokenizer=tokenizer).prompt()
        config = peft.PromptTuningConfig(
            num_virtual_tokens=length,
            task_type="CAUSAL_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="good or bad",
            tokenizer_name_or_path=tokenizer,
        )
        theirs = peft.get_peft_model(tiny_gpt2(), config).get_prompt_embedding_to_save("default")
        assert torch.equal(by_ids, table[expected]) and torch.equal(by_text, by_ids) and torch.equal(theirs, by_ids)


def test_a_prompt_of_tokens_is_those_tokens() -> None:
    """Initialised by token ids, the model answers for the batch as it would with them before it."""
    for model in (tiny_llama(), tiny_gpt2()):
        ids, words = token_ids(), torch.tensor([5, 3, 8])
        expected = logits(model, torch.cat((words.expand(3, -1), ids), dim=1))[:, 3:]
        attached(model, length=3, init="text", text=tuple(words.tolist()))
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)


def test_the_encoder_reads_it_in_an_encoder_decoder_model() -> None:
    """T5 answers as with the tokens before the encoder's; the encoder's states keep the prompt's positions."""
    model, ids = tiny_t5(), token_ids()
    longer = torch.cat((torch.tensor([5, 3, 8]).expand(3, -1), ids), dim=1)
    with torch.no_grad():
        expected = model.eval()(input_ids=longer, decoder_input_ids=ids[:, :5]).logits
        attached(model, length=3, init="text", text=(5, 3, 8))
        out = model(input_ids=ids, decoder_input_ids=ids[:, :5])
        assert torch.allclose(out.logits, expected, atol=1e-5)
        assert out.encoder_last_hidden_state.shape == (3, 15, 32)
        states, mask = model.get_encoder()(input_ids=ids), torch.ones_like(ids)
        again = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids[:, :5])
        assert torch.allclose(again.logits, expected, atol=1e-5)
        states.last_hidden_state = states.last_hidden_state[:, 3:]
        with pytest.raises(trimtab.ConfigError, match="not made with this adapter's prompt"):
            model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids[:, :5])


def test_models_whose_head_calls_an_inner_decoder() -> None:
    """OPT, whose embeddings are narrower than its blocks, and whose head passes its outer backbone by."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCAB}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=64)).eval()
    ids = token_ids()
    expected = logits(model, torch.cat((torch.tensor([5, 3]).expand(3, -1), ids), dim=1))[:, 2:]
    adapter = attached(model, length=2, init="text", text=(5, 3))
    assert adapter.host_name == "model.decoder" and adapter.prompt().shape == (2, 16)
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)


def test_robertas_positions_begin_behind_its_padding() -> None:
    """RoBERTa's table of 40 has 38 positions: 33 tokens fit with a prompt of 5, 34 do not."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = RobertaModel(RobertaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=40)).eval()
    attached(model, length=5)
    model(input_ids=token_ids(length=33).clamp(min=3))
    with pytest.raises(trimtab.ConfigError, match="the model has 38"):
        model(input_ids=token_ids(length=34).clamp(min=3))


def test_checkpointing_changes_nothing() -> None:
    """Gradients of the prompt are the same with blocks computed twice."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        adapter = attached(model, length=4)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        (prompt,) = adapter.own().values()
        assert prompt.grad is not None and prompt.grad.abs().sum() > 0
        grads.append(prompt.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "text"}, "needs a text"),
        ({"init": "text", "text": ""}, "needs a text"),
        ({"init": "text", "text": "good"}, "needs a tokenizer"),
        ({"text": (1, 2)}, 'is for init="text"'),
        ({"init": "text", "text": (1, 2), "tokenizer": "x"}, "a text that is a string"),
        ({"init": "words"}, "init = 'words'"),
        ({"tokens": 5}, "tokens is no setting"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    """Each is one line that names the setting."""
    with pytest.raises(trimtab.ConfigError, match=message) as said:
        trimtab.PromptTuning(**settings)
    assert "\n" not in str(said.value)


def test_texts_that_cannot_be_used_leave_the_model_alone(tmp_path: Path) -> None:
    """An unknown tokenizer, ids beyond the table."""
    model, empty = tiny_llama(), tmp_path / "empty"
    empty.mkdir()
    for settings, message in (
        (
            {"text": "good", "tokenizer": str(tmp_path / "none")},
            r"none' cannot be loaded: there is no such folder; give",
        ),
        ({"text": "good", "tokenizer": str(empty)}, "cannot be loaded"),
        ({"text": (3, VOCAB)}, f"token id {VOCAB} is not among the {VOCAB}"),
        ({"text": "   ", "tokenizer": saved_tokenizer(tmp_path)}, "has no tokens"),
    ):
        with pytest.raises(trimtab.ConfigError, match=message):
            attached(model, init="text", **settings)
        assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_tokenizers_own_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names a tokenizer has not agreed to run what comes with it, nor is asked on the terminal."""
    seen: list[Any] = []
    real = AutoTokenizer.from_pretrained

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("trust_remote_code"))
        return real(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watch)
    trimtab.attach(tiny_llama(), trimtab.PromptTuning(init="text", text="good", tokenizer=saved_tokenizer(tmp_path)))
    assert seen == [False]
