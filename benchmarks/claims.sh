#!/usr/bin/env bash
# Makes out/bench-claims, and shows what is claimed of our methods, on 200 pairs: planned schedules and the paper's; one
# predictor on many grids, and what histories hold, side by side; then, alone, how long planning, training and
# calibration take.
set -euo pipefail
cd "$(dirname "$0")/.."
models/recipes/flux-runs.sh

model=models/emoji-flux
.venv/bin/torchrun --nproc-per-node 2 -m lesa.cli bench $model --batch-size 25 --timed 0 --no-bound --out out/bench-claims
.venv/bin/python benchmarks/claims.py out/bench-claims

benchmarks/grids.sh > out/bench-grids.txt 2>&1 &
grids=$!
benchmarks/histories.sh
wait $grids || failed=$?
cat out/bench-grids.txt
test -z "${failed:-}"

rm -rf out/timed/trained out/timed/calibrated
.venv/bin/lesa plan $model --data out/runs --budgets 8 --forecaster lagrange:3
.venv/bin/lesa train $model --data out/runs --budgets 8 --forecaster lagrange:3 --rounds 3 \
    --validation-prompts $model/prompts/validation.txt --validation 24 --out out/timed/trained || test $? -eq 3
.venv/bin/lesa calibrate $model --prompts $model/prompts/train.txt --out out/timed/calibrated || test $? -eq 3
