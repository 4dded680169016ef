"""What `finetune.py` trains: the models and texts of examples/real_models.py, or stand-ins of their shapes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

REAL_MODELS = Path(__file__).resolve().parents[1] / "examples" / "real_models.py"

#: As SmolLM2's: who speaks stands in a line of its own.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Parts:
    """A model's folder, a file of training examples, another of validation, and what they are, in words."""

    model: Path
    train: Path
    validation: Path
    describe: str


def parts(task: str, out: Path, quick: bool) -> Parts:
    """The parts of a task, made where they are not there: real ones if their packages are installed."""
    ending = "jsonl" if task == "chat" else "csv"
    names = ("smollm2", "chat") if task == "chat" else ("minilm", "pairs")
    described = []
    folders = []
    for name in names:
        folder = None if quick else _real(name, out)
        if folder is None:
            folder = out / "stand-ins" / ("quick" if quick else "whole") / name
            if not folder.exists():
                _STAND_INS[name](folder, quick)
            described.append(f"{name}: a stand-in, seeded and drawn" + ("" if quick else ", of the same shape"))
        else:
            described.append(f"{name}: real")
        folders.append(folder)
    model, data = folders
    return Parts(model, data / f"train.{ending}", data / f"validation.{ending}", "; ".join(described))


def sample(whole: Parts, steps: int, batch: int, folder: Path) -> Parts:
    """Few examples with the lengths of many, so that a short run pads as much as a long one does.

    Of the first 50 steps' examples in a drawn order, sorted by their tokens, `steps` stretches of a step's examples are
    taken, evenly spaced: batches of similar length are these, and batches as drawn are of them all.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(whole.model)
    head, rows = _rows(whole.train)
    random.Random(0).shuffle(rows)
    texts = [_text(row, bool(head)) for row in rows[: max(50, steps) * batch]]
    sizes = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    rows = [rows[n] for n in sorted(range(len(sizes)), key=lambda n: sizes[n])]
    groups = len(rows) // batch
    starts = [batch * int((n + 0.5) * groups / steps) for n in range(steps)]
    kept = [row for start in starts for row in rows[start : start + batch]]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{steps}x{batch}-{whole.train.parent.name}{whole.train.suffix}"
    path.write_text("".join([*head, *kept]), encoding="utf-8", newline="")
    return replace(whole, train=path)


def _rows(path: Path) -> tuple[list[str], list[str]]:
    """The header of a table, if it is one, and the rows of a file as they are written, some on several lines."""
    found = []
    with open(path, encoding="utf-8", newline="" if path.suffix == ".csv" else "\n") as file:
        if path.suffix != ".csv":
            return [], list(file)
        for row in csv.reader(file):
            written = io.StringIO(newline="")
            csv.writer(written).writerow(row)
            found.append(written.getvalue())
    return found[:1], found[1:]


def _text(row: str, table: bool) -> str:
    """What a row of a file says; of a chat all turns."""
    if table:
        return " ".join(next(csv.reader(io.StringIO(row, newline="")))[:2])
    return "\n".join(turn["content"] for turn in json.loads(row)["messages"])


def _real(name: str, out: Path) -> Path | None:
    script = _real_models()
    try:
        return Path(script.make(name, out))
    except script.Missing:
        return None


def _real_models() -> ModuleType:
    if "real_models" not in sys.modules:
        spec = importlib.util.spec_from_file_location("real_models", REAL_MODELS)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["real_models"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["real_models"])
    return sys.modules["real_models"]


# -- stand-ins ---------------------------------------------------------------------------------------


def words(seed: int) -> Iterator[str]:
    """Made-up texts without end, of lengths that spread as those of real ones do."""
    draw = random.Random(seed)
    syllables = ["ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo"]
    known = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    while True:
        length = int(min(250, 3 + draw.lognormvariate(3.2, 0.9)))
        yield " ".join(draw.choices(known, k=length)) + "."


def chats(texts: Iterator[str]) -> Iterator[dict[str, Any]]:
    """A question and an answer each, without end."""
    while True:
        turns = [{"role": "user", "content": next(texts)}, {"role": "assistant", "content": next(texts)}]
        yield {"messages": turns}


def _chats(folder: Path, quick: bool) -> None:
    folder.mkdir(parents=True)
    rows = chats(_short(words(0)) if quick else words(0))
    for split, count in (("train", 200 if quick else 4000), ("validation", 4)):
        with open(folder / f"{split}.jsonl", "w") as file:
            file.writelines(json.dumps(next(rows)) + "\n" for _ in range(count))


def _pairs(folder: Path, quick: bool) -> None:
    folder.mkdir(parents=True)
    texts = _short(words(1))
    for split, count in (("train", 200 if quick else 4000), ("validation", 4)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            rows = [(next(texts), next(texts), ("same", "other")[n % 2]) for n in range(count)]
            csv.writer(file).writerows([("text", "pair", "label"), *rows])


def _short(texts: Iterator[str]) -> Iterator[str]:
    return (text[:100] for text in texts)


def _tokenizer(folder: Path, **special: str) -> int:
    """Write a BPE of the made-up words; how many tokens it has."""
    from transformers import PreTrainedTokenizerFast

    from trimtab.data.tokenizer import train_bpe

    texts = words(2)
    inner = train_bpe((next(texts) for _ in range(300)), 1500).hf.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _smollm2(folder: Path, quick: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    count = _tokenizer(folder, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    if quick:
        sizes |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": count}
        sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)


def _minilm(folder: Path, quick: bool) -> None:
    from transformers import BertConfig, BertModel

    count = _tokenizer(folder, pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    if quick:
        sizes |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, vocab_size=count if quick else 30_522)).save_pretrained(folder)


_STAND_INS = {"smollm2": _smollm2, "minilm": _minilm, "chat": _chats, "pairs": _pairs}
