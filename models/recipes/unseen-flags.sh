#!/usr/bin/env bash
# Makes models/unseen-flags: trains a small PixArtSigmaPipeline that draws flags, and says how many of its pictures show what is prompted.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/unseen-flags
.venv/bin/python models/unseen_flags.py prompts $model
OMP_NUM_THREADS=1 .venv/bin/python models/unseen_flags.py pixart $model --minutes 58
.venv/bin/python models/unseen_flags.py export $model
.venv/bin/python models/unseen_flags.py evaluate $model
