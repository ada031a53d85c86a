#!/usr/bin/env bash
# Makes out/specialists/SIZE-STEPS and sets them beside one predictor for all eight grids, all trained alike.
set -euo pipefail
cd "$(dirname "$0")/.."
models/recipes/flux-grids.sh

model=models/emoji-flux
specialists=(out/specialists/{64,96}-{50,40,28,20})

for specialist in "${specialists[@]}"; do
    grid=${specialist##*/}
    train() {
        .venv/bin/lesa train $model --data out/grids/$grid --method lesa-continuous --tap output --budgets 6 \
            --updates 0 200 --rounds 2 --validation-prompts $model/prompts/validation.txt --validation 16 "$@" ||
            test $? -eq 3 # of no use, which it has said
    }
    train --forecaster lagrange:3 --out out/specialists/first/$grid
    train --predictor out/specialists/first/$grid --out $specialist
done
.venv/bin/python benchmarks/grids.py --one $model/lesa/lesa-many --specialists "${specialists[@]}"
