"""Writing with models: what is written is what `model.generate` writes, with adapters of every kind on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chats_for_tests import CHATML, MISTRAL, chat_tokenizer
from generate_for_tests import METHODS, save_adapter, save_llama, save_t5
from models_for_tests import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import trimtab
from trimtab.errors import CheckpointError, ConfigError, DataError
from trimtab.finetuneconfig import TaskModelConfig
from trimtab.generate import Generator, Message, Sampling, find_base, open_generator, read_prompts
from trimtab.generate.generator import _Stream
from trimtab.generate.open import Base
from trimtab.tasks.chat import ChatTask

PROMPT = "The capital of France"
GREEDY = Sampling(max_new_tokens=9)


def by_hand(model: Any, tokenizer: Any, ids: list[int], **settings: Any) -> list[int]:
    """The new tokens of `model.generate`."""
    model.eval()
    given = torch.tensor([ids])
    out = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"max_new_tokens": 9, "do_sample": False} | settings,
    )
    return out[0, 1 if model.config.is_encoder_decoder else len(ids) :].tolist()


def base_of(folder: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_writes_what_it_writes_by_hand(method: str, tmp_path: Path) -> None:
    """Through an adapter's folder, with the adapter on and off; its text is streamed as it is returned."""
    base = save_llama(tmp_path / "base")
    model, tokenizer = base_of(base)
    folder = save_adapter(model, METHODS[method], tmp_path / "adapter")
    ids = tokenizer(PROMPT)["input_ids"]
    plain = by_hand(model, tokenizer, ids)
    trimtab.load_adapter(model, folder)
    cache = {"use_cache": False} if method == "ladder" else {}
    adapted = by_hand(model, tokenizer, ids, **cache)
    assert adapted != plain

    generator = open_generator(base, {"mine": folder}, device="cpu")
    assert (generator.adapters, generator.active) == (["mine"], "mine")
    pieces: list[str] = []
    answer = generator.answer(PROMPT, GREEDY, write=pieces.append)
    assert answer.text == tokenizer.decode(adapted, skip_special_tokens=True)
    assert "".join(pieces) == answer.text and len(pieces) > 1
    assert (answer.tokens, answer.stop) == (9, "length")
    generator.use(None)
    assert generator.answer(PROMPT, GREEDY).text == tokenizer.decode(plain, skip_special_tokens=True)
    generator.use("mine")
    assert generator.answer(PROMPT, GREEDY) == answer


def test_an_encoder_decoder_writes(tmp_path: Path) -> None:
    """T5 with LoRA: the encoder reads the prompt, and the answer is all that the decoder writes."""
    base = save_t5(tmp_path / "base")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    folder = save_adapter(model, METHODS["lora"], tmp_path / "adapter")
    trimtab.load_adapter(model, folder)
    wanted = by_hand(model, tokenizer, tokenizer(PROMPT)["input_ids"])
    generator = open_generator(base, {"mine": folder}, device="cpu")
    pieces: list[str] = []
    answer = generator.answer(PROMPT, GREEDY, write=pieces.append)
    assert answer.text == "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert generator.positions is None and answer.tokens == len(wanted)


def test_several_adapters_and_no_dropout(tmp_path: Path) -> None:
    """The first is at work; an adapter that was off is in eval mode when it comes back."""
    base = save_llama(tmp_path / "base")
    model, _ = base_of(base)
    folders = {name: save_adapter(model, METHODS["lora"], tmp_path / name, seed) for seed, name in enumerate("ab")}
    generator = open_generator(base, folders, device="cpu")
    assert generator.active == "a"
    first = generator.answer(PROMPT, GREEDY)
    generator.use("b")
    assert generator.answer(PROMPT, GREEDY) != first
    generator.use("a")
    assert generator.answer(PROMPT, GREEDY) == first
    with pytest.raises(ConfigError, match=r"no adapter is called 'c'; those on the model: a, b \(none is the base"):
        generator.use("c")
    with pytest.raises(ConfigError, match="'none' could not be told"):
        generator.load("none", folders["a"])


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """By `load_adapter`, which knows the base's weights."""
    other = save_llama(tmp_path / "other", seed=5)
    folder = save_adapter(base_of(other)[0], METHODS["lora"], tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="base"):
        open_generator(save_llama(tmp_path / "base"), {"mine": folder}, device="cpu")


# -- chats ---------------------------------------------------------------------------------------


def test_a_model_with_a_template_is_asked_in_it(tmp_path: Path) -> None:
    """A text is the user's message; the answer ends with the template's end of turn; --no-chat goes on."""
    base = save_llama(tmp_path / "base", CHATML)
    generator = open_generator(base, device="cpu")
    tokenizer = generator.tokenizer
    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True,
                                          return_dict=False)  # fmt: skip
    assert generator.encode(PROMPT) == generator.encode([Message("user", PROMPT)]) == asked
    assert generator.encode(PROMPT, chat=False) == tokenizer(PROMPT)["input_ids"]
    with torch.no_grad():  # whatever is asked, the end of a turn follows
        generator.model.lm_head.weight.zero_()
        generator.model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1.0
        generator.model.model.norm.weight.zero_()
    generator.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    generator.model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1.0
    assert generator.answer(PROMPT, GREEDY) == ("", 1, "end")


def test_a_model_without_a_template_goes_on(tmp_path: Path) -> None:
    """Messages take the form that they are trained in without a template."""
    generator = open_generator(save_llama(tmp_path / "base"), device="cpu")
    assert not generator.chats
    with pytest.raises(ConfigError, match="no chat template; leave --chat out"):
        generator.encode(PROMPT, chat=True)
    turns = [Message("system", "Be short."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert generator.tokenizer.decode(generator.encode(turns)) == "Be short.\n\na b</s>c"


def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    generator = open_generator(save_llama(tmp_path / "base", MISTRAL), device="cpu")
    for empty in ("", " \n", [Message("system", "x")], [Message("user", " ")]):
        with pytest.raises(ConfigError, match="the prompt is empty"):
            generator.encode(empty)
    with pytest.raises(ConfigError, match="ends with an answer"):
        generator.encode([Message("user", "a"), Message("assistant", "b")])
    with pytest.raises(DataError, match="refuses the chat: Roles must alternate"):
        generator.encode([Message("user", "a"), Message("user", "b")])


# -- positions and sampling ----------------------------------------------------------------------


def test_an_answer_ends_where_the_positions_do(tmp_path: Path) -> None:
    """64 positions hold prompt, answer and virtual tokens; a longer prompt is refused before anything runs."""
    base = save_llama(tmp_path / "base")
    model, tokenizer = base_of(base)
    folder = save_adapter(model, METHODS["prefix"], tmp_path / "adapter")
    generator = open_generator(base, {"mine": folder}, device="cpu")
    asked = len(tokenizer(PROMPT)["input_ids"])
    assert generator.positions == 61
    assert generator.answer(PROMPT, Sampling(max_new_tokens=500))[1:] == (61 - asked, "positions")
    generator.use(None)
    assert generator.answer(PROMPT)[1:] == (64 - asked, "positions")
    with pytest.raises(ConfigError, match=r"the prompt is \d+ tokens long, and the model has 64 positions"):
        generator.answer("a b c " * 40)


@pytest.mark.parametrize(
    ("sampling", "settings"),
    [
        (Sampling(temperature=0), {"do_sample": False}),
        (Sampling(), {"do_sample": True, "temperature": 1.5, "top_k": 7}),
        (Sampling(temperature=0.5), {"do_sample": True, "temperature": 0.5, "top_k": 7}),
        (Sampling(top_p=0.5, top_k=0), {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.5}),
        (Sampling(repetition_penalty=3.0, temperature=0), {"do_sample": False, "repetition_penalty": 3.0}),
        (Sampling(beams=3, temperature=0), {"do_sample": False, "num_beams": 3}),
    ],
)
def test_the_models_own_settings_hold_where_none_is_given(
    sampling: Sampling, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its generation config draws at temperature 1.5 from 7; each option changes its own part."""
    base = save_llama(tmp_path / "base")
    model, tokenizer = base_of(base)
    model.generation_config.update(do_sample=True, temperature=1.5, top_k=7, max_new_tokens=12)
    model.save_pretrained(base)
    generator = open_generator(base, device="cpu")
    torch.manual_seed(11)
    neutral = {} if settings["do_sample"] else {"temperature": None, "top_k": None, "top_p": None}
    wanted = by_hand(model, tokenizer, tokenizer(PROMPT)["input_ids"], max_new_tokens=12, **neutral, **settings)
    torch.manual_seed(11)
    pieces: list[str] = []
    answer = generator.answer(PROMPT, sampling, write=pieces.append)
    assert answer.text == "".join(pieces) == tokenizer.decode(wanted, skip_special_tokens=True)


def test_a_seed_draws_the_same_answer(tmp_path: Path) -> None:
    """Whatever was drawn before; and what is drawn after does not notice."""
    generator = open_generator(save_llama(tmp_path / "base"), device="cpu")
    state = torch.get_rng_state()
    answers = [generator.answer(PROMPT, Sampling(max_new_tokens=9, temperature=2.0, seed=s)) for s in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    assert torch.equal(torch.get_rng_state(), state)
    free = [generator.answer(PROMPT, Sampling(max_new_tokens=9, temperature=2.0)) for _ in range(2)]
    assert free[0] != free[1]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: give a number, at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0: give a number above 0, at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -1}, "top_k = -1: give a whole number, at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: give a number above 0"),
        ({"beams": 0}, "beams = 0: give a whole number, at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "seed = 9223372036854775808: give a number below"),
        ({"temperature": 0, "top_p": 0.5}, "top_p = 0.5: has no effect with temperature = 0"),
        ({"temperature": 0, "seed": 5}, "seed = 5: has no effect with temperature = 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=f"^{error}"):
        Sampling(**settings)


def test_an_answer_ends_when_somebody_stops_it(tmp_path: Path) -> None:
    generator = open_generator(save_llama(tmp_path / "base"), device="cpu")
    pieces: list[str] = []
    answer = generator.answer(PROMPT, Sampling(max_new_tokens=40), write=pieces.append, stopped=lambda: len(pieces) > 2)
    assert answer.stop == "interrupted" and 2 < answer.tokens < 12 and "".join(pieces) == answer.text


# -- where models come from ----------------------------------------------------------------------


def test_a_run_stands_for_its_model_and_adapter(tmp_path: Path) -> None:
    """A pre-training run has a base beside its adapter; a fine-tuning run one of them, or a merged model."""
    model, adapter = save_llama(tmp_path / "run" / "model"), tmp_path / "run" / "adapter"
    (tmp_path / "run" / "config.yaml").write_text("model: {name: llama-9m}\n")
    assert find_base(str(tmp_path / "run")) == Base(TaskModelConfig(name=model))
    save_adapter(base_of(model)[0], METHODS["read"], adapter)
    assert find_base(str(tmp_path / "run")) == Base(TaskModelConfig(name=model), adapter)
    assert open_generator(str(tmp_path / "run"), device="cpu").active == "run"
    with pytest.raises(ConfigError, match="the run's own adapter is called 'run'"):
        open_generator(str(tmp_path / "run"), {"run": adapter}, device="cpu")
    task = "model: {name: org/base, tokenizer: org/words}\ntask: {name: chat, train: a.jsonl}\n"
    (tmp_path / "run" / "config.yaml").write_text(task)
    there, chat = TaskModelConfig(name="org/base", tokenizer="org/words"), ChatTask(train="a.jsonl")
    assert find_base(str(tmp_path / "run")) == Base(TaskModelConfig(name=model), task=chat)  # merged
    (tmp_path / "run" / "model").rename(tmp_path / "elsewhere")
    assert find_base(str(tmp_path / "run")) == Base(there, adapter, chat)
    (tmp_path / "run" / "config.yaml").write_text(task.replace("chat", "chit"))
    with pytest.raises(ConfigError, match=r"BASE: .*config.yaml: task: name: no task is called 'chit'"):
        find_base(str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(task)
    adapter.rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"BASE: .*run is a run that is not complete: it holds no model yet"):
        find_base(str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"BASE: .*config.yaml cannot be read"):
        find_base(str(tmp_path / "run"))
    with pytest.raises(
        ConfigError, match=r"BASE: .*gone is an adapter folder; give its base, and this one as --adapter"
    ):
        find_base(str(tmp_path / "gone"))


def test_what_is_no_model_to_write_with_is_said(tmp_path: Path) -> None:
    """With the loader's own words, about BASE."""
    (tmp_path / "empty").mkdir()
    tiny_bert().bert.save_pretrained(tmp_path / "bert")
    base = save_llama(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bare" / "tokenizer_config.json").unlink()
    for name, error in (
        (str(tmp_path / "empty"), r"^BASE: the folder .*empty has no config.json"),
        (str(tmp_path / "none"), r"^BASE: there is no folder"),
        ("llama-9m", r"^BASE: llama-9m is a preset, whose weights are random"),
        (str(tmp_path / "bert"), r"^BASE: .*bert"),
    ):
        with pytest.raises(ConfigError, match=error):
            open_generator(name, device="cpu")
    more = AutoTokenizer.from_pretrained(save_llama(tmp_path / "more"))
    more.add_tokens(["<more>"])
    more.save_pretrained(tmp_path / "more")
    with pytest.raises(ConfigError, match=r"^BASE: .*tokens and .* embeddings for"):
        open_generator(str(tmp_path / "more"), device="cpu")
    with pytest.raises(DataError, match=r"^BASE: the tokenizer of .* could not be loaded"):
        open_generator(base, device="cpu")
    with pytest.raises(ConfigError, match=r"device = 'tpu': give auto, cpu, cuda"):
        open_generator(base, device="tpu")


def test_weights_are_read_in_the_dtype_asked_for(tmp_path: Path) -> None:
    generator = open_generator(save_llama(tmp_path / "base"), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in generator.model.parameters()} == {torch.bfloat16}
    assert generator.answer(PROMPT, GREEDY).tokens == 9


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_come_from_lines_and_rows(tmp_path: Path) -> None:
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_bytes("\ufeffOne?\r\nTwo naïve?\n\n".encode())
    assert [tuple(p) for p in read_prompts(str(text))] == [(f"{text}:1", "One?"), (f"{text}:2", "Two naïve?")]
    rows.write_text('{"prompt": "One?"}\n{"messages": [{"role": "user", "content": "Two?"}]}\n')
    assert [p.asked for p in read_prompts(str(rows))] == ["One?", [Message("user", "Two?")]]


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("a.txt", b"One?\n\nTwo?\n", r"a.txt:2: the line is empty"),
        ("a.txt", b"One?\n\xff\n", r"a.txt:2: not UTF-8"),
        ("a.txt", b"\n \n", r"a.txt: there is no prompt in it"),
        ("a.jsonl", b"", r"a.jsonl: there is no prompt in it"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', r"--file: .*a.jsonl:2: column 'prompt' is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"question": "b"}\n', r"a.jsonl:2: no column 'prompt'; .*'question'"),
        ("a.jsonl", b'{"messages": [{"role": "boss", "content": "b"}]}\n', r"a.jsonl:1, turn 1 .*the role 'boss'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prom\n', r"a.jsonl:2: this line is not JSON"),
        ("a.pdf", b"x", r"no file of a known kind"),
    ],
)
def test_a_file_that_cannot_be_read_names_its_line(name: str, data: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=error):
        read_prompts(str(tmp_path / name))


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=name):
            read_prompts(str(tmp_path / name))


def test_a_generator_is_made_of_a_model_in_memory() -> None:
    """As a library, without any folder."""
    tokenizer = chat_tokenizer(None)
    model = tiny_llama(vocab_size=len(tokenizer)).train()
    generator = Generator(model, tokenizer)
    assert generator.adapters == [] and generator.active is None and not model.training
    assert generator.answer(PROMPT, GREEDY).tokens == 9


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_were_on_a_model_before_are_in_eval_mode(method: str) -> None:
    """Also the one that is off when the model is taken."""
    tokenizer = chat_tokenizer(None)
    model = tiny_llama(vocab_size=len(tokenizer)).train()
    for name in "ab":
        trimtab.attach(model, METHODS[method], name=name)
    generator = Generator(model.train(), tokenizer)
    for name in "ab":
        generator.use(name)
        assert not any(module.training for module in model.modules())


def test_text_is_streamed_in_whole_characters() -> None:
    """A character of several tokens waits for its last one."""
    tokenizer = chat_tokenizer(None)
    pieces: list[str] = []
    stream = _Stream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    text = "naïve 東 dreams 😀"
    for token in tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    stream.put(torch.tensor([tokenizer("é")["input_ids"][0]]))
    stream.end()
    assert len(pieces) > 3 and "".join(pieces).startswith(text)
