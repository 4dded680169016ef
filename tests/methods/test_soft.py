"""What holds for prompts and prefixes alike: attaching, leaving, switching, resuming, batches, generation."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import MODELS, VOCAB, forward, logits, loss_of, tiny_llama, token_ids, train
from torch import Tensor, nn
from transformers import BertModel, LlamaForSequenceClassification, Trainer, TrainingArguments

import trimtab
from trimtab.methods.soft import SoftPromptAdapter
from trimtab.train.objective import Objective

FAMILIES = ["llama", "gpt2", "bert", "t5"]
CONFIGS: dict[str, trimtab.Method] = {
    "prompt": trimtab.PromptTuning(length=5),
    "prefix": trimtab.PrefixTuning(length=5),
    "prefix-mlp": trimtab.PrefixTuning(length=5, projection=True, projection_size=7),
}


def attached(model: nn.Module, config: str | trimtab.Method, **kwargs: Any) -> SoftPromptAdapter:
    adapter = trimtab.attach(model, CONFIGS[config] if isinstance(config, str) else config, **kwargs)
    assert isinstance(adapter, SoftPromptAdapter)
    return adapter


def call(model: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
    extra = {"decoder_input_ids": ids[:, :5]} if type(model).__name__.startswith("T5") else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    now, then = a.state_dict(), b.state_dict()
    return list(now) == list(then) and all(torch.equal(now[k], then[k]) and now[k].dtype == then[k].dtype for k in now)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_learns_and_leaves_without_a_trace(family: str, config: str) -> None:
    """The loss falls, only the adapter's parameters move, and detach gives bits, hooks, names and flags back."""
    model = MODELS[family]()
    before, ids = copy.deepcopy(model), token_ids()
    base = logits(model, ids)
    adapter = attached(model, config)
    assert logits(model, ids).shape == base.shape and not torch.allclose(logits(model, ids), base, atol=1e-4)
    named = dict(model.named_parameters())
    assert {id(named[e.name]) for e in adapter.trainable()} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=5e-2))
    losses = []
    for _ in range(20):
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.98 * losses[0] or (family == "bert" and losses[-1] < losses[0])
    adapter.detach()
    assert same(model, before) and torch.equal(logits(model, ids), base)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_activate_and_pickles(family: str, config: str, dtype: torch.dtype) -> None:
    """Within disabled() the base answers; another adapter takes its place and gives it back; a pickle answers alike."""
    model, ids = MODELS[family]().to(dtype), token_ids()
    base, names = logits(model, ids), list(model.state_dict())
    adapter = attached(model, config, name="soft")
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 3))
    assert {e.parameter.dtype for e in adapter.trainable()} == {torch.float32}
    out = logits(model, ids)
    assert out.dtype == dtype and out.isfinite().all()
    with adapter.disabled():
        assert torch.equal(logits(model, ids), base)
        assert list(model.state_dict()) == names
    assert torch.equal(logits(model, ids), out)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, ids), out)
    assert torch.equal(logits(copy.deepcopy(model), ids), out)
    lora = trimtab.attach(model, trimtab.LoRA(rank=2), name="lora")
    assert torch.equal(logits(model, ids), base)
    trimtab.activate(model, "soft")
    assert torch.equal(logits(model, ids), out)
    lora.detach()
    assert torch.equal(logits(model, ids), out)
    adapter.detach()
    assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("config", CONFIGS)
def test_it_resumes_bit_for_bit(config: str) -> None:
    """Four steps equal two, a stored state, and two more; a state of another shape is refused."""
    whole = tiny_llama()
    adapter = attached(whole, config, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    train(whole, adapter, optimizer, range(1, 3))
    state, moments = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(whole, adapter, optimizer, range(3, 5))
    halves = tiny_llama()
    second = attached(halves, config, dtype=torch.bfloat16)
    second.load_state_dict(state)
    optimizer = torch.optim.AdamW(second.parameter_groups(lr=1e-2))
    optimizer.load_state_dict(moments)
    train(halves, second, optimizer, range(3, 5))
    assert torch.equal(logits(halves, token_ids()), logits(whole, token_ids()))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, config: str) -> None:
    """What the padding holds does not matter; a padded row answers as it does alone, without padding."""
    model, ids = MODELS[family]().eval(), token_ids(rows=2)
    attached(model, config)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    other = ids.clone()
    other[0, -4:] = 3
    kwargs = {"attention_mask": mask}
    one, two = call(model, ids, **kwargs).logits, call(model, other, **kwargs).logits
    if one.dim() == 2 or family == "t5":
        assert torch.allclose(one, call(model, other, **kwargs).logits, atol=1e-5)
    else:
        assert torch.allclose(one[mask.bool()], two[mask.bool()], atol=1e-5)
    decoder = {"decoder_input_ids": ids[:1, :5]} if family == "t5" else {}
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :-4], **decoder).logits
    shared = one[:1] if one.dim() == 2 or family == "t5" else one[:1, :-4]
    assert torch.allclose(shared, alone, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_and_without_a_cache_and_in_batches(family: str, config: str) -> None:
    """The cache changes nothing, and a left-padded prompt in a batch goes on as it does alone."""
    model = MODELS[family]().eval()
    model.generation_config.eos_token_id = None
    attached(model, config)
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    ids = token_ids(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch = model.generate(input_ids=ids, attention_mask=mask, **settings)
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(batch, slow)
    alone = model.generate(input_ids=ids[:1, 4:], attention_mask=mask[:1, 4:], **settings)
    assert torch.equal(batch[0, -7:], alone[0, -7:])
    assert torch.equal(model.generate(input_ids=ids[1:], num_beams=1, **settings)[0, -7:], batch[1, -7:])
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **settings)
    assert beams.shape == batch.shape


@pytest.mark.parametrize("config", CONFIGS)
def test_greedy_generation_is_that_of_repeated_forwards(config: str) -> None:
    """Each generated token is the best of a plain forward over all before it."""
    model = tiny_llama().eval()
    attached(model, config)
    ids = token_ids(rows=2, length=6)
    grown = ids
    for _ in range(5):
        grown = torch.cat((grown, call(model, grown).logits[:, -1:].argmax(-1)), dim=1)
    out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(out, grown)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_cache_can_be_fed_by_hand(config: str) -> None:
    """Two calls with a cache equal one; masks and position ids of the second speak of the batch's tokens alone."""
    model, ids = tiny_llama().eval(), token_ids()
    attached(model, config)
    whole = call(model, ids).logits
    first = call(model, ids[:, :8], use_cache=True)
    mask, at = torch.ones_like(ids), torch.arange(8, 12).expand(3, -1)
    second = call(model, ids[:, 8:], past_key_values=first.past_key_values, attention_mask=mask, position_ids=at)
    assert torch.allclose(torch.cat((first.logits, second.logits), dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_packed_documents_do_not_see_each_other(config: str, dtype: torch.dtype) -> None:
    """With a mask of (B, 1, S, S) and position ids, each document answers as it does alone with the prompt."""
    model, ids = tiny_llama().eval(), token_ids(rows=1)
    attached(model, config)
    seen = torch.zeros(12, 12, dtype=torch.bool)
    seen[:7, :7] = torch.ones(7, 7).tril().bool()
    seen[7:, 7:] = torch.ones(5, 5).tril().bool()
    mask = seen if dtype == torch.bool else torch.zeros(12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    at = torch.cat((torch.arange(7), torch.arange(5)))[None]
    packed = call(model, ids, attention_mask=mask[None, None], position_ids=at).logits
    alone = torch.cat((call(model, ids[:, :7]).logits, call(model, ids[:, 7:]).logits), dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)
    with pytest.raises(trimtab.ConfigError, match="position_ids packs several sequences"):
        call(model, ids, position_ids=at)


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_heads_and_hidden_states_see_the_batch_alone(config: str) -> None:
    """The model's loss is that of its logits; hidden states have the batch's length; our chunked loss agrees."""
    model, ids = tiny_llama(), token_ids()
    attached(model, config)
    out = call(model, ids, labels=ids, output_hidden_states=True)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {tuple(h.shape) for h in out.hidden_states} == {(3, 12, 32)}

    class Batch:
        input_ids, attention_mask, position_ids = ids, None, None
        labels = torch.cat((ids[:, 1:], torch.full((3, 1), -100)), dim=1)

    objective = Objective(model)
    objective.check(Batch())
    assert objective(Batch()).item() == pytest.approx(33 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_classifier_of_a_decoder_reads_the_last_token_of_each_row(config: str) -> None:
    """Right-padded rows are classified as they are alone, since the head sees the batch's own ids."""
    base = tiny_llama().config
    base.pad_token_id, base.num_labels = 0, 3
    torch.manual_seed(0)
    model, ids = LlamaForSequenceClassification(base).eval(), token_ids() % 96 + 1
    attached(model, config)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    padded = call(model, ids * mask, attention_mask=mask).logits
    assert torch.allclose(padded[:1], call(model, ids[:1, :-4]).logits, atol=1e-5)


def test_embeddings_tuples_and_positional_arguments() -> None:
    """inputs_embeds instead of ids, ids as the first argument, output_attentions: the prompt is there in each."""
    model, ids = tiny_llama().eval(), token_ids()
    model.set_attn_implementation("eager")
    attached(model, "prompt")
    out = call(model, ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, out)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out)
        assert torch.equal(model(ids, return_dict=False)[0], out)
        watched = model(ids, output_attentions=True)
    assert {tuple(a.shape) for a in watched.attentions} == {(3, 4, 12, 17)}
    assert watched.attentions[0][..., :5].sum() > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_a_bare_encoder_and_token_types(config: str) -> None:
    """The backbone itself can be the model; token types reach the tokens that they are of."""
    torch.manual_seed(0)
    model, ids = BertModel(MODELS["bert"]().config).eval(), token_ids()
    attached(model, config)
    zeros = call(model, ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    assert zeros.shape == (3, 12, 32)
    assert torch.allclose(call(model, ids).last_hidden_state, zeros, atol=1e-6)
    assert not torch.allclose(call(model, ids, token_type_ids=torch.ones_like(ids)).last_hidden_state, zeros, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_autocast_and_gradients_in_fp32(config: str) -> None:
    """Under autocast the model runs in bf16, and the adapter's gradients are fp32, near those without it."""
    grads = []
    for enabled in (False, True):
        model = tiny_llama()
        adapter = attached(model, config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = forward(model, token_ids())
        out.float().square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter.own().values()]))  # type: ignore[union-attr]
    assert grads[1].dtype == torch.float32
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()


@pytest.mark.parametrize("config", CONFIGS)
def test_it_has_no_merged_form(config: str) -> None:
    """merge() and merged_tensor() raise with the reason; the adapter stays at work."""
    model = tiny_llama()
    adapter = attached(model, config)
    out = logits(model, token_ids())
    with pytest.raises(trimtab.CannotMerge, match="no part of any weight"):
        adapter.merge()
    with pytest.raises(trimtab.CannotMerge, match="no part of any weight"):
        adapter.merged_tensor("lm_head.weight", torch.zeros(1))
    assert list(adapter.effective_weights()) == []
    assert torch.equal(logits(model, token_ids()), out)


@pytest.mark.parametrize("config", CONFIGS)
def test_train_also_trains_beside_and_is_saved(config: str, tmp_path: Path) -> None:
    """Norms train beside the virtual tokens, and a loaded folder brings both back."""
    model = tiny_llama()
    adapter = attached(model, CONFIGS[config].model_copy(update={"train_also": ("norms",)}))
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    assert not torch.equal(model.model.norm.weight, torch.ones(32))
    adapter.save(tmp_path)
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(logits(fresh, token_ids()), logits(model, token_ids()), atol=1e-6)
    assert torch.equal(fresh.model.norm.weight, model.model.norm.weight)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_lengths_that_the_model_has_no_positions_for(name: str) -> None:
    """A prompt as long as the model, and a batch that does not fit with it, are named; what fits runs."""
    config = {"prompt": trimtab.PromptTuning, "prefix": trimtab.PrefixTuning}[name]
    model = tiny_llama()
    with pytest.raises(trimtab.ConfigError, match=r"length = 64: the model has 64 positions"):
        trimtab.attach(model, config(length=64))
    assert not trimtab.adapters(model) and all(p.requires_grad for p in model.parameters())
    attached(model, config(length=10))
    call(model, token_ids(length=54))
    with pytest.raises(trimtab.ConfigError, match=r"55 tokens and 10 virtual ones are 65 positions.*at most 54 tokens"):
        call(model, token_ids(length=55))
    grown = call(model, token_ids(length=54), use_cache=True).past_key_values
    with pytest.raises(trimtab.ConfigError, match="55 tokens and 10 virtual"):
        call(model, token_ids(length=1), past_key_values=grown)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_models_and_calls_that_cannot_have_one(name: str) -> None:
    """No embeddings, a static cache, a cache without the virtual tokens, packing without a mask, length 0."""
    config = {"prompt": trimtab.PromptTuning, "prefix": trimtab.PrefixTuning}[name]
    for family in ("mlp", "encoder"):
        with pytest.raises(trimtab.ConfigError, match="no input embeddings"):
            trimtab.attach(MODELS[family](), config(length=3))
    with pytest.raises(trimtab.ConfigError, match="length = 0"):
        config(length=0)
    model, ids = tiny_llama().eval(), token_ids()
    old = call(model, ids[:, :8], use_cache=True).past_key_values
    attached(model, config(length=3))
    with pytest.raises(trimtab.ConfigError, match=r"holds 8 positions .* not made with the 3 virtual tokens"):
        call(model, ids[:, 8:], past_key_values=old, attention_mask=torch.ones_like(ids))
    with pytest.raises(trimtab.ConfigError, match="StaticCache"):
        model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=4, pad_token_id=0)
    with pytest.raises(trimtab.ConfigError, match="cu_seq_lens_q packs"):
        call(model, ids, cu_seq_lens_q=torch.tensor([0, 6, 12]))
    with pytest.raises(trimtab.ConfigError, match="attention_mask is dict"):
        call(model, ids, attention_mask={})


@pytest.mark.parametrize(("config", "cached"), [("prompt", False), ("prefix", False), ("prefix", True)])
def test_blocks_compile_once_for_all_depths(config: str, cached: bool) -> None:
    """Twelve compiled blocks are two graphs (whether the first block's input needs a gradient) and answer alike."""
    torch._dynamo.reset()
    model, ids = tiny_llama(num_hidden_layers=12), token_ids()
    adapter = attached(model, config)
    eager = logits(model, ids)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    out = model(input_ids=ids, use_cache=cached).logits
    out.square().sum().backward()
    assert graphs <= 2
    assert torch.allclose(out, eager, atol=1e-4)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.own().values())
    torch._dynamo.reset()


@pytest.mark.parametrize("config", CONFIGS)
def test_a_trainer_needs_no_word_of_it(config: str, tmp_path: Path) -> None:
    """transformers.Trainer with label smoothing and metrics: predictions have the labels' shape, and it learns."""
    model, shapes = tiny_llama(), []
    adapter = attached(model, config)
    before = copy.deepcopy(adapter.prompt())
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=8)]

    def measure(seen: Any) -> dict[str, float]:
        shapes.append((seen.predictions.shape, seen.label_ids.shape))
        return {}

    settings = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=3e-2,
        label_smoothing_factor=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows, compute_metrics=measure)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    assert set(shapes) == {((8, 12, VOCAB), (8, 12))}
    assert not torch.equal(adapter.prompt(), before)
