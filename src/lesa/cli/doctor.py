"""The command that examines: doctor."""

from __future__ import annotations

from argparse import Namespace

from lesa.cli import options
from lesa.host.doctor import examine, installed
from lesa.host.loading import loaded


def doctor(given: Namespace) -> int:
    """Say what is installed, and what will work with a pipeline."""
    for finding in installed():
        options.say(str(finding))
    if not given.model:
        options.say_next("doctor", "MODEL")
        return 0
    call = options.runs_of(None, given.calls, 1)[0] if given.calls else {"prompt": given.prompt}
    found = examine(loaded(options.load_options(given)), **(call if isinstance(call, dict) else {"prompt": call}))
    options.say(f"\n{found}")
    if found.accelerates:
        options.say_next("generate", *options.as_given(given), given.prompt)
    else:
        options.say_next("calibrate", *options.as_given(given), "--prompts", "FILE")
    return 0 if found.accelerates else 1
