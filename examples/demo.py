"""What `make demo` runs: train examples/demo.yaml, let the model write, and say what to look at next."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUN = ROOT / "runs" / "demo"
PROMPTS = ("Fellow citizens of the Senate", "The United States")


def main() -> int:
    """Train, print a sample and the next steps; returns the exit status."""
    old = RUN.with_name("demo-previous")
    if RUN.exists():
        if old.exists():
            shutil.rmtree(old)
        RUN.rename(old)
        print(f"The run of last time is now {shown(old)}; it goes when the demo runs again.")
    words = ["pretrain", str(HERE / "demo.yaml"), f"out={RUN.parent}"]
    print("$ trimtab pretrain examples/demo.yaml\n", flush=True)
    status = subprocess.run([sys.executable, "-m", "trimtab.cli", *words], check=False).returncode
    if status:
        return status
    print_losses()
    print_sample()
    trimtab = shown(Path(sys.executable).with_name("trimtab"))
    print(
        f"""
What you saw: {count("restart")} restarts, each of which merged a low-rank update into the weights and began a new one.
A run of 3 minutes shows the mechanics, not a gain over full training.

The report, with the curves and the rank of the update:
  {shown(RUN / "report.html")}
The same run without restarts; in its report the rank of the update stays at 16:
  {trimtab} pretrain examples/demo.yaml name=lora 'method={{name: lora, rank: 16, alpha: 16, warm_start_steps: 60}}'
What a real run would be, LLaMA-60M on C4:
  {trimtab} pretrain examples/llama-60m-c4.yaml --dry-run"""
    )
    return 0


def events(kind: str) -> list[dict[str, float]]:
    """The events of one kind in the run's metrics."""
    records = (json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == kind]


def count(kind: str) -> int:
    """How many events of a kind the run had."""
    return len(events(kind))


def print_losses() -> None:
    """Validation from the first evaluation to that of the merged model."""
    first, last = events("eval")[0], events("eval")[-1]
    print(
        f"\nValidation, in bits a byte: {first['bits_per_byte']:.3f} after step {first['step']}, "
        f"{last['bits_per_byte']:.3f} at the end (merged model)."
    )


def print_sample() -> None:
    """Load the saved model as anybody would, with transformers, and let it write."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(RUN / "model")
    model = AutoModelForCausalLM.from_pretrained(RUN / "model")
    torch.manual_seed(0)
    tokens = events("step")[-1]["tokens"]
    print(f"\nThe model in {shown(RUN / 'model')} writes (it has read {tokens:,} tokens and knows little):")
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40)
        print(f"  {' '.join(tokenizer.decode(out[0], skip_special_tokens=True).split())}")


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
