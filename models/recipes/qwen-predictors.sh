#!/usr/bin/env bash
# Makes models/emoji-qwen/lesa/*: for the paper's schedules at three taps and for planned ones, both streams at once; and
# out/runs-qwen and out/runs-qwen-norm, the runs that they learn from.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-qwen
for tap in feature norm; do
    runs=out/runs-qwen-$tap
    .venv/bin/lesa collect $model --prompts $model/prompts/train.txt --limit 48 --tap $tap --out ${runs%-feature}
done

train() {
    .venv/bin/lesa train $model --validation-prompts $model/prompts/validation.txt --validation 24 --updates 200 200 \
        --rounds 2 "$@" ||
        test $? -eq 3 # of no use, which it has said
}

for n in 7 10; do
    out=$model/lesa/lesa-paper$n
    train --data out/runs-qwen --schedule paper:$n --out $out
    train --data out/runs-qwen --schedule paper:$n --tap output --out $out/at-output
    train --data out/runs-qwen-norm --schedule paper:$n --tap norm --out $out/at-norm
    train --data out/runs-qwen --schedule paper:$n --method l2p --out $model/lesa/l2p-paper$n
done
for n in 10 8; do
    train --data out/runs-qwen --budgets $n --forecaster taylor:1 --out $model/lesa/lesa-planned$n
done
