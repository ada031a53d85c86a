#!/usr/bin/env bash
# The first hour of a team that trains a predictor for its model: recorded runs, a schedule, a training, a comparison.
# In about a minute, with far too few runs and updates for a predictor of any use.
set -euo pipefail
cd "$(dirname "$0")/../.."
LESA=${LESA:-lesa} MODEL=${MODEL:-models/emoji-flux} OUT=${OUT:-out/first-hour/train}
STEPS=${STEPS:-12}
rm -rf "$OUT"

$LESA collect "$MODEL" --steps "$STEPS" --prompts "$MODEL/prompts/train.txt" --limit 4 --out "$OUT/runs"
$LESA collect "$MODEL" --steps "$STEPS" --prompts "$MODEL/prompts/train.txt" --limit 6 --out "$OUT/runs" # it grows
$LESA plan "$MODEL" --data "$OUT/runs" --budgets 4
# 3 is how it ends where it was of no use
$LESA train "$MODEL" --data "$OUT/runs" --validation-prompts "$MODEL/prompts/validation.txt" --validation 2 --budgets 4 \
    --rounds 1 --updates 10 10 --out "$OUT/lesa" || test $? -eq 3
$LESA rows "$OUT/lesa"
$LESA generate "$MODEL" 'small red apple on blue, left' --steps "$STEPS" --predictor "$OUT/lesa" --out "$OUT/apple.png"
$LESA bench "$MODEL" --steps "$STEPS" --pairs 2 --timed 0 --schedules every:3 --budgets "" --no-bound \
    --predictors "$OUT/lesa" --out "$OUT/bench"
