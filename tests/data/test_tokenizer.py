import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from data_for_tests import KINDS, byte_bpe, text
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.data.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from trimtab.errors import DataError


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_keeps_a_tokenizer(kind: str, tmp_path: Path) -> None:
    """Fingerprint, ids and bytes on disk survive any number of round trips."""
    first = KINDS[kind]()
    first.save(tmp_path / "a")
    second = load_tokenizer(str(tmp_path / "a"))
    second.save(tmp_path / "b")
    assert (first.fingerprint, first.vocab_size, first.eos_id) == (
        second.fingerprint,
        second.vocab_size,
        second.eos_id,
    )
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_bpe_depends_on_its_texts_alone() -> None:
    """The same texts give the same tokenizer; others give another. It holds the size asked for and its end token."""
    texts = [text(i) for i in range(30)]
    first = train_bpe(iter(texts), 290)
    assert first.fingerprint == train_bpe(iter(texts), 290).fingerprint
    assert first.fingerprint != train_bpe(iter(texts[:3]), 290).fingerprint
    assert first.vocab_size == 290
    assert first.hf.convert_ids_to_tokens(first.eos_id) == END_OF_TEXT
    assert train_bpe(iter(["ab"]), 5000).vocab_size == 258  # 256 bytes, end of text, and the one pair there is


def test_a_saved_bpe_loads_beside_a_llama_config(tmp_path: Path) -> None:
    """In a model's folder AutoTokenizer gives the same ids as ours, and decodes to the text."""
    tokenizer = byte_bpe()
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    sample = text(3) + " naïve 😀\n"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(sample).input_ids == tokenizer.hf(sample).input_ids
    assert loaded.decode(loaded(sample).input_ids) == sample


def test_padding_and_truncation_of_a_loaded_tokenizer_are_dropped(tmp_path: Path) -> None:
    """A tokenizer.json that says to cut and pad does neither to a document."""
    inner = byte_bpe().hf.backend_tokenizer
    inner.enable_truncation(5)
    inner.enable_padding(length=9)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END_OF_TEXT).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert json.loads(loaded.to_json())["truncation"] is None
    assert json.loads(loaded.to_json())["padding"] is None


def test_an_unusable_tokenizer_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing folder, file, empty folder, no end-of-text, no hub: each is a DataError naming the tokenizer."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    inner = byte_bpe().hf.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "endless")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    for name, message in {
        str(tmp_path / "missing" / "folder"): "does not exist",
        "./missing": "does not exist",
        str(tmp_path / "file.json"): "is a file",
        str(tmp_path / "empty"): "could not be loaded",
        str(tmp_path / "endless"): "no end-of-text token",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            load_tokenizer(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(DataError, match=r"'owner/name' .*couldn't connect to the hub\).*bpe_vocab_size") as caught:
        load_tokenizer("owner/name")
    assert "\n" not in str(caught.value)


def test_a_bpe_without_texts_is_an_error() -> None:
    """There is nothing to train on: say so."""
    with pytest.raises(DataError, match="no training document"):
        train_bpe(iter([]), 300)
