"""What the command that draws is asked with."""

from __future__ import annotations

from typing import Any

from lesa.cli import options


def add(commands: Any) -> None:
    """Add the command."""
    examples = (
        "lesa generate models/emoji-flux 'small red apple on blue, left' --budget 6 --out apple.png",
        "lesa generate MODEL PROMPT --forecaster lagrange:1 --schedule every:3",
    )
    parser = options.command(commands, "generate", "run.generate", "draw a picture, accelerated", examples)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--out", default="picture.png", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    how = parser.add_mutually_exclusive_group()
    words = "default: what was calibrated for it, or is shipped with the model"
    how.add_argument("--predictor", metavar="FOLDER", help=words)
    how.add_argument("--forecaster", help="one that needs no training: reuse, taylor:1, lagrange:2, ...")
    how.add_argument("--full", action="store_true", help="every step full, for comparison")
    parser.add_argument(
        "--schedule", type=options.read_schedule, help="which steps are full, e.g. paper:7; default: the predictor's"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--budget", type=options.read_count, help="full steps, of those calibrated or shipped")
    words = "what was calibrated with the fewest full steps that promise it: psnr:40, ssim:0.97, lpips:0.1 or drift:-45"
    which.add_argument("--quality", type=options.read_target, metavar="MEASURE:VALUE", help=words)
    words = "where none fits: refuse (the default), draw with every step full, or with rows without training (default)"
    parser.add_argument("--fallback", choices=("refuse", "full", "default"), help=words)
