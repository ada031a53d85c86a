#!/usr/bin/env bash
# Shows what a history holds, and what storing less of it costs; then unusual runs.
set -euo pipefail
cd "$(dirname "$0")/.."

lesa=models/emoji-flux/lesa
.venv/bin/python benchmarks/memory.py --pairs 200 --histories model int8 fp8 \
    --predictors $lesa/lesa-paper7 $lesa/lesa-paper10 $lesa/lesa-planned6 $lesa/lesa-planned6/at-output
.venv/bin/python benchmarks/hybrid.py --predictor $lesa/lesa-many
