"""Names of repositories: asked for on the hub only where they can be such, and only where it can be reached."""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def how(source: str, what: str) -> dict[str, Any]:
    """Return options for a download of a repository that is no folder here: what is known already, if the hub is away.

    It is looked for once: huggingface_hub would try again for half a minute.

    Raises: FileNotFoundError if the name cannot be a repository's.
    """
    if not NAME.fullmatch(source):
        raise FileNotFoundError(
            f"{source} is neither a folder here nor {what} on the hub, where names are OWNER/NAME; check its name."
        )
    return {} if reachable(constants.ENDPOINT) else {"local_files_only": True}


@cache
def reachable(endpoint: str) -> bool:
    """Tell whether the name of a server is known here; behind a proxy that is not asked."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


def is_elsewhere(source: str | Path) -> bool:
    """Tell whether a name is none of a folder here."""
    return not Path(source).is_dir()
