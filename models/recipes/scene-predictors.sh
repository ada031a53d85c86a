#!/usr/bin/env bash
# Makes models/emoji-scene/lesa/*: LESA on the paper's schedules, from 48 runs with every step full, which it makes first.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-scene
.venv/bin/lesa collect $model --prompts $model/prompts/train.txt --limit 48 --out out/scene
for n in 7 10; do
    .venv/bin/lesa train $model --data out/scene --validation-prompts $model/prompts/validation.txt --schedule paper:$n \
        --out $model/lesa/lesa-paper$n || test $? -eq 3 # of no use, which it has said
done
