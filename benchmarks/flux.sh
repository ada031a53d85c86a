#!/usr/bin/env bash
# Makes out/bench: every method on emoji-flux, on the schedules of the paper and on the one planned for it, other
# projects' caches and better samplers among them, and all of them against 500 steps too. Two processes share the
# pictures; one of them times, alone. Scores that fetch weights of their own need the extra `scores` and a network;
# without them their columns say so.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[peers]'
.venv/bin/torchrun --nproc-per-node 2 -m lesa.cli bench models/emoji-flux --pairs 100 --batch-size 25 --fine 500 \
    --peers all --scores MS-SSIM,LPIPS,CLIP,ImageReward
