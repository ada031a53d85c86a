"""Corrections of full steps in all that a pipeline may be run in: narrow numbers, other calls, what breaks off."""

import copy
import math
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
import torch
from zoo.pipelines import ZOO

from lesa.bench.plots import coefficients
from lesa.cli import main
from lesa.host.at_sampler import AtSampler
from lesa.host.intercept import intercept
from lesa.host.runtime import accelerate
from lesa.host.summary import SamplerSummary
from lesa.host.times import times_of
from lesa.learn.solve import Solver
from lesa.predictors import Origin, configuration
from lesa.predictors.lesa import LESA
from lesa.predictors.solved import Solved
from lesa.rows.forecasters import LinearRows, PlannedRow, Reuse
from lesa.rows.grid import from_scheduler
from lesa.rows.plan import Plan, compile
from lesa.rows.row import STORAGES, Row, Storage
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

TIMES, LAST = (1.0, 0.5, 0.25, 0.0), PlannedRow((0, 2), (0.5, 2.0), 0.0, 0.25)
TIMES8 = tuple(torch.linspace(1, 0, 9).tolist())
FULL = (0, 3, 6, 7)
SCHEDULE = Schedule.at(FULL)
CALL = dict(height=32, width=32, num_inference_steps=8, max_sequence_length=16, output_type="latent")
PROMPT = "small red apple on white, left"


def draw(pipe, seed=0, prompt=PROMPT, **changes):
    with torch.no_grad():
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**CALL, **changes}).images


def rows(own=1.25, latents=0.125):
    """Rows whose last two correct full steps, by other full steps and by the first latents."""
    made = torch.eye(4, 5, dtype=torch.float64)
    made[1, :2], made[1, 4] = torch.tensor([-0.25, 1.25]), 0.0625
    made[2, :3], made[3, :4], made[3, 4] = torch.tensor([0.25, -0.5, own]), torch.tensor([0.5, 0.0, -0.5, 1.0]), latents
    return made


def corrected(pipe, made=None, full=FULL):
    """A predictor of these rows for the calls above."""
    draw(pipe)
    grid = tuple(from_scheduler(pipe.scheduler).tolist())
    name, config = type(pipe.transformer).__name__, configuration(pipe.transformer)
    predictor = Solved(Origin("tiny", name, config, Tap(), grid, str(Schedule.at(full)), ("all",)), latents=True)
    predictor.set_gaps(rows() if made is None else made)
    return predictor


@contextmanager
def watching(pipe):
    """Yield what the denoiser gave, and what the sampler was handed with which latents, in the runs meanwhile."""
    given, handed = [], []

    def call(go_on, _module, *args, **kwargs):
        given.append((output := go_on(*args, **kwargs))[0].clone())
        return output

    def step(go_on, _scheduler, output, timestep, latents, *args, **kwargs):
        handed.append((output.clone(), latents.clone()))
        return go_on(output, timestep, latents, *args, **kwargs)

    undo = intercept(pipe.transformer, "__call__", call), intercept(pipe.scheduler, "step", step)
    try:
        yield given, handed
    finally:
        for one in undo:
            one()


def exact(plan, outputs, first):
    """What each step of a run is to be handed, in float64, given the outputs of full steps and the first latents."""
    known = {step: output.double() for step, output in zip(plan.full, outputs, strict=True)}
    found = []
    for step in range(plan.steps):
        row = plan.corrections.get(step) or plan.rows.get(step)
        if row is None:
            found.append(known[step])
            continue
        terms = [c * known[k] for k, c in zip(row.past, row.coefficients, strict=True) if c]
        found.append(sum(terms) + row.latents * first.double())
    return found


def half_an_ulp(found, wanted):
    """Tell whether numbers are others rounded once to their dtype."""
    kind = torch.finfo(found.dtype)
    return bool(((found.double() - wanted).abs() <= 0.501 * kind.eps * wanted.abs() + kind.tiny).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["autocast", "weights", "layerwise"])
def test_in_narrow_types_the_sampler_is_handed_sums_that_are_rounded_once(tiny_flux, how, dtype):
    pipe = copy.deepcopy(tiny_flux)
    if how != "autocast":
        pipe.to(dtype)
    if how == "layerwise":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    predictor = corrected(pipe)
    with (
        torch.autocast("cpu", dtype, enabled=how == "autocast"),
        watching(pipe) as (given, handed),
        accelerate(pipe, predictor) as run,
    ):
        drawn = draw(pipe)
    assert drawn.isfinite().all() and len(given) == 4 and len(handed) == 8
    for step, wanted in enumerate(exact(run.plan(), given, handed[0][1])):
        output = handed[step][0]
        assert output.dtype == given[0].dtype == dtype
        if step in FULL:
            assert half_an_ulp(output, wanted), f"step {step}"
        torch.testing.assert_close(output.double(), wanted, rtol=0.02, atol=0.02)
    assert run.summary().at_sampler.corrected == 2 and not run.summary().at_sampler.clamped


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_goes_beyond_the_range_of_its_dtype_is_clamped_and_counted(tiny_flux, dtype):
    """Forecasts are, and so is what corrections and the first latents make of outputs; float32 has room for it."""
    pipe, made = copy.deepcopy(tiny_flux).to(dtype), rows(own=1e6)
    made[1, 4] = made[3, 4] = 1e6
    predictor = corrected(pipe, made)
    with watching(pipe) as (_, handed), accelerate(pipe, predictor) as run:
        drawn = draw(pipe)
    found, largest = run.summary(), torch.finfo(torch.float16).max
    most = [float(output.abs().max()) for output, _ in handed]
    assert drawn.isfinite().all() and all(one < 100 for one in most[:4]), "nothing acts before step 4"
    if dtype == torch.float16:
        assert most[4:] == [largest] * 4
    else:
        assert all(one > 10 * largest for one in most[4:])
    clamped = 4 * (dtype == torch.float16)
    assert found.at_sampler.clamped == clamped and found["cond"].clamped == 0
    assert ("\n           4 outputs were beyond the range of the dtype" in str(found)) == bool(clamped)


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_what_is_spoiled_is_handed_on_as_such(spoiled):
    """The last full step's output is no number, or the first latents are none in one place: so is the sum, there."""
    plan = Plan(TIMES, (0, 2), 0, 2, False, {1: PlannedRow((0,), (1.0,), 0.0)}, corrections={2: LAST})
    for where in ("output", "earlier", "latents"):
        done = SamplerSummary()
        at, latents, outputs = AtSampler(Storage(), done), torch.ones(1, 2).half(), torch.ones(2, 1, 2).half()
        (latents if where == "latents" else outputs[int(where == "output")])[0, 1] = spoiled
        at.begin(latents)
        at.handed(plan, 0, outputs[0], latents)
        handed = at.handed(plan, 2, outputs[1], latents)
        assert handed.dtype == torch.float16 and handed[0, 0] == 0.5 + 2.0 + 0.25
        assert not handed[0, 1].isfinite() and done.clamped == 0


def test_a_data_prediction_whose_output_is_beyond_its_range_is_clamped_and_counted():
    subject = ZOO["stable_diffusion_euler_ancestral_guided"]()
    handed = []

    def step(go_on, _scheduler, output, *args, **kwargs):
        handed.append(output.clone())
        return go_on(output, *args, **kwargs)

    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        made = solver.gaps((0, 4, 5)).reuse()
        made[2, 2] = 1e7
        predictor = solver.predictor((0, 4, 5), made)
        subject.pipe.unet.half()
        undo = intercept(subject.pipe.scheduler, "step", step)
        with accelerate(subject.pipe, predictor) as run:
            subject.call(0)
        undo()
    largest = torch.finfo(torch.float16).max
    assert [bool((one.abs() == largest).any()) for one in handed] == [False] * 5 + [True]
    assert handed[5].isfinite().all() and run.summary().at_sampler.clamped == 1 and run.summary().data.clamped == 0


@pytest.mark.parametrize("name", STORAGES)
def test_however_outputs_are_kept_what_combines_them_is_near(tiny_flux, name):
    predictor = corrected(tiny_flux)
    with watching(tiny_flux) as (given, handed), accelerate(tiny_flux, predictor, history=name) as run:
        draw(tiny_flux)
    away = {"model": 1e-6, "cpu": 1e-6}.get(name, 1e-3 if "int8" in name else 5e-3)
    for (output, _), wanted in zip(handed, exact(run.plan(), given, handed[0][1]), strict=True):
        assert float((output.double() - wanted).norm() / wanted.norm()) < away


# --- other calls, and runs that break off


def test_runs_that_do_not_fit_fall_back_and_those_after_them_are_as_before(tiny_flux):
    predictor, fewer, reuse = corrected(tiny_flux), dict(num_inference_steps=6), Reuse()
    reuse.schedule = Schedule.every(3)
    with accelerate(tiny_flux, reuse):
        expected = {"full": None, reuse: draw(tiny_flux, **fewer)}
    expected["full"] = draw(tiny_flux, **fewer)
    with accelerate(tiny_flux, predictor):
        wanted = draw(tiny_flux)
    for fallback in expected:
        with accelerate(tiny_flux, predictor, fallback=fallback) as run:
            drawn = [draw(tiny_flux), draw(tiny_flux, **fewer), draw(tiny_flux)]
        assert all(map(torch.equal, drawn, [wanted, expected[fallback], wanted]))
        assert run.summary().fallbacks == 1 and run.summary().at_sampler.corrected == 4


@pytest.mark.parametrize("at", [0, 3, 5, 6])
@pytest.mark.parametrize("how", ["raises", "interrupts", "rewrites"])
def test_what_a_callback_does_ends_with_its_run(tiny_flux, how, at):
    predictor = corrected(tiny_flux)
    with accelerate(tiny_flux, predictor):
        wanted = draw(tiny_flux)

    def callback(pipe, step, _time, given):
        if step == at and how == "raises":
            raise InterruptedError
        if step == at and how == "interrupts":
            pipe._interrupt = True
        return {"latents": 0.5 * given["latents"]} if step == at and how == "rewrites" else given

    with watching(tiny_flux) as (given, handed), accelerate(tiny_flux, predictor) as run:
        with suppress(InterruptedError):
            draw(tiny_flux, callback_on_step_end=callback)
        if how == "rewrites":  # what was kept is what it was
            for (output, _), one in zip(handed, exact(run.plan(), given, handed[0][1]), strict=True):
                torch.testing.assert_close(output.double(), one, rtol=1e-5, atol=1e-5)
        assert len(handed) == (8 if how == "rewrites" else at + 1)
        assert torch.equal(draw(tiny_flux), wanted)


def test_other_batches_are_corrected_as_their_pictures_alone(tiny_flux):
    predictor, calls = corrected(tiny_flux), dict(num_images_per_prompt=2)
    with accelerate(tiny_flux, predictor, strict=True) as run:
        alone = [draw(tiny_flux, seed) for seed in (0, 1)]
        with torch.no_grad():
            generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
            both = tiny_flux(PROMPT, generator=generators, **CALL, **calls).images
        torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="image size"):
            draw(tiny_flux, height=48, width=64)
        assert torch.equal(draw(tiny_flux), alone[0])
    assert run.summary().at_sampler.corrected == 2 * 4, "of every run that went on"
    assert run.summary()["cond"].full_steps == 4 * 4, "what is corrected is a full step"
    assert "\n           8 full steps were corrected" in str(run.summary())


def test_pipelines_that_share_a_scheduler_keep_what_is_theirs(tiny_flux):
    """One is called within the other's call, too; both correct full steps."""
    other = copy.copy(tiny_flux)
    other.transformer = copy.deepcopy(tiny_flux.transformer)
    mine, theirs = corrected(tiny_flux), corrected(other, rows(0.75, 0.5))
    with accelerate(tiny_flux, mine):
        wanted = draw(tiny_flux)
    with accelerate(other, theirs):
        wanted = wanted, draw(other, 1)
    with accelerate(tiny_flux, mine), accelerate(other, theirs):
        for _ in range(2):
            assert all(map(torch.equal, (draw(tiny_flux), draw(other, 1)), wanted))
        other.scheduler = type(tiny_flux.scheduler).from_config(tiny_flux.scheduler.config)
        within = []

        def callback(_pipe, step, _time, given):
            if step == 4:
                within.append(draw(other, 1))
            return given

        assert torch.equal(draw(tiny_flux, callback_on_step_end=callback), wanted[0])
        assert torch.equal(within[0], wanted[1])


@pytest.mark.parametrize("at", [2, 3, 4, None])
def test_nothing_is_corrected_from_before_guidance_was_turned_off(at):
    """Outputs jump there, and rows would take that for a miss of forecasts: each is handed on as it is."""
    subject, full = ZOO["sd3_guided"](), (0, 2, 4, 5)
    pipe, raw, handed = subject.pipe, [], []
    solver = Solver(pipe, [subject.arguments], [0])
    made = solver.gaps(full).reuse()
    made[2, :3], made[3, 0], made[3, 4] = torch.tensor([0.25, -0.5, 1.25]), 0.25, 0.125
    predictor = solver.predictor(full, made)

    def into(kept):
        def step(go_on, _scheduler, output, *args, **kwargs):
            kept.append(output.clone())
            return go_on(output, *args, **kwargs)

        return step

    def callback(pipe, step, _time, given):
        if step == at:
            pipe._guidance_scale = 0.0
            given = {name: x.chunk(2)[1] if name != "latents" else x for name, x in given.items()}
        return given

    named = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    undo = [intercept(pipe.scheduler, "step", into(handed))]
    with torch.no_grad(), accelerate(pipe, predictor) as run:
        undo.append(intercept(pipe.scheduler, "step", into(raw)))
        generator = torch.Generator().manual_seed(0)
        more = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=named)
        pipe(**subject.arguments, **more, generator=generator)
    for one in undo:
        one()
    as_they_are = [torch.equal(one, other) for one, other in zip(raw, handed, strict=True)]
    corrects = {2: 0, 3: 0, 4: 1, None: 2}[at]
    assert as_they_are == [True] * 4 + [corrects < 1, corrects < 2]
    found = run.summary().at_sampler
    assert (found.corrected, found.uncorrected) == (corrects, 2 - corrects)
    assert ("\n           1 full step was not corrected, as other" in str(run.summary())) == (corrects == 1)


def test_where_a_first_step_has_outputs_of_other_shapes_rows_begin_after_it():
    """Qwen-Image-2.1 prefills tokens there: nothing is combined with it, and corrections are of the steps after it."""
    subject = ZOO["qwen_image21_guided"]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        assert solver.begins == (0, 1)
        found, _ = solver.rounds((0, 1, 3, 4), most=1)
        predictor = solver.predictor(found.full, found.rows)
        with accelerate(subject.pipe, predictor) as run:
            subject.call(0)
    assert run.plan().corrections[3].past == (1, 3)
    assert (run.summary().at_sampler.corrected, run.summary().at_sampler.uncorrected) == (1, 0)
    assert found.drift < solver.reuse(found.full).drift


# --- who else asks for rows


def test_a_stream_of_a_predictor_is_corrected_as_the_predictor_is():
    class Corrects(LESA):
        def correction(self, grid, step, past):
            return Row(torch.tensor([0.0, 0.5], dtype=torch.float64), torch.tensor(0.0)) if step == 7 else None

    times = tuple(torch.linspace(1, 0, 9).tolist())
    origin = Origin("a model", "Linear", {}, Tap(), times, "at:0,1,6,7", ("cond", "uncond"))
    predictor = Corrects(origin, bounds=(), memories=(2,))
    for one in (predictor, predictor.for_stream("uncond")):
        plan = compile(one, times, predictor.schedule)
        assert set(plan.corrections) == {7} and plan.corrections[7].coefficients[-1] == 0.5


def test_corrections_are_refused_where_noise_is_added_though_rows_reuse():
    """Outputs jump with the noise."""
    subject = ZOO["stable_diffusion_euler_ancestral_guided"]()
    with subject.around():
        subject.call(0)
        times = times_of(subject.pipe.scheduler)
        steps = len(times) - 1
        kept = {k: PlannedRow((0,), (1.0,), 0.0) for k in range(1, steps - 1)}
        last = {steps - 1: PlannedRow((0, steps - 1), (-0.5, 1.5), 0.0)}
        for corrections in ({}, last):
            one = LinearRows(times, kept, memory=2, remembers_forecasts=False, corrections=corrections)
            refused = pytest.raises(ValueError, match="add no noise") if corrections else nullcontext()
            with accelerate(subject.pipe, one, schedule=Schedule.at([0, steps - 1]), of="output"), refused:
                subject.call(0)


def test_rows_of_runs_that_begin_in_mid_grid_are_printed(tmp_path, capsys):
    origin = Origin("a model", "Linear", {}, Tap(), TIMES8, "at:3,5,6,7", ("all",), training={"begins": [3]})
    predictor = Solved(origin, latents=True)
    made = torch.eye(4, 5, dtype=torch.float64)
    made[2, 0], made[3, 4] = 0.5, 0.25
    predictor.set_gaps(made)
    predictor.save_pretrained(tmp_path)
    assert main(["rows", str(tmp_path)]) == 0
    assert "6 = +1 h6 +0.5 h3  (gain 1.5)  corrected\n   7 = +1 h7 +0.25 x" in capsys.readouterr().out


def test_the_map_of_rows_shows_what_corrects_a_full_step():
    plan = Plan(TIMES, (0, 2), 0, 2, False, {1: PlannedRow((0,), (1.0,), 0.0)}, corrections={2: LAST})
    np.testing.assert_equal(coefficients(plan), [[np.nan] * 3, [1.0, np.nan, np.nan], [0.5, np.nan, 2.0]])


def test_predictors_saved_before_there_were_corrections_correct_nothing(tmp_path):
    """Their rows of full steps are zeros, whatever the schedule; and so are those of a predictor without latents."""
    for latents in (True, False):
        predictor = Solved(Origin("a model", "Linear", {}, Tap(), TIMES8, str(SCHEDULE), ("all",)), latents=latents)
        made = rows()
        with torch.no_grad():
            for j, end in ((0, 3), (1, 6)):
                predictor.coefficients[FULL[j] + 1 : end] = made[j, :4]
        predictor.save_pretrained(tmp_path / str(latents))
        plan = compile(Solved.from_pretrained(tmp_path / str(latents)), TIMES8, SCHEDULE)
        assert not plan.corrections and plan.rows[4].coefficients == (-0.25, 1.25)
        assert torch.equal(predictor.gaps[2:], torch.eye(4, 5, dtype=torch.float64)[2:])
