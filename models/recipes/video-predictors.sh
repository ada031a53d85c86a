#!/usr/bin/env bash
# Makes models/emoji-video/lesa/*: at the output, the paper's place, and at the norm; and out/runs-video, the runs that
# they learn from.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-video
.venv/bin/lesa collect $model --prompts $model/prompts/train.txt --limit 32 --tap norm --out out/runs-video

train() {
    .venv/bin/lesa train $model --data out/runs-video --rounds 1 --updates 200 150 \
        --validation-prompts $model/prompts/validation.txt --validation 16 "$@" ||
        test $? -eq 3 # of no use, which it has said
}

for n in 7 8 10; do
    train --schedule paper:$n --out $model/lesa/lesa-paper$n
    train --schedule paper:$n --method l2p --out $model/lesa/l2p-paper$n
    train --schedule paper:$n --tap norm --out $model/lesa/lesa-paper$n/at-norm
done
for n in 10 9 8; do
    train --budgets $n --out $model/lesa/lesa-planned$n
done
