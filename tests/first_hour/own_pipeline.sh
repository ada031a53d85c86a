#!/usr/bin/env bash
# The first hour with a pipeline of one's own: what will work, a calibration of a few prompts, pictures with it.
# In about a minute: MODEL is any folder of a diffusers pipeline, of which CALL shortens the runs here.
set -euo pipefail
cd "$(dirname "$0")/../.."
LESA=${LESA:-lesa} PYTHON=${PYTHON:-python} MODEL=${MODEL:-models/emoji-schnell} OUT=${OUT:-out/first-hour/own}
export LESA_HOME=${LESA_HOME:-$OUT/home} # a shelf of its own
mkdir -p "$OUT"
printf '%s\n' 'small red apple on blue, left' 'large blue fish on grey, right' 'small green pear on white, left' \
    'large yellow star on purple, right' >"$OUT/prompts.txt"

$LESA doctor                                 # versions, device, extras, the shelf
$LESA doctor "$MODEL" || test $? -eq 1       # 1: a call as it is would be refused

# 3 is how it ends where rows without training are as good; these are kept then
$LESA calibrate "$MODEL" --prompts "$OUT/prompts.txt" --budget 3 --plot "$OUT/curve.svg" || test $? -eq 3
$LESA doctor "$MODEL"                        # what was calibrated fits
$LESA shelf
$LESA generate "$MODEL" 'large red apple on blue, left' --budget 3 --out "$OUT/apple.png"
$LESA generate "$MODEL" 'large red apple on blue, left' --full --out "$OUT/apple-full.png"

# The same in two lines of one's own program; requests of another kind run, too, and are counted
$PYTHON - "$MODEL" <<'PROGRAM'
import sys

import lesa

pipe = lesa.load(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
with lesa.accelerate(pipe, budget=3, fallback="default") as run:
    pipe("large red apple on blue, left", num_inference_steps=1)  # a server warms up
    pipe("large red apple on blue, left")
print(run.summary())
assert run.summary().fallbacks == 1
PROGRAM
