#!/usr/bin/env bash
# Makes out/grids/SIZE-STEPS: runs of emoji-flux on eight grids, each an image size in pixels and a number of steps.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-flux
for grid in 64-50 64-40 64-28 64-20 96-50 96-40 96-28 96-20; do
    size=${grid%-*} steps=${grid#*-}
    .venv/bin/lesa collect $model --prompts $model/prompts/train.txt --limit 32 --steps $steps --tokens 41 \
        --call "{\"height\": $size, \"width\": $size}" --out out/grids/$grid
done
