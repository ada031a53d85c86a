"""What the site needs beside the pages of this folder: those that lie elsewhere, with links that hold.

Pages link to one another as they lie in the repository, so that they can be read there. The site has those of docs/ at
its root, README.md as its first page, and the others where the repository has them.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOME, SCRIPTS = "README.md", "tests/first_hour/*.sh"
OUTSIDE = [
    HOME,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in (
            *(f"models/{one}" for one in ("*/README.md", "*/sheet.png", "*/*/README.md", "*/*/sheet.png")),
            *("integrations/*/README.md", "integrations/*/*.png"),
            SCRIPTS,
        )
        for path in ROOT.glob(pattern)
        if path.parent.name != "lesa"
    ),
]
"""What the site takes from outside of docs/."""
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def place(path: str) -> str:
    """Return where the site has a file of the repository."""
    return "index.md" if path == HOME else path.removeprefix("docs/")


def origin(place: str) -> str:
    """Return which file of the repository the site has at a place."""
    if place == "index.md":
        return HOME
    return place if place in OUTSIDE else f"docs/{place}"


def with_links(markdown: str, at: str) -> str:
    """Turn the links of a page, from file to file of the repository, into those from page to page of the site."""
    folder = posixpath.dirname(origin(at))

    def turned(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        if re.match(r"\w+:", target):
            return link[0]
        file = posixpath.normpath(posixpath.join(folder, target))
        return before + posixpath.relpath(place(file), posixpath.dirname(at) or ".") + after

    return LINK.sub(turned, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add what lies elsewhere."""
    from mkdocs.structure.files import File

    for path in OUTSIDE:
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links hold."""
    return with_links(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Set off what a function raises: docstrings say it in a paragraph of its own."""
    return html.replace("<p>Raises: ", "<p><strong>Raises:</strong> ") if page.file.src_uri == "api.md" else html
