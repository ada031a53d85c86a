import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"


def test_the_overhead_of_a_small_model_is_printed(monkeypatch, capsys):
    arguments = (
        "--heads 1 --layers 1 --size 32 --text-tokens 4 --steps 10 --schedule paper:4 --repeats 1 --dtypes float32"
    )
    monkeypatch.setattr(sys, "argv", ["overhead.py", *arguments.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "4 image and 4 text tokens, batch 1; 10 steps, paper:4" in printed
    assert printed.count("of the step ratio 2.00") == 4, "loop and call, at each tap"
    feature, output = printed.split(" output tap\n")
    for part in ("full step", "skipped step", "sampler seam", "forecast and rest"):
        assert part in feature and part in output
    assert "context_embedder" in feature and "context_embedder" not in output, "where nothing runs on a skipped step"
