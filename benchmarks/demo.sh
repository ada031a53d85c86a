#!/usr/bin/env bash
# Makes out/demo: held-out prompts of a FLUX, a Qwen-Image with guidance and a HunyuanVideo, drawn with every method.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/lesa demo
for model in emoji-qwen emoji-video; do
    .venv/bin/lesa demo --model models/$model --pairs 8 --timed 2 --schedules paper:7 --budgets "" --out out/demo/$model
done
