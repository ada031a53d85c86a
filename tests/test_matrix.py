"""The environments that the tests run in: what failed in one runs again, and is added to what passed."""

import sys

import matrix
import pytest

pytest.importorskip("xdist", reason="the matrix shares tests among processes with it")
ONE = matrix.Environment("one", ".".join(map(str, sys.version_info[:2])), matrix.PINNED)
TESTS = """
import pytest

def test_right():
    pass

def test_left():
    pytest.skip("not here")

def test_{name}():
    assert {right}
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout with three tests, and one environment: what these tests run in."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\ntestpaths = ['tests']\n")
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PLACE", tmp_path / "kept")
    monkeypatch.setattr(matrix, "ENVIRONMENTS", [ONE])
    monkeypatch.setattr(matrix.Environment, "program", sys.executable)
    monkeypatch.setattr(matrix, "make", lambda *_: ONE.folder.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(matrix, "find_python", lambda _: sys.executable)
    return tmp_path


def run(house, *options: str, name: str = "wrong", right: str = "False") -> tuple[int, list[str]]:
    """Run the matrix; returns how that ended, and the last cells of the row: passed to tests."""
    (house / "tests" / "test_some.py").write_text(TESTS.format(name=name, right=right))
    page = house / "versions.md"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["matrix.py", "--workers", "0", "--out", str(page), *options])
        ended = matrix.main()
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| one |")]
    return ended, matrix._cells_of(row)[-6:-1]


WRONG = ["1", "1", "1", "", "all"]
NEVER = ["", "", "", "", "not run"]


def test_what_failed_runs_again_alone_and_is_added(house, capsys):
    assert run(house) == (1, WRONG)
    assert run(house, "--again") == (1, ["1", "1", "1", "", "all, 1 of them again"])
    mended = ["2", "0", "1", "", "all, 1 of them again"]
    assert run(house, "--again", right="True") == (0, mended)
    assert "1 passed" in (ONE.folder / matrix.SAID).read_text()
    assert run(house, "--again", right="True") == (1, mended)
    assert "one: it has no run in which tests failed" in capsys.readouterr().out


def test_a_test_that_has_gone_is_not_taken_for_mended(house, capsys):
    assert run(house) == (1, WRONG)
    assert run(house, "--again", name="other", right="True") == (1, WRONG)
    assert "one: " in (said := capsys.readouterr().out) and "its row stays" in said


def test_what_was_stopped_is_no_row(house, capsys):
    assert run(house, right="pytest.exit('enough')") == (1, NEVER)
    assert "before its tests had all run; its row stays" in capsys.readouterr().out
    assert run(house) == (1, WRONG)
    assert run(house, right="pytest.exit('enough')") == (1, WRONG)


def test_what_has_not_run_cannot_run_again(house, capsys):
    assert run(house, "--again") == (1, NEVER)
    assert "one: it has no run in which tests failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(house, "--again", "--quick")
    assert "leave out --quick" in capsys.readouterr().err
