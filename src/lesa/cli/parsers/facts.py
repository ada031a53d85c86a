"""What the commands that run no pipeline are asked with."""

from __future__ import annotations

from typing import Any

from lesa.cli import options
from lesa.rows.tap import PLACES

CONVERTED = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen": "Qwen/Qwen-Image",
    "qwen-lightning": "lightx2v/Qwen-Image-Lightning",
    "hunyuanvideo": "hunyuanvideo-community/HunyuanVideo",
}


def add(commands: Any) -> None:
    """Add the commands."""
    example = "lesa rows models/emoji-flux/lesa/lesa-continuous"
    parser = options.add(commands, "rows", "facts.rows", "print the rows of a predictor", example)
    parser.add_argument("predictor", metavar="PREDICTOR", help="its folder")
    parser.add_argument("--stream", help="cond or uncond; default: its first")
    _add_flops(commands)
    _add_convert(commands)


def _add_flops(commands: Any) -> None:
    words = "count the FLOPs of steps and runs from configurations alone, without weights"
    example = "lesa flops --model models/emoji-flux --schedules every:1,paper:7"
    parser = options.add(commands, "flops", "facts.flops", words, example)
    parser.add_argument(
        "--model", metavar="MODEL", help="folder or hub name of a pipeline; default: the real models, as published"
    )
    parser.add_argument("--steps", type=options.read_count, help="default: the model's own, or 50")
    parser.add_argument(
        "--call", type=options.read_call, default={}, help="""arguments of its call, e.g. '{"height": 512}'"""
    )
    parser.add_argument("--streams", type=options.read_count, help="2 under guidance; default: as the call says")
    parser.add_argument(
        "--text-tokens", type=options.read_count, help="default: as many as prompts are padded to; Qwen-Image: 23"
    )
    parser.add_argument(
        "--schedules",
        type=options.read_schedules,
        default="every:1,paper:7,paper:10",
        help="of --model (every:1,paper:7,paper:10)",
    )


def _add_convert(commands: Any) -> None:
    words = "make a predictor of ours of a checkpoint of the authors' released code"
    more = "Nothing in the file is executed. Its KANs may take all S + 1 times of the grid, or S, without the last one."
    example = "lesa convert checkpoint.pt --model flux --grid 50 --interval 7 --out out/lesa"
    parser = options.add(commands, "convert", "facts.convert", words, example, more)
    parser.add_argument("file", metavar="FILE", help="the checkpoint, a .pt file")
    parser.add_argument("--model", choices=CONVERTED, required=True, help="which model it was trained for")
    parser.add_argument("--pipeline", metavar="MODEL", help="another pipeline's folder or hub name, of that class")
    parser.add_argument(
        "--grid",
        required=True,
        help="what it was trained on: steps of the model's own grid (50), all S + 1 times (1.0,0.98,...,0), or a JSON "
        "file that holds them, alone or under 'grid'",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--interval", type=options.read_count, help="of the paper's schedule, e.g. 7")
    which.add_argument("--schedule", type=options.read_schedule, help="another schedule, e.g. at:0,2")
    parser.add_argument("--bounds", type=options.read_bounds, help="falling times between stages; default: the paper's")
    parser.add_argument("--tap", choices=PLACES, default="feature", help="where it was trained; default: the paper's")
    parser.add_argument(
        "--order",
        choices=("newest", "oldest"),
        default="newest",
        help="the past feature that a stage's first weight belongs to (newest, as in the paper's equations)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
