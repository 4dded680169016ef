"""The demo's run by ReLoRA, by LoRA with the same warm start, and by full training, one after another.

    python benchmarks/demo_methods.py                # three runs, 1.5 to 3 minutes each on 2 cores
    python benchmarks/demo_methods.py --dtype bf16   # frozen weights in bf16, with a carry
    python benchmarks/demo_methods.py --quick        # 30 steps, to see that it runs

All three see the same tokens in the same order. The rank is of the update since the end of the warm start (for
full training: since the beginning): singular values above 1e-2 of the largest, over all adapted matrices. The
runs are far too short to tell which method is better; what they show is the rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console

from trimtab.bench.runner import circumstances, markdown_table
from trimtab.loadconfig import load_config
from trimtab.report.spectrum import Spectrum
from trimtab.train.run import pretrain

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo.yaml"


QUICK = ("train.steps=30", "schedule.warmup_steps=2", "schedule.rewarm_steps=2", "eval.every=0", "eval.tokens=2048")


def rows(quick: bool) -> dict[str, list[str]]:
    """The runs by name, with what they change in the demo's config."""
    demo = load_config(DEMO, [])
    relora = demo.method.model_dump(exclude_defaults=True)
    if quick:
        relora |= {"warm_start_steps": 6, "restart_every": 8}
    lora = {key: relora[key] for key in ("rank", "alpha", "warm_start_steps")}
    return {
        "ReLoRA": [f"method={json.dumps({'name': 'relora', **relora})}"],
        "LoRA, same warm start": [f"method={json.dumps({'name': 'lora', **lora})}"],
        "full training": ["method={name: full}", f"optim.lr={demo.optim.warm_start_lr}"],
    }


def main() -> None:
    """Run the three and print their table."""
    parser = argparse.ArgumentParser(description="The demo's run by ReLoRA, by LoRA, and by full training.")
    parser.add_argument("--quick", action="store_true", help="30 steps, to see that it runs")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="compute dtype of the runs")
    chosen = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for label, changes in rows(chosen.quick).items():
            common = [f"dtype={chosen.dtype}", f"out={folder}", f"name=run{len(table)}"]
            config = load_config(DEMO, [*changes, *(QUICK if chosen.quick else ()), *common])
            result = pretrain(config, console=Console(quiet=True))
            assert result.evaluation is not None
            spectrum = Spectrum.load(result.folder / "spectrum.json")
            ranks = [matrix.rank for matrix in spectrum.matrices]
            table.append(
                [
                    label,
                    str(len(config.restarts())),
                    f"{min(ranks)} / {median(ranks):g} / {max(ranks)}",
                    "-" if spectrum.bound is None else str(spectrum.bound),
                    f"{result.evaluation.loss:.3f}",
                    f"{result.evaluation.bits_per_byte:.4f}",
                ]
            )
    print(f"examples/demo.yaml; {circumstances()}\n")
    names = ["method", "restarts", "rank of the update: min / median / max", "bound", "nats/token", "bits/byte"]
    print(markdown_table(names, table))


if __name__ == "__main__":
    main()
