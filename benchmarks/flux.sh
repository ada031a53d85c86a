#!/usr/bin/env bash
# Makes out/bench: every method on emoji-flux, on the schedules of the paper and on the one planned for it, what
# `lesa calibrate` keeps of 12 training prompts, other projects' caches and better samplers among them, and all of them
# against 500 steps too. Two processes share the pictures; one of them times, alone. Scores that fetch weights of their
# own need the extra `scores` and a network; without them their columns say so.
set -euo pipefail
cd "$(dirname "$0")/.."
export LESA_HOME=out/bench-home
model=models/emoji-flux

.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[peers]'
if ! compgen -G "$LESA_HOME/shelf/*/*" > /dev/null; then # once: a run that goes on has the same methods
    .venv/bin/lesa calibrate $model --prompts $model/prompts/train.txt --limit 12 --budgets 10,8,6,5,4 || test $? -eq 3
fi
.venv/bin/torchrun --nproc-per-node 2 -m lesa.cli bench $model --calibrated "$LESA_HOME"/shelf/*/* --pairs 100 \
    --batch-size 25 --fine 500 --peers all --scores MS-SSIM,LPIPS,CLIP,ImageReward --differences calibrated
