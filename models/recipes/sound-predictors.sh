#!/usr/bin/env bash
# Makes models/emoji-sound/lesa/*: rows calibrated for 10 full steps of 100 and of 50, of the data prediction, as its
# sampler adds noise.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-sound
for steps in 100 50; do
    .venv/bin/lesa calibrate $model --steps $steps --prompts $model/prompts/train.txt --limit 16 --budget 10 \
        --out $model/lesa/calibrated-$steps ||
        test $? -eq 3 # of no use, which it has said
done
