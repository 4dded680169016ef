"""Small random models of the shapes that the tests run over, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import trimtab

VOCAB = 97


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Two blocks, 32 wide, grouped-query attention, untied head."""
    torch.manual_seed(seed)
    sizes: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two blocks of Conv1D layers, tied head, no dropout."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "initializer_range": 0.1}
    plain = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **plain))


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    """Two post-norm blocks with biases and a classifier."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    plain = {"vocab_size": VOCAB, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **plain))


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    """Encoder and decoder of two blocks, no biases."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


class Mlp(nn.Module):
    """A plain torch module that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.norm = nn.LayerNorm(32)
        self.last = nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(input_ids % 24, 24).to(self.first.weight.dtype)
        return self.last(torch.relu(self.norm(self.first(x))))


class Encoder(nn.Module):
    """torch's own encoder, whose eval mode reads weights past the layers' forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        block = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)
        self.lm_head = nn.Linear(32, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.encoder(self.embed(input_ids)))


def tiny_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder()


def tiny_mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "mlp": tiny_mlp,
    "encoder": tiny_encoder,
}


def token_ids(seed: int = 1, rows: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """What the model answers, whatever family it is of, without gradients and in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = forward(model, ids)
    model.train(was_training)
    return out


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    extra = {"decoder_input_ids": ids[:, :5]} if type(model).__name__.startswith("T5") else {}
    out = model(input_ids=ids, **extra)
    return out if isinstance(out, Tensor) else out.logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """A loss that every output takes part in."""
    out = forward(model, ids).float()
    targets = torch.arange(out[..., 0].numel()) % out.shape[-1]
    return torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), targets)


def train(
    model: nn.Module,
    adapter: trimtab.Adapter,
    optimizer: torch.optim.Optimizer,
    steps: range,
) -> list[trimtab.StepReport]:
    """Steps numbered from 1 as `after_step` counts them; the data of a step depends on its number alone."""
    reports = []
    for step in steps:
        loss_of(model, token_ids(seed=step)).backward()
        optimizer.step()
        reports.append(adapter.after_step(step, optimizer))
        optimizer.zero_grad()
    return reports
