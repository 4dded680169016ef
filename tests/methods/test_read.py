"""READ: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside_parts import trained_llama
from families_for_tests import batch_for, vit
from models_for_tests import logits, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids, train
from torch import Tensor, nn

import trimtab
from trimtab.bench.meters import saved_bytes

READ = trimtab.READ


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
    model, adapter = trained_llama(READ(size=8, cell=cell, aggregate=aggregate, scale=0.5))
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
    model, _ = trained_llama(READ(size=8))
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
    model, _ = trained_llama(READ(size=8))
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
    train(model, adapter, torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)), range(1, 4))
    model = vit()
    names = {entry.name for entry in trimtab.attach(model, READ(size=8, train_also=("final_norm",))).trainable()}
    assert {name for name in names if "read" not in name} == {"vit.layernorm.weight", "vit.layernorm.bias"}


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
