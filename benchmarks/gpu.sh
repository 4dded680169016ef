#!/usr/bin/env bash
# What to run on a machine with one CUDA GPU: every benchmark of a training step, with toy shapes to see that it runs,
# and then at size. What is printed is kept, too, with the deterministic figures in JSON.
#
#   benchmarks/gpu.sh [FOLDER]            FOLDER: runs/gpu-<date>
#   PYTHON=.venv/bin/python benchmarks/gpu.sh
#
# Python needs a CUDA build of torch and trimtab with its extras peft, bnb and energy.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-runs/gpu-$(date +%F)}
mkdir -p "$out"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

nvidia-smi | tee "$out/machine.txt"
"$python" - <<'END' | tee -a "$out/machine.txt" || exit 1
import importlib.metadata as metadata
import platform
import torch
print("python", platform.python_version(), "| CUDA", torch.version.cuda, "| capability", torch.cuda.get_device_capability())
for package in ("torch", "transformers", "peft", "bitsandbytes", "nvidia-ml-py"):
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "is not installed")
END

failed=()
# name of what is kept, script, arguments
bench() {
    local name=$1 script=$2
    shift 2
    printf '\n== benchmarks/%s %s\n' "$script" "$*"
    "$python" "benchmarks/$script" "$@" --device cuda 2>"$out/$name.log" | tee "$out/$name.md" ||
        { failed+=("$name"); tail -n 20 "$out/$name.log"; }
}

bench quick-read read.py --quick
bench quick-methods methods.py --quick
bench quick-step step.py --quick

bench read read.py --costs "$out/read.json" --rounds 11
bench read-64 read.py --costs "$out/read.json" --rounds 11 --sequences 64 --tables costs
bench methods methods.py --costs "$out/methods.json" --rounds 11
bench step step.py --rounds 11

if ((${#failed[@]})); then
    printf '\nfailed: %s; the errors are in %s/*.log\n' "${failed[*]}" "$out"
    exit 1
fi
