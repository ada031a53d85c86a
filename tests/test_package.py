"""The package as a whole: its version, front door, imports and dependencies."""

import ast
import inspect
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import lesa
from lesa.host import needs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = ["diffusers", "matplotlib", "scipy", "skimage", "transformers"]
PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
READS_OTHERS_FILES, TORCH_READING = "convert", {"torch.load", "torch.serialization"}
TORCH_PICKLING = {"torch.save", "torch.load", "torch.serialization"}


def names_used(tree: ast.AST) -> set[str]:
    """Every imported module and name and every dotted name of a syntax tree, aliases of imports resolved."""
    aliases, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
            aliases |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            names.add(f"{aliases.get(head, head)}.{rest}")
    return names


def pickling(source: str) -> set[str]:
    """The names in a source file that write or read pickles."""
    tree = ast.parse(source)
    found = {name for name in names_used(tree) if name.split(".")[0] in PICKLING or name in TORCH_PICKLING}
    keywords = {keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords}
    return found | (keywords & {"allow_pickle"})


def third_party(nodes: list[ast.AST]) -> set[str]:
    """The top-level modules imported by the nodes that are neither Python's own nor ours."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    return modules - sys.stdlib_module_names - {"lesa"}


def distributions(requirements: list[str]) -> set[str]:
    """The normalised names of requirements; those that only an extra of theirs asks for are left out."""
    return {normalised(re.match(r"[\w.-]+", r)[0]) for r in requirements if "extra ==" not in r}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


CORE = distributions(PROJECT["dependencies"])
WITH_CORE = CORE | {name for core in CORE for name in distributions(requires(core) or [])}
WITH_BENCH = WITH_CORE | distributions(PROJECT["optional-dependencies"]["bench"])
OF_EXTRAS = {package.module.split(".")[0]: [package.name] for some in needs.NEEDS.values() for package in some}
OWNERS = {**OF_EXTRAS, **packages_distributions()}
"""The distributions of modules: what is installed here tells; of extras that are not, what lesa says. Others are
named as their module: Python 3.10 knows those alone that list their modules in a file of their own."""


def missing(modules: set[str], installed: set[str]) -> set[str]:
    """The modules that none of these distributions provides."""
    return {m for m in modules if not installed & {normalised(owner) for owner in OWNERS.get(m, [m])}}


def test_the_version_is_the_projects():
    assert lesa.__version__ == PROJECT["version"]


@pytest.mark.parametrize("name", lesa.__all__)
def test_a_public_name_exists_and_is_documented(name):
    value = getattr(lesa, name)
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert docstring, f"lesa.{name} has no docstring of its own"
    assert not docstring.startswith(f"{name}("), f"lesa.{name} has only the docstring that Python made up"


def test_there_are_public_names():
    assert {"accelerate", "Schedule"} <= set(lesa.__all__)
    assert len(set(lesa.__all__)) == len(lesa.__all__)


def test_importing_lesa_is_light():
    show = f"import sys, lesa; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_pickles(path):
    assert pickling(path.read_text()) == (TORCH_READING if path.stem == READS_OTHERS_FILES else set())


def loads_weights_only(source: str) -> bool:
    """Whether every call of torch.load in a source file says `weights_only=True`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    said = [{(k.arg, getattr(k.value, "value", None)) for k in call.keywords} for call in loads]
    return bool(said) and all(("weights_only", True) in keywords for keywords in said)


def test_the_one_reader_of_pickles_runs_nothing():
    (source,) = [path.read_text() for path in SOURCES if path.stem == READS_OTHERS_FILES]
    assert loads_weights_only(source)
    assert not loads_weights_only("import torch\ntorch.load('f')")
    assert not loads_weights_only("import torch\ntorch.load('f', weights_only=False)")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import dumps",
        "import joblib.numpy_pickle",
        "import torch\ntorch.save(1, 'f')",
        "import torch as t\nt.load('f')",
        "from torch import load",
        "def f():\n    from torch.serialization import save",
        "np.load('f', allow_pickle=True)",
    ],
)
def test_every_way_to_pickle_is_seen(source):
    assert pickling(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_modules_import_only_what_is_installed_with_them(path):
    tree = ast.parse(path.read_text())
    assert not missing(third_party(tree.body), WITH_CORE), "import an extra's module inside the function that needs it"
    assert not missing(third_party(list(ast.walk(tree))), WITH_BENCH)


def test_a_module_of_an_extra_or_of_nobody_is_seen():
    assert missing({"torch", "PIL", "tqdm", "matplotlib", "nobody"}, WITH_CORE) == {"matplotlib", "nobody"}
    assert third_party(ast.parse("import os, skimage.metrics\nfrom lesa import grid").body) == {"skimage"}


def test_the_oldest_versions_declared_are_those_that_are_tested():
    oldest = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(re.match(r"([\w.-]+)==([\d.]+)", line).groups() for line in oldest if "==" in line)
    declared = dict(r.split(">=") for r in PROJECT["dependencies"] if ">=" in r)
    assert declared and declared == {name: re.sub(r"\.0$", "", tested[name]) for name in declared}


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_is_pinned_for_development(name):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert name in distributions([line for line in lines if "==" in line and not line.startswith("#")])
