"""Cached hidden states: the FLOPs of a later visit, against a bound that is counted by hand.

Legend: T tokens, N blocks, d width, k size of the recurrence, V words, i width of the cross-attention's values. A
multiply-add is 2; each term below is a matrix product of the forward, or of the backward.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hidden_parts import open_cache, quiet
from models_for_tests import tiny_llama
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import trimtab
from trimtab.bench.meters import count_flops

T, d, k, V, i = 48, 64, 16, 256, 64
#: phi W' and its dW (phi gets no gradient); h W_hh', its dW and its dh.
PER_BLOCK = 4 * d * k + 6 * k * k
#: W_o forward, dW and dh; the frozen head forward and dx.
BEHIND = 6 * k * d + 4 * d * V


def counts(model: nn.Module, folder: Path) -> tuple[int, int, int, int]:
    """FLOPs of full training, of READ, and of a first and a later visit; one row of T tokens (on either side)."""
    ids = torch.randint(3, V, (1, T), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}

    def step() -> None:
        model(**batch).loss.backward()

    model.set_attn_implementation("eager")  # its products are counted; those of some fused kernels are not
    model.train()
    full = count_flops(step)
    cache = open_cache(trimtab.attach(model, trimtab.READ(size=k)), folder)

    def visit() -> None:
        with quiet(), cache.batch(batch):
            step()

    return full, count_flops(step), count_flops(visit), count_flops(visit)


def test_a_decoder(tmp_path: Path) -> None:
    """No more than the network and what is behind the blocks: the head alone is two thirds of it.

    The rotary angles are formed outside of the blocks, by a product of T x 1 and 1 x (d / heads / 2).
    """
    sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": 4, "vocab_size": V}
    full, plain, first, later = counts(tiny_llama(**sizes, num_key_value_heads=4), tmp_path)
    bound = T * (4 * PER_BLOCK + BEHIND + d // 4)
    assert first == plain  # storing costs no product
    assert 0.95 * bound < later <= bound
    assert 4 * T * d * V > 0.6 * later
    assert later < 0.25 * plain and later < 0.1 * full


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """The decoder's blocks also read c_j, which gets a gradient: 6 i k more, and h W_hh' once more for it.

    P_j V' is formed from q_j and k_j (4 T T i); in the backward again, and then P_j' dc (6 T T i; torch's own
    attention is not formed again, so that 4 T T i are left).
    """
    torch.manual_seed(0)
    config = T5Config(
        d_model=d,
        d_kv=16,
        d_ff=4 * d,
        num_layers=4,
        num_heads=4,
        vocab_size=V,
        dropout_rate=0,
        decoder_start_token_id=0,
    )
    full, plain, first, later = counts(T5ForConditionalGeneration(config), tmp_path)
    joined = 6 * i * k + 2 * k * k + 10 * T * i
    bound = T * (4 * PER_BLOCK + 4 * (PER_BLOCK + joined) + 6 * k * i + BEHIND)
    assert first == plain
    assert 0.95 * bound < later <= bound
    assert later < 0.25 * plain and later < 0.1 * full
