#!/usr/bin/env bash
# Makes models/emoji-flux/lesa/*, but lesa-many: the predictors for one grid each, and what the benchmark compares them
# with, from the runs of flux-runs.sh, which it makes first.
set -euo pipefail
cd "$(dirname "$0")/../.."
models/recipes/flux-runs.sh

model=models/emoji-flux out=models/emoji-flux/lesa

train() {
    .venv/bin/lesa train $model --data out/runs --validation-prompts $model/prompts/validation.txt --validation 24 "$@" ||
        test $? -eq 3 # of no use, which it has said; what the benchmark compares is made all the same
}

for n in 7 10; do
    train --schedule paper:$n --method lesa --out $out/lesa-paper$n
    train --schedule paper:$n --method lesa --history all --out $out/lesa-paper$n/with-forecasts
    train --schedule paper:$n --method l2p --out $out/l2p-paper$n
    train --schedule paper:$n --method l2p --loss steps --out $out/l2p-paper$n/per-step
done
for n in 10:2 8:2 6:3 5:3 4:3; do # full steps : degree of the Lagrange rows that the schedule is planned for
    train --budgets ${n%:*} --forecaster lagrange:${n#*:} --rounds 3 --out $out/lesa-planned${n%:*}
done
for n in 10:2 8:2 6:3; do # free rows on the same schedules, of as many past features
    train --budgets ${n%:*} --forecaster lagrange:${n#*:} --method l2p --memories 8 --rounds 3 --out $out/l2p-planned${n%:*}
done
train --budgets 6 --forecaster lagrange:3 --rounds 3 --tap output --out $out/lesa-planned6/at-output
