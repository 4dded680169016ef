"""READ: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families_for_tests import bart, batch_for, vit
from models_for_tests import logits, tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.bench.meters import saved_bytes

READ = trimtab.READ


def optimizer_for(adapter: trimtab.Adapter) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))


def trained_llama(**settings: Any) -> tuple[nn.Module, trimtab.Adapter]:
    model = tiny_llama()
    adapter = trimtab.attach(model, READ(size=8, **settings))
    train(model, adapter, optimizer_for(adapter), range(1, 5))
    return model, adapter


def hidden_states(ids: Tensor) -> list[Tensor]:
    """What each block of the plain model gives, by a hook of this test."""
    model, found = tiny_llama(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return found


@pytest.mark.parametrize("aggregate", ["last", "mean"])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_streamed_is_what_torch_computes_of_collected_states(cell: str, aggregate: str) -> None:
    """torch's own recurrent layer over the collected hidden states, depth as time, gives the correction."""
    model, adapter = trained_llama(cell=cell, aggregate=aggregate, scale=0.5)
    ids, own = token_ids(), {n.rpartition("read.")[2]: p for n, p in adapter.own().items()}
    stacked = torch.stack(hidden_states(ids), dim=2)  # (B, S, N, d)
    layer = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[cell](32, 8, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").data.copy_(own[f"cells.0.{name}"].data)
    normed = nn.functional.rms_norm(stacked, (32,), own["cells.0.norm_weight"].detach(), 1e-6)
    with torch.no_grad():
        states = layer(normed.flatten(0, 1))[0].view(*ids.shape, -1, 8)
        h = states[:, :, -1] if aggregate == "last" else states.mean(2)
        corrected = stacked[:, :, -1] + 0.5 * (h @ own["output_weight"].t() + own["output_bias"])
        plain = tiny_llama()
        wanted = plain.lm_head(plain.model.norm(corrected))
    assert torch.allclose(logits(model, ids), wanted, atol=1e-5)
    assert not torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-3)


def test_what_is_kept_for_the_backward_is_counted() -> None:
    """The side network keeps phi_j and h_j; all else is the final norm, the head and the loss behind the blocks."""
    ids = token_ids(rows=4, length=16)

    def kept(blocks: int) -> int:
        model = tiny_llama(num_hidden_layers=blocks).to(torch.bfloat16).train()
        trimtab.attach(model, READ(size=8))
        return saved_bytes(lambda: model(input_ids=ids).logits)

    each = kept(4) - kept(3)
    assert each == ids.numel() * (32 + 8) * 2


def test_parameters_hardly_grow_with_depth() -> None:
    """Not at all: one recurrence serves all layers; networks of their own do."""
    counts = {}
    for cell, blocks in (("rnn", 2), ("rnn", 8), ("none", 2), ("none", 8)):
        model = tiny_llama(num_hidden_layers=blocks)
        adapter = trimtab.attach(model, READ(size=8, cell=cell, aggregate="mean"))
        counts[cell, blocks] = sum(entry.parameter.numel() for entry in adapter.trainable())
    assert counts["rnn", 2] == counts["rnn", 8] == (32 + 8 * 32 + 8 * 8 + 8 + 8) + (32 * 8 + 32)
    assert counts["none", 8] > 3 * counts["none", 2]


def test_gradients_are_right_in_float64() -> None:
    """Of every tensor of both networks of an encoder-decoder, against differences of the loss."""
    model = bart().double()
    adapter = trimtab.attach(model, READ(size=3, cell="gru", init="drawn"))
    batch = batch_for("bart", rows=2)
    model(**batch).loss.backward()
    generator = torch.Generator().manual_seed(0)
    for entry in adapter.trainable():
        direction = torch.randn(entry.parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                entry.parameter.add_(direction, alpha=step)
                losses.append(float(model(**batch).loss))
                entry.parameter.sub_(direction, alpha=step)
        assert entry.parameter.grad is not None
        slope = float((entry.parameter.grad * direction).sum())
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4, abs=1e-8), entry.name
        assert slope != 0.0, entry.name


def test_inputs_that_require_gradients_bring_no_graph_back() -> None:
    model = tiny_llama().train()
    model.enable_input_require_grads()
    adapter = trimtab.attach(model, READ(size=8))
    states = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert not states[0].requires_grad
    assert all(entry.parameter.grad is not None for entry in adapter.trainable())


def test_the_backbones_dropout_is_off_unless_asked_for() -> None:
    ids = token_ids()

    def differ(**settings: Any) -> bool:
        model = tiny_gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        trimtab.attach(model, READ(size=8, **settings))
        model.train()
        with torch.no_grad():
            return not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

    assert not differ()
    assert differ(backbone_dropout=True)


def test_the_head_keeps_its_dropout() -> None:
    model = tiny_bert()
    model.dropout.p = 0.5
    trimtab.attach(model, READ(size=8))
    model.train()
    assert model.dropout.training and model.classifier.training
    assert not model.bert.encoder.training and not model.bert.embeddings.training
    model.bert.encoder.layer[0].train()
    model.train()
    assert not any(module.training for module in model.bert.encoder.modules())


def test_modes_come_back_with_the_model() -> None:
    """Each module's own, or what the model was brought into since."""
    model = tiny_bert().train()
    model.bert.eval()
    model.bert.pooler.dense.train()
    modes = [module.training for module in model.modules()]
    adapter = trimtab.attach(model, READ(size=8, train_also=()))
    assert not model.bert.embeddings.training and not model.bert.pooler.dense.training
    with adapter.disabled():
        assert [module.training for module in model.modules()] == modes
    adapter.detach()
    assert [module.training for module in model.modules()] == modes
    for mode in (True, False):
        model.train(not mode)
        adapter = trimtab.attach(model, READ(size=8, train_also=()))
        model.train(mode)
        assert not model.bert.embeddings.training
        adapter.detach()
        assert all(module.training is mode for module in model.modules())


def test_checkpointing_is_switched_off_and_on_again() -> None:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is switched off"):
        adapter = trimtab.attach(model, READ(size=8, backbone_dropout=True))
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert len(calls) == 1
    adapter.detach()
    assert model.model.layers[0].gradient_checkpointing


def test_a_forward_cut_short_is_forgotten_and_a_skipped_block_is_refused() -> None:
    model, _ = trained_llama()
    ids = token_ids()
    whole = logits(model, ids)

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(input_ids=ids)
    handle.remove()
    assert torch.is_grad_enabled()
    assert torch.equal(logits(model, ids), whole)

    last = model.model.layers
    model.model.layers = last[:1]
    with pytest.raises(trimtab.ConfigError, match="1 of 2 blocks ran"):
        model(input_ids=ids)
    model.model.layers = nn.ModuleList([last[1], last[0]])
    with pytest.raises(trimtab.ConfigError, match="block 1 ran where block 0"):
        model(input_ids=ids)


def test_a_failing_block_leaves_gradients_on() -> None:
    model = tiny_llama()
    trimtab.attach(model, READ(size=8))
    with pytest.raises(RuntimeError):
        model.model.layers[0](torch.zeros(1, 2, 5))
    assert torch.is_grad_enabled()


def test_a_block_compiled_with_its_hooks_computes_the_same() -> None:
    """The hooks stay out of the graph; asked for one graph, the compiler refuses and leaves gradients on."""
    model, _ = trained_llama()
    whole = logits(model, token_ids())
    for block in model.model.layers:
        block.compile(backend="eager")
    torch.testing.assert_close(logits(model, token_ids()), whole)
    torch._dynamo.reset()
    for block in model.model.layers:
        block.compile(backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(input_ids=token_ids())
    assert torch.is_grad_enabled()


def test_encoder_outputs_of_another_input_are_refused() -> None:
    model = tiny_t5()
    trimtab.attach(model, READ(size=8, init="drawn"))
    batch = batch_for("t5")
    own = model.get_encoder()(input_ids=batch["input_ids"])
    answer = model(encoder_outputs=own, labels=batch["labels"]).logits
    direct = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
    torch.testing.assert_close(answer, direct)
    foreign = copy.deepcopy(own)
    foreign.last_hidden_state = foreign.last_hidden_state.detach() + 1
    with pytest.raises(trimtab.ConfigError, match="run the encoder again"):
        model(encoder_outputs=foreign, labels=batch["labels"])


def test_without_a_joiner_the_encoder_has_no_network() -> None:
    with_, without = tiny_t5(), tiny_t5()
    some = trimtab.attach(with_, READ(size=8)).own()
    none = trimtab.attach(without, READ(size=8, joiner="none")).own()
    assert any("encoder" in name for name in some) and not any("encoder" in name for name in none)
    without(**batch_for("t5")).loss.backward()


def test_the_final_norm_and_the_head_train_beside_it() -> None:
    model = tiny_llama()
    adapter = trimtab.attach(model, READ(size=8, train_also=("head", "final_norm")), keep_base="host")
    full = {entry.name for entry in adapter.trainable() if entry.group != "adapter"}
    assert full == {"model.norm.weight", "lm_head.weight"}
    train(model, adapter, optimizer_for(adapter), range(1, 4))
    model = vit()
    names = {entry.name for entry in trimtab.attach(model, READ(size=8, train_also=("final_norm",))).trainable()}
    assert {name for name in names if "read" not in name} == {"vit.layernorm.weight", "vit.layernorm.bias"}


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "inner norms": (tiny_llama, {"train_also": ("norms",)}, "'norms' would need gradients through the backbone"),
    "embeddings": (tiny_llama, {"train_also": ["embeddings"]}, "'embeddings' would need gradients"),
    "last of nothing": (tiny_llama, {"cell": "none"}, "use aggregate='mean'"),
    "no size": (tiny_llama, {"size": 0}, "size"),
    "no such cell": (tiny_llama, {"cell": "lru"}, "cell"),
    "no such list": (tiny_llama, {"blocks": ("layer",)}, "'layer' fits no list of blocks.*model.layers"),
    "no blocks": (tiny_mlp, {}, "has no list of blocks that could be found"),
    "a tied head": (tiny_gpt2, {"train_also": ["head"]}, "lm_head of GPT2LMHeadModel is tied to the embeddings"),
    "no final norm": (tiny_bert, {"train_also": ("final_norm",)}, "has no norm behind its last block"),
    "no width": (tiny_encoder, {"blocks": ("layers",)}, "give width="),
}


@pytest.mark.parametrize(("make", "settings", "message"), BAD.values(), ids=BAD.keys())
def test_bad_settings_are_named_and_the_model_is_left_alone(make: Any, settings: dict[str, Any], message: str) -> None:
    model = make()
    before, training = list(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(trimtab.ConfigError, match=message):
        trimtab.attach(model, {"name": "read", **settings})
    assert list(model.state_dict()) == before
    assert [module.training for module in model.modules()] == training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_of_another_base_or_shape_is_refused(tmp_path: Path) -> None:
    _model, adapter = trained_llama()
    adapter.save(tmp_path)
    other = tiny_llama(seed=5)
    with pytest.raises(trimtab.CheckpointError, match="another base"):
        trimtab.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, token_ids()), logits(tiny_llama(seed=5), token_ids()))


def test_a_copied_model_reads_with_its_own_network() -> None:
    model, _adapter = trained_llama()
    ids = token_ids()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if n.endswith("output_bias")).add_(1.0)
    assert not torch.equal(logits(twin, ids), logits(model, ids))


def test_gradients_add_up_over_micro_batches() -> None:
    ids = token_ids(rows=4)

    def gradients(parts: int) -> dict[str, Tensor]:
        model = tiny_llama()
        adapter = trimtab.attach(model, READ(size=8, init="drawn"))
        for part in ids.chunk(parts):
            (model(input_ids=part, labels=part).loss / parts).backward()
        return {entry.name: entry.parameter.grad for entry in adapter.trainable()}

    whole, split = gradients(1), gradients(2)
    assert all(torch.allclose(whole[name], split[name], atol=1e-6) for name in whole)
