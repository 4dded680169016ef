"""What READ and Ladder have in common: right gradients, copies, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_parts import config_for, shaken, trained_llama
from families_for_tests import bart, batch_for, gpt_neox
from models_for_tests import logits, tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama, tiny_mlp, tiny_t5, token_ids

import trimtab

METHODS = ("read", "ladder")


@pytest.mark.parametrize(
    "config",
    [trimtab.READ(size=3, cell="gru", init="drawn"), trimtab.Ladder(reduction=4, temperature=1.0)],
    ids=METHODS,
)
def test_gradients_are_right_in_float64(config: trimtab.Method) -> None:
    """Of every tensor of both networks of an encoder-decoder, against differences of the loss."""
    model = bart().double()
    adapter = trimtab.attach(model, config)
    shaken(adapter)
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
        # Keys may be moved by a constant without effect, and so may all that a softmax does not see.
        assert slope != 0.0 or "k_proj.bias" in entry.name, entry.name


@pytest.mark.parametrize("method", METHODS)
def test_encoder_outputs_of_another_input_are_refused(method: str) -> None:
    model = tiny_t5()
    shaken(trimtab.attach(model, config_for(method)))
    batch = batch_for("t5")
    own = model.get_encoder()(input_ids=batch["input_ids"])
    answer = model(encoder_outputs=own, labels=batch["labels"]).logits
    torch.testing.assert_close(answer, model(input_ids=batch["input_ids"], labels=batch["labels"]).logits)
    foreign = copy.deepcopy(own)
    for outputs in (foreign, own):
        outputs.last_hidden_state = outputs.last_hidden_state.detach() + 1
        with pytest.raises(trimtab.ConfigError, match="run the encoder again with the adapter at work"):
            model(encoder_outputs=outputs, labels=batch["labels"])


@pytest.mark.parametrize("method", METHODS)
def test_a_copied_model_has_a_network_of_its_own(method: str) -> None:
    """Also when it is copied while the outputs of a forward are there."""
    model, adapter = trained_llama(config_for(method))
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    with torch.no_grad():
        twin.get_parameter(next(name for name in adapter.own() if name.endswith("bias"))).add_(1.0)
    assert not torch.equal(logits(twin, ids), logits(model, ids))
    pair = bart()
    trimtab.attach(pair, config_for(method))
    pair(**batch_for("bart")).loss.backward()
    copy.deepcopy(pair)(**batch_for("bart")).loss.backward()


SAVED = [trimtab.READ(size=8, cell="gru"), trimtab.Ladder(reduction=4, layers=(1,), init="drawn")]


@pytest.mark.parametrize("config", SAVED, ids=METHODS)
def test_a_file_of_another_base_is_refused(config: trimtab.Method, tmp_path: Path) -> None:
    """And leaves that base as it was; its own base gets the settings back."""
    _model, adapter = trained_llama(config)
    adapter.save(tmp_path)
    other = tiny_llama(seed=5)
    with pytest.raises(trimtab.CheckpointError, match="another base"):
        trimtab.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, token_ids()), logits(tiny_llama(seed=5), token_ids()))
    given = config.model_dump(exclude_unset=True)
    assert given.items() <= trimtab.load_adapter(tiny_llama(), tmp_path).config.model_dump().items()


BAD: dict[str, dict[str, tuple[Any, dict[str, Any], str]]] = {
    "read": {
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
    },
    "ladder": {
        "odd width": (
            tiny_llama,
            {"reduction": 3},
            "reduction=3: hidden_size = 32 of LlamaConfig is no multiple of it",
        ),
        "heads": (
            tiny_gpt2,
            {"reduction": 16},
            "reduction=16: n_embd = 32 .* is 2, which n_head = 4 heads cannot share",
        ),
        "rotated heads": (gpt_neox, {"reduction": 4}, "heads that can be rotated cannot share"),
        "no such layer": (tiny_llama, {"layers": (0, 2)}, "model.layers has no block 2; its blocks are 0 to 1"),
        "no order": (tiny_llama, {"layers": (1, 0)}, "layers = .*in rising order"),
        "no layer": (tiny_llama, {"layers": ()}, "layers = .*to keep"),
        "temperature": (tiny_llama, {"temperature": 0.0}, "temperature"),
        "init": (tiny_llama, {"init": "fisher"}, "init"),
        "inner norms": (tiny_llama, {"train_also": ("norms",)}, "which Ladder never computes"),
        "no blocks": (tiny_mlp, {}, "has no list of blocks that could be found"),
    },
}


@pytest.mark.parametrize(("method", "fault"), [(method, fault) for method, faults in BAD.items() for fault in faults])
def test_bad_settings_are_named_and_the_model_is_left_alone(method: str, fault: str) -> None:
    make, settings, message = BAD[method][fault]
    model = make()
    before, training = list(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(trimtab.ConfigError, match=message):
        trimtab.attach(model, {"name": method, **settings})
    assert list(model.state_dict()) == before
    assert [module.training for module in model.modules()] == training
    assert all(parameter.requires_grad for parameter in model.parameters())
