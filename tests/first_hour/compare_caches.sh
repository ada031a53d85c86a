#!/usr/bin/env bash
# The first hour with a comparison of caches: rows without training and trained ones, on equal terms; tables, plots, and
# a record that is measured again. In about two minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
LESA=${LESA:-lesa} MODEL=${MODEL:-models/emoji-flux} OUT=${OUT:-out/first-hour/compare}
STEPS=${STEPS:-20} # of each run here; the model's own are 50
rm -rf "$OUT"

# Rows by name, on two schedules and on those that the default chooses itself
$LESA bench "$MODEL" --steps "$STEPS" --pairs 2 --timed 1 --schedules every:3,every:5 --budgets "" --no-bound \
    --rows default reuse taylor:1 lagrange:1 --out "$OUT/mine"
# One setting more; what is there is not measured again
$LESA bench "$MODEL" --steps "$STEPS" --pairs 2 --timed 1 --schedules every:3,every:5 --budgets "" --no-bound \
    --rows default reuse taylor:1 lagrange:1 lagrange:2 --out "$OUT/mine"
$LESA report "$OUT/mine" --all --plots pdf # the whole report, and plots for a page
$LESA report "$OUT/mine" --differences lagrange:1
$LESA compare "$OUT/mine" "$OUT/mine" # 0: no difference
$LESA reproduce "$OUT/mine/records.jsonl" # its last picture; a number names the line of another
