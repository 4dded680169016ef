"""The objective equals the model's own loss, and says so when it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from trimtab.errors import ConfigError
from trimtab.train.objective import Objective

VOCABULARY = 97


@dataclass
class Batch:
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gemma2(**more: Any) -> transformers.PreTrainedConfig:
    """Caps its logits."""
    return transformers.Gemma2Config(**{**SMALL, "head_dim": 16, "final_logit_softcapping": 2.0, **more})


MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gpt2 (tied)": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "phi (bias)": lambda: transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 2}),
    "gemma2 (cap)": gemma2,
    "granite (divides)": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere (multiplies)": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
}


T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 48))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "max_position_embeddings": 128,
}
PAIRED: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "t5 (scaled before)": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
    "t5 v1.1 (not scaled)": lambda: transformers.T5Config(
        **T5, decoder_start_token_id=0, tie_word_embeddings=False, feed_forward_proj="gated-gelu"
    ),
    "bart (bias behind)": lambda: transformers.BartConfig(**BART),
    "marian (bias behind)": lambda: transformers.MarianConfig(
        **BART, pad_token_id=0, eos_token_id=0, decoder_start_token_id=0
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model with random weights and a random head bias where it has one."""
    torch.manual_seed(0)
    if name in PAIRED:
        model = transformers.AutoModelForSeq2SeqLM.from_config(PAIRED[name]()).to(dtype).eval()
        if hasattr(model, "final_logits_bias"):
            nn.init.normal_(model.final_logits_bias)
        return model
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).to(dtype).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


@dataclass
class PairBatch(Batch):
    decoder_input_ids: Tensor | None = None
    decoder_attention_mask: Tensor | None = None


def paired_batch(model: Any, source: int = 90, target: int = 70) -> PairBatch:
    """Two pairs, the second with padding on both sides."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, source), generator=generator)
    labels = torch.randint(3, VOCABULARY, (2, target), generator=generator)
    mask, decoder_mask = torch.ones(2, source, dtype=torch.long), torch.ones(2, target, dtype=torch.long)
    mask[1, -10:], decoder_mask[1, -5:] = 0, 0
    decoder = model.prepare_decoder_input_ids_from_labels(labels)
    labels[1, -5:] = -100
    return PairBatch(ids, labels, mask, None, decoder, decoder_mask)


def batch(length: int = 20) -> Batch:
    """Two sequences with some tokens not scored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[1, -5:] = -100
    return Batch(ids[:, :-1].contiguous(), labels)


@pytest.mark.parametrize("name", MODELS)
def test_chunked_objective_equals_the_models_own_loss(name: str) -> None:
    """Value and every gradient equal those of the sum over the model's own logits; the check agrees."""
    model, data = build(name), batch()
    chunked, own = Objective(model, chunked=True, chunk=7), Objective(model, chunked=False)
    chunked.check(data)
    own.check(data)
    expected = own(data)
    logits = model(input_ids=data.input_ids).logits.float()
    by_hand = F.cross_entropy(logits.flatten(0, 1), data.labels.flatten(), reduction="sum")
    torch.testing.assert_close(expected, by_hand)
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    actual = chunked(data)
    assert actual.shape == ()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    actual.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", PAIRED)
def test_chunked_objective_of_pairs_equals_the_models_own_loss(name: str) -> None:
    """Encoder-decoder models: value and every gradient are those of the model called with labels."""
    model = build(name)
    data = paired_batch(model)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")
    expected = model(**{name: getattr(data, name) for name in names}).loss * (data.labels >= 0).sum()
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for chunked in (True, False):
        model.zero_grad()
        objective = Objective(model, chunked=chunked, chunk=7)
        objective.check(data)
        actual = objective(data)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        actual.backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-4, msg=key)
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize("name", ["llama", "bart (bias behind)", "t5 (scaled before)"])
def test_model_is_called_whole_and_its_logits_are_never_formed(name: str) -> None:
    """Hooks on the model see the call; the head's own forward does not run, and is there again afterwards."""
    model = build(name)
    data = paired_batch(model) if name in PAIRED else batch()
    head, projected, called = model.get_output_embeddings(), [], []

    def wrapped(x: Tensor) -> Tensor:
        projected.append(x.shape)
        return F.linear(x, head.weight)

    head.forward = wrapped
    model.register_forward_hook(lambda *_: called.append(1))
    Objective(model)(data)
    assert called
    assert not projected
    assert head.forward is wrapped
    Objective(model, chunked=False)(data)
    assert projected == [(*data.labels.shape, 32)]


def test_batch_of_an_encoder_decoder_needs_the_decoders_tokens() -> None:
    """A batch for a causal model is refused, with the way out."""
    with pytest.raises(ConfigError, match="no decoder_input_ids: give it the labels shifted to the right"):
        Objective(build("t5 (scaled before)"))(batch())


@pytest.mark.parametrize("name", [*MODELS, *PAIRED])
def test_check_agrees_in_bf16(name: str) -> None:
    """A model that rounds its logits to bf16 passes the check."""
    model = build(name, torch.bfloat16)
    Objective(model).check(paired_batch(model) if name in PAIRED else batch(100))


def test_head_may_be_fp32_beside_bf16_hidden_states() -> None:
    """The head's fp32 weight is cast for compute and gets an fp32 gradient."""
    model, data = build("llama", torch.bfloat16), batch()
    expected = Objective(model, chunked=False)(data)

    class CastingHead(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype))

    head = model.get_output_embeddings()
    head.__class__ = CastingHead
    head.weight = nn.Parameter(head.weight.detach().float())
    objective = Objective(model)
    objective.check(data)
    loss = objective(data)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0.0)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32


def test_masks_and_positions_reach_the_model() -> None:
    """With a mask per document, a packed sequence costs what its documents cost apart."""
    model, data = build("llama"), batch(20)
    cut, length = 8, 20
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[cut:, :cut] = False
    positions = torch.cat((torch.arange(cut), torch.arange(length - cut)))
    packed = Batch(data.input_ids, data.labels, mask.expand(2, 1, -1, -1), positions.expand(2, -1))
    for chunked in (True, False):
        objective = Objective(model, chunked=chunked)
        objective.check(packed)
        apart = sum(
            objective(Batch(data.input_ids[:, part], data.labels[:, part])) for part in (slice(cut), slice(cut, None))
        )
        torch.testing.assert_close(objective(packed), apart)
        assert (objective(packed) - objective(data)).abs() > 1e-4


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("gemma2 (cap)", "softcap", None),
        ("granite (divides)", "scale", 1.0),
        ("cohere (multiplies)", "scale", 4.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unknown_treatment_of_logits_is_caught(name: str, setting: str, value: Any, dtype: torch.dtype) -> None:
    """A cap or a scale that the objective did not see is a ConfigError that offers the way out."""
    objective = Objective(build(name, dtype))
    setattr(objective, setting, value)
    with pytest.raises(ConfigError, match=r"differs from the model's own.*set loss.chunked=false"):
        objective.check(batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cap_far_above_a_fresh_models_logits_is_caught(dtype: torch.dtype) -> None:
    """Gemma's cap of 30 changes nothing visible at the logits of a fresh model; the check still sees it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(gemma2(final_logit_softcapping=30.0)).to(dtype)
    objective = Objective(model)
    objective.check(batch())
    objective.softcap = None
    with pytest.raises(ConfigError, match=r"loss.chunked=false"):
        objective.check(batch())


def test_check_leaves_no_trace() -> None:
    """Modes, hooks, gradients and the random state are as before, whether the check passes or not."""
    model, data = build("gpt2 (tied)"), batch()  # has dropout
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    objective = Objective(model)
    objective.check(data)
    objective.scale = 3.0
    with pytest.raises(ConfigError):
        objective.check(data)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapted_head_is_refused_before_it_trains() -> None:
    """An adapter on the head changes nothing at the start, so it is found by its parameters."""
    model = build("llama")
    head = model.get_output_embeddings()
    head.lora_A, head.lora_B = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.zeros(VOCABULARY, 2))
    with pytest.raises(ConfigError, match=r"lora_A, lora_B.*set loss.chunked=false"):
        Objective(model)
    Objective(model, chunked=False)(batch()).backward()


def test_head_that_does_not_run_is_refused() -> None:
    """The head's input is what counts, so a model that does not call what it names as its head is refused."""
    model = build("llama")
    model.get_output_embeddings = lambda: nn.Linear(32, VOCABULARY)
    with pytest.raises(ConfigError, match=r"called 0 times in a forward.*set loss.chunked=false"):
        Objective(model)(batch())


@pytest.mark.parametrize(("head", "says"), [(nn.Sequential(), "type Sequential"), (None, "no output head")])
def test_head_that_is_not_linear_is_refused(head: nn.Module | None, says: str) -> None:
    """Another kind of head, or none, is a ConfigError that offers the way out."""
    model = build("llama")
    model.get_output_embeddings = lambda: head
    with pytest.raises(ConfigError, match=rf"{says}.*set loss.chunked=false"):
        Objective(model)
