#!/usr/bin/env bash
# Makes out/runs: runs of emoji-flux with every step full. Goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-flux
.venv/bin/lesa collect $model --prompts $model/prompts/train.txt --limit 48 --out out/runs
