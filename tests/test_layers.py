"""Each folder imports only from those above it in the list, and the front door is imported by none."""

import ast
from pathlib import Path

import pytest

import lesa

ROOMS = ["rows", "predictors", "host", "learn", "bench", "cli"]
HOUSE = Path(lesa.__file__).parent
FILES = sorted(path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*.py"))
INSIDE = [file for file in FILES if "/" in file]


def imported(source: str) -> set[str]:
    """The modules that a source file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "modules of this package are imported by their whole names"
            modules |= {f"{node.module}.{name.name}" for name in node.names}
    return modules


def rooms_of(source: str) -> set[str]:
    return {module.split(".")[1] for module in imported(source) if module.startswith("lesa.")}


def test_everything_lives_in_a_room():
    assert {file.split("/")[0] for file in INSIDE} == set(ROOMS)
    assert set(FILES) - set(INSIDE) <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("file", INSIDE)
def test_a_room_imports_only_from_those_above(file):
    source, room = (HOUSE / file).read_text(), file.split("/")[0]
    assert "lesa" not in imported(source), f"{file} imports the front door"
    below = rooms_of(source) - set(ROOMS[: ROOMS.index(room) + 1])
    assert not below, f"{file} imports from {below}, which {room} knows nothing of"


def test_schedules_need_no_torch():
    modules = imported((HOUSE / "rows/schedule.py").read_text())
    assert not any(module.split(".")[0] == "torch" for module in modules)


@pytest.mark.parametrize(
    "source",
    [
        "import lesa.rows.plan",
        "from lesa.rows.plan import Plan",
        "from lesa import rows",
        "def f():\n    from lesa.rows.plan import Plan",
    ],
)
def test_every_way_to_import_a_room_is_seen(source):
    assert rooms_of(source) == {"rows"}
