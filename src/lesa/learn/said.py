"""What a pipeline says in its calls, said once of all the calls of one work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

LIBRARIES = ("diffusers", "transformers")
"""Whose messages these are."""


@contextmanager
def once() -> Iterator[None]:
    """Let each message of diffusers and transformers pass the first time only, such as that of a prompt that is cut.

    A work that runs the same calls over and over says it once; also a decorator of the function that does such work.
    """
    with ExitStack() as stack:
        for handler in {one for name in ("", *LIBRARIES) for one in logging.getLogger(name).handlers}:
            news = _News()
            handler.addFilter(news)
            stack.callback(handler.removeFilter, news)
        yield


class _News(logging.Filter):
    """Passes what the libraries have not said before, and all that others say."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".")[0] not in LIBRARIES:
            return True
        text = record.getMessage()
        known = text in self._said
        self._said.add(text)
        return not known
