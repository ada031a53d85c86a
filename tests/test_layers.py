"""Each room imports only rooms of a lower layer."""

import ast
from pathlib import Path

import pytest

import lesa

LAYERS = [
    {"needs", "schedule"},
    {"grid", "kan", "row", "tap", "metrics", "emoji", "pipelines", "ranks"},
    {"caller", "forecasters", "trajectory", "detour", "models", "scores", "clips", "offload"},
    {"disk", "plan", "guidance"},
    {"predictor"},
    {"conditions"},
    {"runtime", "collect", "flops", "convert", "records", "cost"},
    {"training"},
    {"planning", "outcome"},
    {"benchmark", "stages"},
    {"report", "plots", "peers"},
    {"cli"},
]
HOUSE = Path(lesa.__file__).parent
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
ROOMS = sorted(path.stem for path in HOUSE.glob("*.py") if not path.stem.startswith("__"))


def imported(source: str) -> set[str]:
    """The modules that a source file imports, anywhere in it; those of this package without its name in front."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module == "lesa"):
            inside = f"{node.module}." if node.level and node.module else ""
            modules |= {f"lesa.{inside}{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


def rooms_of(source: str) -> set[str]:
    return {module.split(".")[1] for module in imported(source) if module.startswith("lesa.")}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_of_a_lower_layer(room):
    assert room in LAYER, f"{room}.py is in no layer"
    source = (HOUSE / f"{room}.py").read_text()
    assert "lesa" not in imported(source), f"{room}.py imports the front door"
    upward = {other for other in rooms_of(source) if LAYER.get(other, len(LAYERS)) >= LAYER[room]}
    assert not upward, f"{room}.py (layer {LAYER[room]}) imports {upward}"


def test_schedules_need_no_torch():
    modules = imported((HOUSE / "schedule.py").read_text())
    assert not any(module.split(".")[0] == "torch" for module in modules)


@pytest.mark.parametrize(
    "source",
    [
        "import lesa.rows.plan",
        "from lesa.rows.plan import Plan",
        "from lesa import plan as plans",
        "from .plan import Plan",
        "from . import plan",
        "def f():\n    from lesa.rows.plan import Plan",
    ],
)
def test_every_way_to_import_a_room_is_seen(source):
    assert rooms_of(source) == {"plan"}
