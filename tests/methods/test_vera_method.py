"""VeRA at work on models: the start, the first steps, what is counted, and the way back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models_for_tests import MODELS, logits, loss_of, tiny_llama, tiny_t5, token_ids, train
from torch import Tensor, nn
from transformers import LlamaConfig, RobertaConfig, RobertaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import trimtab
from trimtab.bench.meters import saved_bytes
from trimtab.methods.vera import VeRAAdapter
from trimtab.nn.pairs import draw

PAIRS = ("per_width", "peft")


def attach(model: nn.Module, **settings: object) -> VeRAAdapter:
    adapter = trimtab.attach(model, {"name": "vera", "rank": 8, **settings})
    assert isinstance(adapter, VeRAAdapter)
    return adapter


def optimizer_of(adapter: trimtab.Adapter, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameter_groups(lr=lr))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_base_and_gives_it_back(family: str, pair: str, dtype: torch.dtype) -> None:
    """b = 0 leaves the function as it was, bit for bit; training moves it; detach restores every bit and class."""
    model = MODELS[family]().to(dtype)
    ids, classes = token_ids(), {name: type(module) for name, module in model.named_modules()}
    before, state = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attach(model, pair=pair)
    assert torch.equal(logits(model, ids), before)
    assert {p.dtype for p in adapter.own().values()} == {torch.float32}
    train(model, adapter, optimizer_of(adapter), range(1, 3))
    after = logits(model, ids)
    assert not torch.equal(after, before)
    with adapter.disabled():
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), after)
    adapter.detach()
    assert torch.equal(logits(model, ids), before)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_both_vectors_get_gradients_as_soon_as_they_can() -> None:
    """b from the first step on; d, which b = 0 hides at first, from the second; nothing else ever."""
    model = tiny_llama()
    adapter = attach(model)
    optimizer = optimizer_of(adapter)
    for step in (1, 2):
        loss_of(model, token_ids(seed=step)).backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == set(adapter.own())
        for name, parameter in adapter.own().items():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (step == 2 or name.endswith("lambda_b")), name
        optimizer.step()
        optimizer.zero_grad()
        adapter.after_step(step, optimizer)


def test_gradients_are_those_of_plain_autograd() -> None:
    """In a whole model in float64, hand-written gradients equal autograd's of W + (b B) (d A) put in place."""
    model = tiny_llama().double()
    adapter = attach(model, targets=("q_proj", "k_proj", "v_proj", "down_proj"), train_also=("norms",))
    with torch.no_grad():
        for name, parameter in adapter.own().items():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    plain = tiny_llama().double().requires_grad_(False)
    own = {name: p.detach().clone().requires_grad_() for name, p in adapter.own().items()}
    weights = {}
    for name, module in adapter.layers.items():
        d, b = own[f"{name}.vera_lambda_d"], own[f"{name}.vera_lambda_b"]
        weights[f"{name}.weight"] = module.weight + (b[:, None] * module.vera_B) @ (d[:, None] * module.vera_A)
    norm = "model.layers.0.input_layernorm.weight"
    weights[norm] = own[norm] = plain.get_parameter(norm).detach().clone().requires_grad_()
    out = torch.func.functional_call(plain, weights, kwargs={"input_ids": token_ids()}).logits
    out.square().mean().backward()
    model(input_ids=token_ids()).logits.square().mean().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    assert set(own) <= set(ours)
    for name, parameter in own.items():
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-9, atol=1e-13), name  # type: ignore[arg-type]


def test_the_papers_parameter_count() -> None:
    """q and v of RoBERTa-base at r = 256: 24 (768 + 256) = 24,576, each layer two vectors of fp32."""
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig())
    adapter = attach(model, rank=256, targets=("query", "value"))
    assert sum(entry.parameter.numel() for entry in adapter.trainable()) == 24_576
    assert len(adapter.trainable()) == 48
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert adapter.config.update_rank == 256


def test_layers_of_one_width_share_one_matrix() -> None:
    """One A for each input width and one B for each output width in the whole model, scaled for its own fan-in."""
    adapter = attach(tiny_llama(), seed=5)
    for letter, widths in (("A", {32, 48}), ("B", {16, 32, 48})):
        held = [getattr(layer, f"vera_{letter}") for layer in adapter.layers.values()]
        assert len({id(matrix) for matrix in held}) == len(widths)
        for matrix in held:
            width = matrix.shape[1 if letter == "A" else 0]
            assert torch.equal(matrix, draw(letter, width, 8, 5))  # type: ignore[arg-type]


class Block(nn.Module):
    """One LLaMA block."""

    def __init__(self, width: int, inner: int, heads: int, groups: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=groups
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        self.block = nn.ModuleList([LlamaDecoderLayer(config, 0).bfloat16().requires_grad_(False)])
        self.rotary = LlamaRotaryEmbedding(config)

    def positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, torch.arange(x.shape[1])[None])
        return cos, sin

    def kept(self, x: Tensor) -> float:
        """Bytes a token that the block keeps for its backward, beyond what it is given and its frozen tensors."""
        positions = self.positions(x)
        frozen = [*self.buffers(), *positions, x]
        for module in self.modules():
            frozen += [t for name in ("vera_A", "vera_B") if isinstance(t := getattr(module, name, None), Tensor)]
        return saved_bytes(lambda: self.block[0](x, position_embeddings=positions), exclude=frozen) / x.shape[1]


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("shape", "share"), [((768, 2048, 12, 12), 0.42), ((1024, 2736, 16, 16), 0.42), ((1024, 2736, 16, 4), 0.431)]
)
def test_a_whole_block_keeps_three_u_beyond_the_frozen_block(shape: tuple[int, ...], share: float) -> None:
    """q/k/v, gate/up and down have a u each, and o's input is kept by the attention: 3 x 512 bytes a token."""
    peft = pytest.importorskip("peft")
    x = torch.randn(1, 64, shape[0], dtype=torch.bfloat16, requires_grad=True)
    frozen = Block(*shape).kept(x)
    ours = Block(*shape)
    attach(ours, rank=256)
    assert ours.kept(x) - frozen == 3 * 512
    theirs = Block(*shape)
    peft.get_peft_model(theirs, peft.VeraConfig(r=256, target_modules=LINEARS))
    assert ours.kept(x) <= share * theirs.kept(x)


def test_a_decoder_reads_the_encoders_output_once() -> None:
    """All cross-attention keys and values of all blocks share one u; it is not held once the last has read it."""
    model = tiny_t5()
    endings = ("EncDecAttention.k", "EncDecAttention.v")
    attach(model, rank=4, targets=endings)
    encoded = torch.randn(2, 7, 32, requires_grad=True)
    batch = {"encoder_outputs": (encoded,), "decoder_input_ids": token_ids()[:2, :5]}
    tiny_u = 2 * 7 * 4 * 4
    kept = [saved_bytes(lambda: model(**batch), exclude=[encoded]) for _ in range(3)]
    frozen = tiny_t5().requires_grad_(False)
    base = saved_bytes(lambda: frozen(**batch), exclude=[encoded])
    assert [value - base for value in kept] == [tiny_u] * 3


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_checkpointing_blocks_changes_nothing(family: str) -> None:
    """Gradients under per-block non-re-entrant checkpointing are the same, from the first step on.

    They are bit-equal but in T5, where checkpointing changes the order in which the blocks' gradients of what
    all of them read are added up.
    """
    grads = []
    for checkpointed in (False, True):
        model = MODELS[family]().double()
        adapter = attach(model)
        with torch.no_grad():
            for parameter in adapter.own().values():
                parameter.add_(0.1)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for step in (1, 2):
            loss_of(model, token_ids(seed=step)).backward()
        grads.append([p.grad for p in adapter.own().values()])
    for plain, other in zip(*grads, strict=True):
        assert torch.equal(plain, other) or (family == "t5" and (plain - other).norm() < 1e-9 * plain.norm())


def test_blocks_compile_once_for_all_depths() -> None:
    """Twelve compiled blocks are one graph and one recompile (the first block's input needs no gradient)."""
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=12)
    adapter = attach(model)
    with torch.no_grad():
        for parameter in adapter.own().values():
            parameter.add_(0.1)
    eager = logits(model, token_ids())
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for block in model.model.layers:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
    model(input_ids=token_ids(), use_cache=False).logits.float().square().sum().backward()
    assert graphs <= 2
    model.eval()
    assert torch.allclose(model(input_ids=token_ids(), use_cache=False).logits, eager, atol=1e-5)
    assert all(p.grad is not None for p in adapter.own().values())
    torch._dynamo.reset()


def test_generation_with_a_cache_is_the_full_forward() -> None:
    """A token at a time (b not folded, a cache in use) gives the logits of the whole sequence."""
    model = tiny_llama().eval()
    adapter = attach(model, rank=16)
    with torch.no_grad():
        for parameter in adapter.own().values():
            parameter.add_(0.3)
    ids = token_ids(rows=2, length=20)
    whole, cache, steps = logits(model, ids), None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_copies_and_pickles_of_a_model_work_alone(pair: str) -> None:
    """A copied model answers alike, and training the copy leaves the original as it is."""
    model = tiny_llama()
    adapter = attach(model, pair=pair)
    train(model, adapter, optimizer_of(adapter), range(1, 3))
    before = logits(model, token_ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, token_ids()), before)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "vera_lambda" in name:
                    parameter.add_(1.0)
        assert not torch.equal(logits(other, token_ids()), before)
    assert torch.equal(logits(model, token_ids()), before)


def test_training_goes_on_from_a_state_bit_for_bit() -> None:
    """Four steps are two steps, a state, and two steps on a fresh model: vectors and optimizer alike."""
    ends = []
    for stop in (None, 2):
        model = tiny_llama(num_key_value_heads=4).bfloat16()
        adapter = attach(model, train_also=("norms",))
        optimizer = optimizer_of(adapter)
        if stop:
            train(model, adapter, optimizer, range(1, stop + 1))
            state, moments = copy.deepcopy(adapter.state_dict()), copy.deepcopy(optimizer.state_dict())
            model = tiny_llama(num_key_value_heads=4).bfloat16()
            adapter = attach(model, train_also=("norms",))
            adapter.load_state_dict(state)
            optimizer = optimizer_of(adapter)
            optimizer.load_state_dict(moments)
        train(model, adapter, optimizer, range(1 + (stop or 0), 5))
        ends.append({entry.name: entry.parameter for entry in adapter.trainable()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] | ends[1])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_and_unmerged_are_one_function(family: str, dtype: torch.dtype) -> None:
    """merge() leaves a plain model whose weights are W + (b B) (d A) rounded once; unmerge() takes it back."""
    model = MODELS[family]().to(dtype)
    adapter = trimtab.attach(model, trimtab.VeRA(rank=8), keep_base="host")
    train(model, adapter, optimizer_of(adapter), range(1, 4))
    before, exact = logits(model, token_ids()), dict(adapter.effective_weights())
    adapter.merge()
    assert not any("vera" in name for name in model.state_dict())
    for name, value in exact.items():
        stored = model.get_parameter(name)
        rows = stored if stored.shape == value.shape and "Conv1D" not in str(type(owner(model, name))) else stored.t()
        assert torch.equal(rows, value.to(dtype)), name
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (logits(model, token_ids()) - before).double().norm() < tolerance * before.double().norm()
    adapter.unmerge()
    assert torch.equal(logits(model, token_ids()), before)


def owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def test_wrong_settings_are_named() -> None:
    """A rank of 0, d = 0, an unknown pair and targets that match nothing: one line each, the model untouched."""
    for wrong in ({"rank": 0}, {"d_init": 0.0}, {"pair": "own"}, {"dropout": 1.0}):
        key, value = next(iter(wrong.items()))
        with pytest.raises(trimtab.ConfigError, match=f"VeRA: {key} = {value!r}: input should be"):
            trimtab.VeRA(**wrong)  # type: ignore[arg-type]
    model = tiny_llama()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(trimtab.TargetError, match="query_proj"):
        attach(model, targets=("query_proj",))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any("Adapted" in str(type(module).__mro__) for module in model.modules())
    attach(model, rank=100)  # above every width: the paper itself has 1,024 at 768
