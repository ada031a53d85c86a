#!/usr/bin/env bash
# Makes out/demo, in less than four minutes on two cores: calibrates a pipeline that ships without predictors, and draws
# held-out prompts of it in full and accelerated, side by side; then held-out prompts of a FLUX, a HunyuanVideo and a
# Qwen-Image with guidance, drawn with every method, and of a Stable Audio, as WAV files. What is calibrated goes to a
# shelf in out/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-models/unseen-letters}
OUT=out/demo
export LESA_HOME=$OUT/home

mkdir -p $OUT && rm -rf "$LESA_HOME" # each time anew
# 3 is how it ends where rows without training are better; these are kept then
.venv/bin/lesa calibrate "$MODEL" --prompts "$MODEL/prompts/train.txt" --limit 12 --budget 6 \
    --plot $OUT/calibration.png || test $? -eq 3
.venv/bin/python benchmarks/side_by_side.py "$MODEL" --budget 6 --out $OUT/side-by-side.png

.venv/bin/lesa demo --pairs 8 --timed 1 --schedules paper:7 --out $OUT/flux
.venv/bin/lesa demo --model models/emoji-video --pairs 4 --timed 1 --schedules paper:7 --budgets "" --out $OUT/video
.venv/bin/lesa demo --model models/emoji-qwen --pairs 4 --timed 1 --schedules paper:7 --budgets "" --out $OUT/qwen
.venv/bin/python benchmarks/listen.py models/emoji-sound --steps 50 --prompts 2 --out $OUT/sound
