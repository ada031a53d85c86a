"""What a command does, a call does: on a pipeline object, with options that check themselves."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from filelock import FileLock

import lesa
from lesa.bench import records
from lesa.bench.methods import fewer_steps
from lesa.cli import main
from lesa.host.loading import LoadOptions, loaded
from lesa.host.pipelines import arguments_of, source_of, steps_of, with_call
from lesa.learn.collecting import as_collected
from lesa.learn.options import TrainOptions
from lesa.learn.plan import Planned
from lesa.learn.trajectory import Store
from lesa.predictors import L2P, LESA, Origin
from lesa.rows.tap import Tap

CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right"]
ORIGIN = Origin("tiny", "FluxTransformer2DModel", {}, Tap(("blocks",), None), (1, 0.75, 0.5, 0.25, 0), "every:2")


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    """A pipeline that nobody loaded, with call arguments of its own."""
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def runs(pipe, tmp_path_factory) -> Store:
    return lesa.collect(pipe, PROMPTS, tmp_path_factory.mktemp("runs"), lesa.CollectOptions(tokens=8, batch_size=2))


def test_runs_of_a_pipeline_object_are_collected_planned_on_and_trained_on(pipe, runs, tmp_path):
    assert len(runs) == 2 and runs.collection.seeds == (2_000_000, 2_000_001)
    assert runs.collection.call == {"num_inference_steps": 6} and len(runs.collection.grid) == 7
    said = []
    (planned,) = lesa.plan(pipe, [3], options=lesa.PlanOptions(lesa.Lagrange(1)), data=runs)
    assert isinstance(planned, Planned) and len(planned.schedule.full_steps(6)) == planned.drawn.count("#") == 3
    options = lesa.TrainOptions("l2p", budgets=[3], forecaster=lesa.Lagrange(1), rounds=1, updates=(3, 3))
    before = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    trained = lesa.train(pipe, runs, PROMPTS[:1], tmp_path, options, say=said.append)
    assert before == [parameter.requires_grad for parameter in pipe.transformer.parameters()] and any(before)
    assert isinstance(trained.predictor, L2P) and trained.predictor.schedule == planned.schedule
    assert said == [f"planned: {planned.schedule}  {planned.drawn}"]
    assert len(trained.scores) == 2 and trained.curve and trained.seconds > 0
    assert trained.predictor.digest() == lesa.Predictor.from_pretrained(tmp_path).digest()
    assert not (tmp_path / "rounds" / "recorded").exists()
    with lesa.accelerate(pipe, trained.predictor) as run:
        pipe(PROMPTS[0], output_type="latent")
    assert run.plan().full == planned.schedule.full_steps(6)


def test_prompts_are_planned_on_where_there_are_no_recorded_runs(pipe):
    (planned,) = lesa.plan(pipe, [2], PROMPTS, lesa.PlanOptions(lesa.Reuse(), "output", refine=False))
    assert planned.place == "output" and len(planned.schedule.full_steps(6)) == 2
    with pytest.raises(FileNotFoundError, match="comes without prompts"):
        lesa.plan(pipe, [2])


def test_methods_are_compared_on_a_pipeline_object(pipe, tmp_path):
    options = lesa.CompareOptions([fewer_steps(3)], timed=0, bound=False)
    alone, kept = lesa.compare(pipe, PROMPTS, None, options), lesa.compare(pipe, PROMPTS, tmp_path, options)
    assert [result.full_steps for result in alone.results()] == [6, 3]
    assert alone.results() == kept.results() == records.load(tmp_path).results()
    assert kept.setting["call"] == CALL and kept.setting["device"] == "cpu"
    reuse = lesa.CompareOptions(schedules=[lesa.Schedule.every(3)], budgets=[], only=["reuse"], timed=0)
    found = lesa.compare(pipe, PROMPTS[:1], None, reuse)
    assert [result.method for result in found.results()] == ["all full", "reuse", "bound (output tap)"]
    with pytest.raises(ValueError, match="the methods are fewer steps, reuse"):
        lesa.compare(pipe, PROMPTS, None, replace(reuse, only=["oracle"]))


def test_a_loaded_pipeline_says_where_it_is_from(pipe, tiny_flux, tmp_path):
    tiny_flux.save_pretrained(tmp_path)
    (tmp_path / "call.json").write_text(json.dumps(CALL))
    options = LoadOptions(
        str(tmp_path), steps=4, scheduler={"shift": 2.0}, call={"height": 64, "num_inference_steps": 9}
    )
    ours = loaded(options)
    assert arguments_of(ours) == {**CALL, "height": 64, "num_inference_steps": 4} and steps_of(ours) == 4
    assert source_of(ours).name == str(tmp_path) and source_of(ours).scheduler == {"shift": 2.0}
    assert steps_of(loaded(replace(options, steps=None))) == 9
    assert steps_of(loaded(LoadOptions(str(tmp_path)))) == 6 and steps_of(tiny_flux) == 28
    assert source_of(pipe).model and not arguments_of(tiny_flux)


def test_a_pipeline_runs_as_its_runs_were_collected(runs):
    asked = as_collected(LoadOptions("tiny", call={"guidance_scale": 2.0}), runs)
    assert asked.asked == {"guidance_scale": 2.0, "num_inference_steps": 6}
    with pytest.raises(ValueError, match=r"\(num_inference_steps=6\), got num_inference_steps=5; leave that out"):
        as_collected(LoadOptions("tiny", steps=5), runs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(method="lisa"), "method= is one of lesa, lesa-continuous, l2p, got 'lisa'"),
        (dict(tap="middle"), "tap= is one of feature, norm, projection, output, got 'middle'"),
        (dict(method="l2p", memories=[1, 2, 2]), r"L2P has one stage, got memories=\(1, 2, 2\); .*memories=\(8,\)"),
        (dict(method="lesa-continuous", memories=[8]), r"memories= are those of LESA and L2P"),
        (dict(stages=2, memories=[1, 2]), "pass them without stages="),
        (dict(loss="steps"), "it needs method='l2p'"),
        (dict(paper=True, memories=[4, 8, 8]), "pass it without memories="),
        (dict(updates=(3, -1)), "updates are two numbers from 0 on"),
        (dict(predictor=L2P(ORIGIN), stages=2), "as it is; pass it without stages="),
        (dict(predictor=L2P(ORIGIN), paper=True), "trains the KANs of a LESA, got a l2p"),
        (dict(predictor=L2P(ORIGIN), tap="norm"), "is for tap='output', got norm"),
        (dict(predictor=L2P(ORIGIN), budgets=[2]), "keeps to its schedule, every:2"),
    ],
)
def test_options_of_a_training_check_themselves(options, words):
    with pytest.raises(ValueError, match=words):
        TrainOptions(**options)


def test_the_paper_and_a_predictor_win_over_other_options():
    paper = TrainOptions("l2p", paper=True, loss="latents")
    assert (paper.method, paper.history, paper.loss, paper.config().free_alphas) == ("lesa", "all", "features", False)
    begun = TrainOptions(predictor=LESA(ORIGIN, remembers_forecasts=True))
    assert (begun.method, begun.history, begun.place) == ("lesa", "all", "output")
    assert begun.schedule == lesa.Schedule.every(2)
    with pytest.raises(FrozenInstanceError):
        paper.seed = 3


def test_one_process_trains_into_a_folder(pipe, runs, tmp_path):
    """The lock of one that is gone, a file that nobody holds, keeps nobody out."""
    options = lesa.TrainOptions("l2p", schedule=lesa.Schedule.every(2), rounds=0, updates=(1, 1))
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match=r"another process is training into .*; wait"):
        lesa.train(pipe, runs, PROMPTS[:1], tmp_path, options)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    (tmp_path / ".lock").write_text("12345")
    assert lesa.train(pipe, runs, PROMPTS[:1], tmp_path, options).folder == tmp_path


def test_several_collections_are_for_many_grids(pipe, runs, tmp_path):
    with pytest.raises(ValueError, match="got 2 collections and 1 budgets"):
        lesa.train(pipe, [runs, runs], PROMPTS, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (lesa.CollectOptions, dict(batch_size=0)),
        (lesa.CollectOptions, dict(tokens=0)),
        (lesa.PlanOptions, dict(tap="middle")),
        (lesa.CalibrateOptions, dict(checked=0)),
        (lesa.CalibrateOptions, dict(refine=-1)),
        (lesa.CompareOptions, dict(batch_size=0)),
        (lesa.CompareOptions, dict(fine=0)),
        (LoadOptions, dict(model="x", dtype="float7")),
        (LoadOptions, dict(model="x", offload="disk")),
    ],
)
def test_options_out_of_range_are_refused(options, arguments):
    with pytest.raises(ValueError):
        options(**arguments)


def test_errors_name_options_as_they_are_typed(pipe, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n")
    train = ["train", "nowhere", "--data", str(tmp_path), "--validation-prompts", str(prompts), "--out", "out"]
    assert main([*train, "--method", "l2p", "--stages", "2"]) == 2
    assert capsys.readouterr().err == "lesa: --stages are those of LESA: they need --method lesa.\n"
    assert main([*train, "--loss", "steps"]) == 2
    assert "it needs --method l2p." in capsys.readouterr().err


def test_a_training_leaves_the_random_numbers_of_others_alone(pipe, runs, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    lesa.train(pipe, runs, PROMPTS[:1], tmp_path, lesa.TrainOptions(schedule=lesa.Schedule.every(2), updates=(1, 1)))
    assert torch.equal(torch.rand(2), expected)


def test_steps_may_be_named_twice_and_the_option_wins(tiny_flux, tmp_path):
    tiny_flux.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    call = json.dumps({**CALL, "num_inference_steps": 9})
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "4", "--call", call]
    assert main(["collect", str(tmp_path / "model"), *options, "--out", str(tmp_path / "runs")]) == 0
    assert Store.open(tmp_path / "runs").collection.call == {**CALL, "num_inference_steps": 4}
