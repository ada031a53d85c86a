#!/usr/bin/env bash
# Makes models/emoji-flux/lesa/lesa-many: one predictor for 20 to 50 steps, two image sizes and 4 to 10 full steps,
# trained on schedules planned for Lagrange rows, then once more on schedules planned for itself; from the runs of
# flux-grids.sh, which it makes first.
set -euo pipefail
cd "$(dirname "$0")/../.."
models/recipes/flux-grids.sh

model=models/emoji-flux out=models/emoji-flux/lesa/lesa-many

train() {
    .venv/bin/lesa train $model --data out/grids/{64,96}-{50,40,28,20} --method lesa-continuous --tap output \
        --budgets 10,8,6,5,4 --updates 0 3000 --rounds 1 --floor -50 \
        --validation-prompts $model/prompts/validation.txt --validation 16 "$@" ||
        test $? -eq 3 # of no use, which it has said
}

train --forecaster lagrange:3 --out out/many
train --predictor out/many --out $out
rm -r $out/ground-truth
