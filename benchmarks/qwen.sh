#!/usr/bin/env bash
# Makes out/bench-qwen: every method on emoji-qwen, on the paper's schedules and on the one planned for it, at every tap
# of a predictor.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/torchrun --nproc-per-node 2 -m lesa.cli bench models/emoji-qwen --no-bound --pairs 100 --batch-size 25 \
    --timed 1 --budgets 10,8 --out out/bench-qwen
