"""Which blocks a network stands beside: named, repeated, of one stack or two; and what is refused."""

from __future__ import annotations

import pytest
import torch
from models_for_tests import tiny_llama, token_ids
from torch import Tensor, nn

import trimtab
from trimtab.nn.stacks import find_stacks

READ = trimtab.READ


def test_a_block_that_a_list_holds_several_times_is_read_each_time() -> None:
    """As torch's recurrence over what its calls give; the backbone gets no graph, and Ladder refuses."""
    model = tiny_llama(num_hidden_layers=3).eval()
    model.model.layers[1] = model.model.layers[2] = model.model.layers[0]
    ids, found = token_ids(), []
    handle = model.model.layers[0].register_forward_hook(lambda _, args, out: found.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    with pytest.raises(trimtab.ConfigError, match="runs a block 3 times"):
        trimtab.attach(model, trimtab.Ladder(reduction=4))
    adapter = trimtab.attach(model, READ(size=8, init="drawn", aggregate="mean"))
    own = {name.rpartition("read.")[2]: p.detach() for name, p in adapter.own().items()}
    layer = nn.RNN(32, 8, batch_first=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").data.copy_(own[f"cells.0.{name}"])
    stacked = torch.stack(found, dim=2).flatten(0, 1)
    with torch.no_grad():
        h = layer(nn.functional.rms_norm(stacked, (32,), own["cells.0.norm_weight"], 1e-6))[0].mean(1)
        delta = (h @ own["output_weight"].t() + own["output_bias"]).view_as(found[-1])
        wanted = model.lm_head(model.model.norm(found[-1] + delta))
    inputs: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    answer = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)
    assert not any(states.requires_grad for states in inputs)


def test_a_whole_name_wins_over_an_ending() -> None:
    model = nn.Module()
    model.layers, model.sub = nn.ModuleList([nn.Linear(8, 8)]), nn.Module()
    model.sub.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    (stack,) = find_stacks(model, ("layers",))
    assert stack.name == "layers" and stack.calls == 1
    model.other = model.sub
    del model.layers
    model.more = nn.Module()
    model.more.layers = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(trimtab.ConfigError, match="fits 2 lists"):
        find_stacks(model, ("layers",))
