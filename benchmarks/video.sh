#!/usr/bin/env bash
# Makes out/bench-video: every method on clips of emoji-video, at the output and at the norm.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/lesa bench models/emoji-video --pairs 24 --timed 1 --batch-size 24 --schedules paper:7,paper:8,paper:10 \
    --budgets 10,9,8 --out out/bench-video
