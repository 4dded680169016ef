"""Reads Whisper from CTranslate2's `model.bin` into transformers' WhisperForConditionalGeneration.

The file is a list of named arrays, little endian:

    u32 version, 6 | string spec | u32 revision | u32 count
    count times: string name | u8 rank | u32 x rank dimensions | u8 type | u32 bytes | data, row by row
    u32 aliases, each two strings: another name, and the array it stands for

A string is a u16 length, which counts a closing NUL, and its bytes. Nothing is unpickled: sizes are checked against
the file before they are believed, and every array must be known by name and have the shape that the model asks for.
Matrices are kept as floats (quantised files are refused).
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

VERSION, SPEC = 6, "WhisperSpec"
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # also of flags (i1) and counts (i2)
NORMS = {"gamma": "weight", "beta": "bias"}
#: Places in a block: theirs -> ours, of the encoder's and the decoder's alike.
BLOCK = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
}
#: Projections that are one array in the file, in its order.
FUSED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
#: Places outside the blocks.
WHOLE = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.layer_norm",
    "encoder/position_encodings": "encoder.embed_positions",
    "decoder/embeddings": "decoder.embed_tokens",
    "decoder/layer_norm": "decoder.layer_norm",
    "decoder/position_encodings": "decoder.embed_positions",
}
#: Settings of WhisperConfig that are lengths of arrays.
SIZES = (
    ("vocab_size", "decoder/embeddings/weight", 0),
    ("d_model", "decoder/embeddings/weight", 1),
    ("num_mel_bins", "encoder/conv1/weight", 1),
    ("max_source_positions", "encoder/position_encodings/encodings", 0),
    ("max_target_positions", "decoder/position_encodings/encodings", 0),
    ("encoder_ffn_dim", "encoder/layer_0/ffn/linear_0/weight", 0),
    ("decoder_ffn_dim", "decoder/layer_0/ffn/linear_0/weight", 0),
)
#: Arrays that are settings, and what each is where the model is transformers' Whisper (activation 3 is the exact GELU).
FLAGS = {
    "decoder/pre_norm": 1,
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}
#: For the times of words; and the output's weight, which is the embeddings'.
UNUSED = ("decoder/alignment_heads", "decoder/alignment_layer", "decoder/projection/weight")


class BadFile(ValueError):
    """The file is not what it should be; the message names it and says in what."""


class _Cursor:
    """A place in a file's bytes that does not pass their end."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise BadFile(
                f"{self.path} ends within {what}: {count:,} bytes from {self.at:,} on, and it has {len(self.data):,}; "
                "it is cut short or damaged"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str, what: str) -> int:
        value: int = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]
        return value

    def string(self, what: str) -> str:
        raw = self.take(self.number("H", what), what)
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise BadFile(f"{self.path}: {what} at {self.at:,} is no string of this format; the file is damaged")
        return raw[:-1].decode()


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a CTranslate2 file by name, aliases among them, in the types of the file.

    Raises:
        BadFile: another version or model, an unknown type, or bytes that do not add up.
    """
    cursor = _Cursor(Path(path))
    if (version := cursor.number("I", "the version")) != VERSION:
        raise BadFile(f"{path} is of binary version {version}; only version {VERSION} is read: convert the model anew")
    if (spec := cursor.string("the model's kind")) != SPEC:
        raise BadFile(f"{path} holds a {spec!r}, not a {SPEC!r}")
    cursor.number("I", "the revision")
    arrays: dict[str, np.ndarray] = {}
    for number in range(cursor.number("I", "the count of arrays")):
        name = cursor.string(f"the name of array {number}")
        shape = [cursor.number("I", name) for _ in range(cursor.number("B", name))]
        kind, size = cursor.number("B", name), cursor.number("I", name)
        if len(shape) > 3 or 0 in shape:
            raise BadFile(f"{path}: {name} has the shape {shape}, which no array of a Whisper has; it is damaged")
        if kind not in TYPES:
            raise BadFile(f"{path}: {name} is of type {kind}; known are {sorted(TYPES)}")
        dtype = np.dtype(TYPES[kind])
        if math.prod(shape) * dtype.itemsize != size or name in arrays:
            raise BadFile(f"{path}: {name} has {size:,} bytes for {shape} of {dtype}, or comes twice; it is damaged")
        arrays[name] = np.frombuffer(cursor.take(size, name), dtype).reshape(shape)
    for _ in range(cursor.number("I", "the count of aliases")):
        name, of = cursor.string("an alias"), cursor.string("an alias")
        if of not in arrays:
            raise BadFile(f"{path}: {name} stands for {of}, which is not in the file")
        arrays[name] = arrays[of]
    if left := len(cursor.data) - cursor.at:
        raise BadFile(f"{path} goes on for {left:,} bytes after its last array")
    return arrays


def load_whisper(path: str | Path, *, start: int, end: int) -> WhisperForConditionalGeneration:
    """The model in fp32, in eval mode.

    Args:
        path: of a `model.bin`.
        start: the token that every text begins with, which the file does not tell.
        end: the one that it ends with.

    Raises:
        BadFile: see `read_arrays`; or its arrays are not those of a Whisper in floats.
    """
    path = Path(path)
    arrays = read_arrays(path)
    with torch.device("meta"):  # sizes that a file claims take no memory
        model = WhisperForConditionalGeneration(_config(path, arrays, start, end))
    states = _states(path, arrays, model.config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    del wanted["proj_out.weight"]  # is the embeddings'
    for name in sorted(wanted.keys() ^ states.keys()):
        side = "lacks" if name in wanted else "has, and transformers' Whisper has not,"
        raise BadFile(f"{path} {side} {name}")
    for name, shape in wanted.items():
        if shape != states[name].shape:
            raise BadFile(f"{path}: {name} is {tuple(states[name].shape)}; by the rest it would be {tuple(shape)}")
    model.load_state_dict(states, strict=False, assign=True)  # all names were compared
    model.tie_weights()
    return model.eval()


def _config(path: Path, arrays: dict[str, np.ndarray], start: int, end: int) -> WhisperConfig:
    """The model's settings, from the arrays that are settings and from the shapes of the others."""
    for name, wanted in FLAGS.items():
        if name in arrays and arrays[name].tolist() != wanted:
            raise BadFile(f"{path}: {name} is {arrays[name].tolist()}; in transformers' Whisper it is {wanted}")
    read: dict[str, Any] = {}
    for key, name, axis in SIZES:
        if name not in arrays or arrays[name].ndim <= axis:
            raise BadFile(f"{path} has no {name} of {axis + 1} dimensions or more, which every Whisper has")
        read[key] = arrays[name].shape[axis]
    for side in ("encoder", "decoder"):
        if arrays.get(f"{side}/num_heads", np.zeros(1)).shape:
            raise BadFile(f"{path} does not say how many heads its {side} has ({side}/num_heads)")
        heads = int(arrays[f"{side}/num_heads"])
        if heads < 1 or read["d_model"] % heads:
            raise BadFile(f"{path}: {side}/num_heads is {heads}, and the width is {read['d_model']}")
        read[f"{side}_attention_heads"] = heads
        blocks = {name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_")} - {"layer_norm"}
        read[f"{side}_layers"] = len(blocks)
    if not (0 <= start < read["vocab_size"] and 0 <= end < read["vocab_size"]):
        raise BadFile(f"{path} has {read['vocab_size']} tokens; {start} (start) or {end} (end) is none of them")
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return WhisperConfig(**read, **ends, decoder_start_token_id=start, begin_suppress_tokens=None)


def _states(path: Path, arrays: dict[str, np.ndarray], config: WhisperConfig) -> dict[str, Tensor]:
    """The arrays in fp32 under the names of transformers."""
    states: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if name in FLAGS or name in UNUSED or name.endswith("/num_heads"):
            continue
        if array.dtype.kind != "f":
            raise BadFile(f"{path}: {name} is in {array.dtype}, and only files of floats are read")
        tensor = torch.from_numpy(array.astype(np.float32))
        place, _, leaf = name.rpartition("/")
        leaf = NORMS.get(leaf, leaf)
        block = re.fullmatch(r"(encoder|decoder)/layer_([0-9]+)/(.+)", place)
        if block is None and place in WHOLE:
            states[f"model.{WHOLE[place]}.{'weight' if leaf == 'encodings' else leaf}"] = tensor
        elif block and block[3] in BLOCK:
            states[f"model.{block[1]}.layers.{block[2]}.{BLOCK[block[3]]}.{leaf}"] = tensor
        elif block and block[3] in FUSED and tensor.shape[0] == len(FUSED[block[3]]) * config.d_model:
            for part, piece in zip(FUSED[block[3]], tensor.chunk(len(FUSED[block[3]])), strict=True):
                if not (leaf == "bias" and part.endswith("k_proj")):
                    states[f"model.{block[1]}.layers.{block[2]}.{part}.{leaf}"] = piece.clone()
                elif piece.any():
                    raise BadFile(f"{path}: {name} gives the keys a bias, and those of transformers' Whisper have none")
        else:
            raise BadFile(f"{path}: {name} {tuple(array.shape)} is no part of a Whisper")
    return states
