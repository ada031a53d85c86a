#!/usr/bin/env bash
# Makes models/emoji-scene: trains a FluxPipeline that draws scenes of emoji; goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=models/emoji-scene
export OMP_NUM_THREADS=1
.venv/bin/python models/scene_atlas.py models/emoji-flux $model
.venv/bin/python models/emoji_scene.py vae $model --minutes 5.5
.venv/bin/python models/emoji_scene.py scene $model --minutes 75
.venv/bin/python models/emoji_scene.py export $model
.venv/bin/python models/emoji_scene.py evaluate $model
.venv/bin/python benchmarks/regime.py $model models/emoji-flux
