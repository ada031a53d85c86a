"""What the command that examines is asked with."""

from __future__ import annotations

from typing import Any

from lesa.cli import options


def add(commands: Any) -> None:
    """Add the command."""
    words = "what is installed, and what will work with a pipeline, what will not, and why"
    more = (
        "With a MODEL the pipeline is loaded and called up to its first step: one run of its transformer a stream. "
        "Exits with 1 where a call as it is would be refused."
    )
    examples = ("lesa doctor", "lesa doctor models/emoji-flux", "lesa doctor models/emoji-qwen --steps 20")
    parser = options.command(commands, "doctor", "doctor.doctor", words, examples, optional=True, more=more)
    options.add_calls(parser)
    parser.add_argument("--prompt", default="a red apple", help="what it is called with ('a red apple')")
