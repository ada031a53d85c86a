#!/usr/bin/env bash
# Makes models/unseen-letters: trains a small StableDiffusion3Pipeline that draws letters, and says how many of its pictures show what is prompted.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/unseen-letters
.venv/bin/python models/unseen_letters.py prompts $model
OMP_NUM_THREADS=1 .venv/bin/python models/unseen_letters.py sd3 $model --minutes 58
.venv/bin/python models/unseen_letters.py export $model
.venv/bin/python models/unseen_letters.py evaluate $model
