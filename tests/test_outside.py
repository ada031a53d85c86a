"""Runs in a host of its own, and the nodes' own parts: without ComfyUI."""

from __future__ import annotations

import json
import sys
import types
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfyui_models as models
import pytest
import torch
from torch import Tensor

from lesa.host.outside import FULL, Asked, OutsideRun, choose
from lesa.predictors.facts import Facts, Mixture
from lesa.predictors.origin import Origin
from lesa.predictors.shelf import Shelf
from lesa.predictors.solved import Solved
from lesa.rows import levels
from lesa.rows import sampler as samplers
from lesa.rows.default import Default
from lesa.rows.forecasters import Lagrange, LinearRows, PlannedRow, Reuse
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

TIMES = tuple(1 - k / 10 for k in range(11))
FACTS = Facts(TIMES, 0, (4, 8, 8), "euler", False, ("cond",))


def asked(forecaster: Any = None, schedule: str = "every:3", **more: Any) -> Asked:
    return Asked(forecaster or Lagrange(1), Schedule.parse(schedule), **more)


def walk(
    run: OutsideRun, chosen: Any, answer: Callable[[int], list[Tensor]], kinds: Any = None, names: Any = None
) -> list:
    """Walk a run whose every step makes one call; return what each step had, and whether its call was made."""
    found = []
    for step in range(len(TIMES) - 1):
        run.at(step)
        made = run.wants(names or ["cond"], kinds[step] if kinds else "kind")
        if made:
            run.keep(answer(step))
        found.append((answer(step) if made else run.forecast(), made))
        if step == 0:
            run.follow(chosen)
    return found


def line(step: int) -> list[Tensor]:
    return [torch.full((1, 4), 3.0 - 2 * TIMES[step])]


def test_full_steps_are_made_and_the_others_forecast():
    run = OutsideRun(TIMES)
    found = walk(run, choose(FACTS, "", asked()), line)
    assert [made for _, made in found] == [step % 3 == 0 for step in range(10)]
    for step, (outputs, _) in enumerate(found[4:], 4):  # a line goes on as one, once two full steps are known
        assert torch.allclose(outputs[0], line(step)[0])
    done = run.summary()["cond"]
    assert (done.full_steps, done.skipped_steps) == (4, 6)
    assert run.summary().chosen == {"without training: Lagrange(degree=1), every:3": 1}


def test_a_call_of_another_kind_begins_anew():
    run = OutsideRun(TIMES)
    kinds = ["a"] * 5 + ["b"] * 5
    found = walk(run, choose(FACTS, "", asked(Reuse(), "at:0")), line, kinds)
    assert [step for step, (_, made) in enumerate(found) if made] == [0, 5]
    assert torch.equal(found[7][0][0], line(5)[0])


def test_a_call_that_was_not_made_a_step_ago_begins_anew():
    run, chosen, made = OutsideRun(TIMES), choose(FACTS, "", asked(Reuse(), "at:0")), []
    for step in range(10):
        run.at(step)
        for name in ("one", *(["other"] if step in (0, 1, 4, 5) else [])):
            if run.wants([name], "kind"):
                made.append((step, name))
                run.keep(line(step))
            else:
                run.forecast()
        if step == 0:
            run.follow(chosen)
    assert made == [(0, "one"), (0, "other"), (4, "other")]
    assert set(run.summary()) == {"one", "call 2 other"}


def test_outputs_of_one_call_are_streams_of_their_own():
    run = OutsideRun(TIMES)
    found = walk(
        run, choose(FACTS, "", asked(Reuse(), "at:0,5")), lambda k: [*line(k), -line(k)[0]], names=["cond", "uncond"]
    )
    assert torch.equal(found[7][0][1], -line(5)[0]) and set(run.summary()) == {"cond", "uncond"}


def test_a_run_on_rising_times_is_refused():
    with pytest.raises(ValueError, match="times fall"):
        OutsideRun(TIMES[::-1])


# --- what is forecast with


def solved(schedule: str = "at:0,4", of: str = "output") -> Solved:
    return Solved(Origin("model", "Denoiser", {}, Tap(), TIMES, schedule, ("all",)), of=of)


def shelf_with(tmp_path: Path, facts: Facts = FACTS, weights: str = "f" * 64) -> Shelf:
    shelf = Shelf(tmp_path)
    table = {"checked": {"2": {"psnr": {"mean": 41.0, "worst": 39.0}}}}
    shelf.put(weights, facts, {2: solved()}, table)
    return shelf


def test_what_was_calibrated_for_weights_and_runs_is_taken(tmp_path: Path):
    shelf = shelf_with(tmp_path)
    chosen = choose(FACTS, "f" * 64, Asked(shelf=shelf))
    assert isinstance(chosen.forecaster, Solved) and "psnr 41" in chosen.promise
    assert choose(FACTS, "f" * 64, Asked(shelf=shelf, quality="psnr:40")).promise == chosen.promise
    with pytest.raises(ValueError, match="promises psnr 41 at best"):
        choose(FACTS, "f" * 64, Asked(shelf=shelf, quality="psnr:45"))
    with pytest.warns(UserWarning, match="no predictor was made"):
        assert isinstance(choose(FACTS, "e" * 64, Asked(shelf=shelf)).forecaster, Default)
    with pytest.raises(ValueError, match="a quality chooses among calibrated"):
        choose(FACTS, "e" * 64, Asked(shelf=shelf, quality="psnr:40"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(sampler="heun"), "a heun instead of a euler"),
        (dict(times=TIMES[1:]), "9 steps instead of 10"),
        (dict(guidance=Mixture((3.0, -2.0), 0.0, 1.0)), "guidance of 3 : -2"),
        (dict(noise=True), "adds noise"),
        (dict(embedded=(3.5,)), "guidance 3.5 instead of none"),
    ],
)
def test_other_runs_are_refused_or_full(tmp_path: Path, change: dict, why: str):
    facts = Facts(**{**vars(FACTS), **change})
    shelf = shelf_with(tmp_path)
    with pytest.raises(ValueError, match=why):
        choose(facts, "f" * 64, Asked(shelf=shelf))
    chosen = choose(facts, "f" * 64, Asked(shelf=shelf, fallback=FULL))
    assert chosen.is_fallback and why in chosen.label
    assert chosen.schedule_for(facts.times, 0).full_steps(facts.steps) == tuple(range(facts.steps))


def test_a_predictor_that_is_named_has_to_fit(tmp_path: Path):
    assert choose(FACTS, "", Asked(predictor=solved())).forecaster.full == (0, 4)
    (calibration,) = shelf_with(tmp_path).all()
    other = Facts(**{**vars(FACTS), "sampler": "FlowMatchEulerDiscreteScheduler", "shape": (16, 16)})
    assert choose(other, "", Asked(predictor=calibration)).promise
    for facts, why in (
        (Facts(**{**vars(FACTS), "times": TIMES[1:]}), "steps"),
        (Facts(**{**vars(FACTS), "noise": True}), "add no noise"),
    ):
        with pytest.raises(ValueError, match=why):
            choose(facts, "", Asked(predictor=solved()))
    noisy = Facts(**{**vars(FACTS), "noise": True})
    assert choose(noisy, "", Asked(predictor=solved(of="data"))).forecaster.full == (0, 4)
    with pytest.raises(ValueError, match="is for samplers that add noise, got euler"):
        choose(FACTS, "", Asked(predictor=solved(of="data")))
    inner = Solved(Origin("model", "Denoiser", {}, Tap(("blocks",), "norm_out"), TIMES, "at:0,4", ("all",)))
    with pytest.raises(ValueError, match="what is forecast here is the output"):
        choose(FACTS, "", Asked(predictor=inner))


# --- the nodes' own parts


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> Any:
    return models.nodes().sampling


@pytest.fixture
def calibrating() -> Any:
    return models.nodes().calibrating


class Flow:
    """A flow-matching model's guider, as far as a sampler sees it."""

    def __init__(self) -> None:
        self.inner_model = self.model_patcher = self


class Sampler:
    """A sampler of ComfyUI around a function of k-diffusion's form."""

    extra_options: dict = {}  # noqa: RUF012

    def __init__(self, function: Callable):
        self.sampler_function = function

    def sample(self, guider: Any, sigmas: Tensor, extra: dict, _callback: Any, noise: Tensor, *_rest: Any) -> Tensor:
        return self.sampler_function(lambda x, sigma: guider(x, sigma, **extra), noise * sigmas[0], sigmas)


def euler(model: Callable, x: Tensor, sigmas: Tensor, noise: float = 0.0) -> Tensor:
    for now, then in pairwise(sigmas):
        x = x + (x - model(x, now.expand(len(x)))) / now * (then - now) + noise * torch.randn_like(x)
    return x


def heun(model: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    for now, then in pairwise(sigmas):
        d = (x - model(x, now.expand(len(x)))) / now
        ahead = x + d * (then - now)
        if then > 0:
            d = (d + (ahead - model(ahead, then.expand(len(x)))) / then) / 2
        x = x + d * (then - now)
    return x


def adaptive(model: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    now = sigmas[0]
    while now > 0.01:
        d = (x - model(x, now.expand(len(x)))) / now
        now = now * (0.5 if float(d.abs().max()) < 1 else 0.75)
        x = x - d * now
    return x


SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])


def test_a_sampler_is_known_by_what_it_does(sampling: Any):
    course = sampling.course_of(Sampler(euler), Flow(), SIGMAS, 4)
    assert course.sigmas == pytest.approx([1.0, 0.8, 0.5, 0.2]) and course.last == 0 and not course.noise
    course = sampling.course_of(Sampler(heun), Flow(), SIGMAS, 4)
    assert course.sigmas == pytest.approx([1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    before = torch.random.get_rng_state()
    assert sampling.course_of(Sampler(lambda *a: euler(*a, noise=0.1)), Flow(), SIGMAS, 4).noise
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="adaptive chooses them as it goes"):
        sampling.course_of(Sampler(adaptive), Flow(), SIGMAS, 4)


@pytest.mark.parametrize("function", [euler, heun])
def test_numbers_of_a_sampler_walk_as_it_does(calibrating: Any, sampling: Any, function: Callable):
    sampler, guider = Sampler(function), Flow()
    course = sampling.course_of(sampler, guider, SIGMAS, 4)
    numbers = calibrating.numbers_of(sampler, guider, SIGMAS, course, 4)
    steps = calibrating.Steps([*course.sigmas, 0.0], numbers)

    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    wanted = function(lambda y, sigma: y - sigma[0] * torch.sin(3 * y), x, SIGMAS)
    steps.set_timesteps(len(course.sigmas))
    for time in steps.timesteps:
        (x,) = steps.step(torch.sin(3 * x), time, x)
    assert torch.allclose(x, wanted, atol=1e-6)
    assert steps.step_index == len(course.sigmas) and len(steps._held) == 0


def noisy(model: Callable, x: Tensor, sigmas: Tensor) -> Tensor:
    return euler(model, x, sigmas, noise=0.1)


def test_numbers_of_a_sampler_that_adds_noise(calibrating: Any, sampling: Any):
    sampler, guider, start = Sampler(noisy), Flow(), torch.randn(1, 4, 2, 2)
    course = sampling.course_of(sampler, guider, SIGMAS, 4)
    numbers = calibrating.numbers_of(sampler, guider, SIGMAS, course, 4)
    told = sampling.probe(sampler, guider, SIGMAS, 0 * start, calibrating.nothing, seed=3)
    steps = calibrating.Steps([*course.sigmas, 0.0], numbers, noise=True)
    steps.added = calibrating.Added([torch.stack(told.latents)], numbers.noise.tolist())

    def walked() -> Tensor:
        x = start
        steps.set_timesteps(len(course.sigmas))
        for time in steps.timesteps:
            (x,) = steps.step(torch.sin(3 * x), time, x)
        return x

    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = noisy(lambda y, _sigma: torch.sin(3 * y), start, SIGMAS)
    assert torch.allclose(walked(), wanted, atol=1e-5)
    steps.set_timesteps(len(course.sigmas))
    found = samplers.of(steps, start, steps.timesteps[0], start)
    assert found.injects_noise and levels.of(steps, start, steps.timesteps[0], start) is steps.levels
    found = levels.of_data(found, steps.levels)
    assert torch.allclose(found.response, numbers.response, atol=1e-6)
    assert torch.allclose(found.decay, numbers.decay, atol=1e-6)
    assert torch.allclose(found.noise_response.norm(dim=1), numbers.noise, atol=1e-6)
    assert torch.allclose(walked(), wanted, atol=1e-5)  # whoever reads numbers leaves the run's noise as it is


def test_a_sampler_that_is_no_sum_is_refused(calibrating: Any, sampling: Any):
    sampler, guider = Sampler(lambda *a: euler(*a).clamp(-0.1, 0.1)), Flow()
    course = sampling.course_of(sampler, guider, SIGMAS, 4)
    with pytest.raises(ValueError, match="weighted sums"):
        calibrating.numbers_of(sampler, guider, SIGMAS, course, 4)


def test_what_acts_at_a_noise_level(sampling: Any):
    control = SimpleNamespace(timestep_range=(0.9, 0.4), previous_controlnet=None)
    conds = [[{}, {"timestep_start": 0.5}, {"control": control}], None]
    kinds = [sampling.kind_of(conds, sigma) for sigma in (1.0, 0.7, 0.6, 0.3)]
    level = float(torch.tensor(0.1))  # a little more than 0.1, which ComfyUI takes for the same
    assert sampling.is_active({"timestep_start": 0.1}, level) and sampling.is_active({"timestep_end": 0.7}, 0.7)
    assert kinds[1] == kinds[2] and len(set(kinds)) == 3
    assert "in a part of the run" in sampling.stream_of(conds, (1.0, 0.7))
    assert sampling.stream_of([[{}], [{}]], (1.0, 0.7)) == "cond and uncond"
    assert sampling.stream_of([[{"control": None}], None], (1.0, 0.7)) == "cond with control"


@pytest.mark.parametrize("noise", [False, True])
def test_one_sampling(sampling: Any, noise: bool):
    """Guidance goes on with predictions; what is forecast is exact where derivatives, or the data, stay as they are."""
    course = sampling.Course((1.0, 0.8, 0.6, 0.4), 0.0, noise, False, ())
    run = sampling.Sampling(course, True, "euler", Asked(forecaster=Reuse(), schedule=Schedule.at([0])), lambda: "")
    conds, calls = [[{}], [{}]], []

    def model(_model: Any, _conds: Any, x: Tensor, sigma: Tensor, _options: dict) -> list[Tensor]:
        calls.append(float(sigma))
        level = 0.0 if noise else float(sigma)
        return [2.0 + level * torch.zeros_like(x) if noise else x - level * 3.0, x * 0 + 1 if noise else x - level]

    for sigma in course.sigmas:
        x = torch.full((1, 4, 2, 2), 5 * sigma)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            cond, uncond = run.predict(model, None, conds, x, sigma, {})
            return uncond + (cond - uncond) * 2

        found = run.evaluate(predict, x, torch.tensor([sigma]))
        wanted = 3.0 + 0 * x if noise else x - sigma * 5.0
        assert torch.allclose(found, wanted, atol=1e-5)
    assert calls == [1.0]
    assert run.summary()["uncond"].skipped_steps == 3


@pytest.mark.parametrize("noise", [False, True])
def test_a_part_of_the_first_latents_is_added_after_guidance(sampling: Any, noise: bool):
    """By hand: d = (x - D) / sigma, or D where noise is added, is the first one and a quarter of the first latents,
    whatever guidance does."""
    times = (1.0, 0.8, 0.6, 0.0)
    table = {step: PlannedRow((0,), (1.0,), 0.0, 0.25) for step in (1, 2)}
    rows = LinearRows(times, table, remembers_forecasts=False)
    course = sampling.Course(times[:-1], 0.0, noise, False, ())
    run = sampling.Sampling(course, True, "euler", Asked(forecaster=rows, schedule=Schedule.at([0])), lambda: "")

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        cond, uncond = run.predict(lambda *_: [x - sigma, x - 2 * sigma], None, [[{}], [{}]], x, sigma, {})
        return torch.maximum(cond, uncond)  # no weighted sum of them

    for sigma in course.sigmas:
        x = torch.full((1, 4, 2, 2), 4 * sigma)
        found = run.evaluate(predict, x, torch.tensor([sigma]))
        first, part = sigma == 1.0, 0.25 * 4.0
        wanted = x - sigma * (1.0 if first else 1.0 + part)
        if noise:
            wanted = torch.full_like(x, 3.0 if first else 3.0 + part)
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_full_steps_are_corrected_after_guidance(sampling: Any, noise: bool, changes: bool):
    """By hand: of what guidance made at full steps, and of the first latents; a condition that no longer acts in the
    last step makes another output of it, which is handed on as it is."""
    times = (1.0, 0.8, 0.6, 0.4, 0.0)
    corrections = {2: PlannedRow((0, 2), (-0.5, 1.5), 0.0), 3: PlannedRow((0, 2, 3), (0.25, -0.5, 1.0), 0.0, 0.5)}
    skipped = {1: PlannedRow((0,), (1.0,), 0.0)}
    rows = LinearRows(times, skipped, memory=3, remembers_forecasts=False, corrections=corrections)
    course = sampling.Course(times[:-1], 0.0, noise, False, ())
    asked = Asked(forecaster=rows, schedule=Schedule.at([0, 2, 3]))
    run, made = sampling.Sampling(course, True, "euler", asked, lambda: ""), {}
    conds = [[{}, *([{"timestep_end": 0.5}] if changes else [])], [{}]]
    for step, sigma in enumerate(course.sigmas):
        x = torch.full((1, 4, 2, 2), 4 * sigma)

        def predict(x: Tensor, sigma: Tensor, step: int = step) -> Tensor:
            cond, uncond = run.predict(lambda *_: [x - sigma * (step + 1), x], None, conds, x, sigma, {})
            return uncond + 2 * (cond - uncond)

        found = run.evaluate(predict, x, torch.tensor([sigma]))
        made[step] = x - sigma * 2 * (step + 1) if noise else torch.full_like(x, 2.0 * (step + 1))
        wanted = made[0 if step == 1 else step]
        if step in corrections and not (changes and step == 3):
            row = corrections[step]
            wanted = sum(c * made[k] for k, c in zip(row.past, row.coefficients, strict=True)) + row.latents * 4.0
        assert torch.allclose(found, wanted if noise else x - sigma * wanted, atol=1e-5), f"step {step}"
    at_sampler = run.summary().at_sampler
    assert (at_sampler.corrected, at_sampler.uncorrected) == (2 - changes, int(changes))


def test_an_evaluation_that_was_not_expected_is_an_error(sampling: Any):
    course = sampling.Course((1.0, 0.8), 0.0, False, False, ())
    run = sampling.Sampling(course, True, "mine", Asked(), lambda: "")
    with pytest.raises(RuntimeError, match="mine was to evaluate the model at sigma 1\\.0 as number 1"):
        run.evaluate(lambda x, sigma: x, torch.zeros(1, 1, 1, 1), torch.tensor([0.5]))


def test_a_guider_that_asks_for_no_condition_is_an_error(sampling: Any):
    course = sampling.Course((1.0, 0.8), 0.0, False, False, ())
    run = sampling.Sampling(course, True, "mine", Asked(), lambda: "")
    with pytest.raises(ValueError, match="asks for none"):
        run.evaluate(lambda x, sigma: x, torch.zeros(1, 1, 1, 1), torch.tensor([1.0]))


class Patcher:
    """As much of a ModelPatcher as the nodes use before anything is sampled."""

    def __init__(self) -> None:
        self.wrappers: dict = {}

    def clone(self) -> Patcher:
        other = Patcher()
        other.wrappers = {key: [*some] for key, some in self.wrappers.items()}
        return other

    def get_wrappers(self, kind: str, key: str) -> list:
        return self.wrappers.get((kind, key), [])

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault((kind, key), []).append(wrapper)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = SimpleNamespace(SAMPLER_SAMPLE="sampler", PREDICT_NOISE="noise", CALC_COND_BATCH="batch")
    stand_in: Any = types.ModuleType("comfy.patcher_extension")
    stand_in.WrappersMP = kinds
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", stand_in)


def test_the_node_gives_a_clone(extension: None, tmp_path: Path):
    nodes, model = models.nodes().nodes, Patcher()
    take = nodes.Accelerate().accelerate
    (fast,) = take(model, nodes.UNTRAINED, 8, "", "stop with the reason")
    assert fast is not model and not model.wrappers
    assert "no sampling yet" in nodes.report_of(fast)
    for given, why in (
        ((fast, nodes.UNTRAINED, 0, "", "stop with the reason"), "accelerated once"),
        ((model, nodes.CALIBRATED, 8, "psnr:40", "stop with the reason"), "give one of them"),
        ((model, nodes.CALIBRATED, 0, "", "stop with the reason", "here"), "goes with the predictor"),
    ):
        with pytest.raises(ValueError, match=why):
            take(*given)
    with pytest.raises(FileNotFoundError, match="the folder of a predictor is needed"):
        take(model, nodes.FOLDER, 0, "", "stop with the reason", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="not; connect LESA Accelerate's model"):
        nodes.report_of(model)


def test_budgets_are_read(extension: None):
    nodes = models.nodes().nodes
    assert nodes.numbers_in("8, 6 5") == (8, 6, 5) and nodes.numbers_in("") == ()
    with pytest.raises(ValueError, match="numbers of full steps"):
        nodes.numbers_in("many")


def test_the_registry_is_told_the_oldest_version_that_will_do():
    said = (models.ROOT / "integrations" / "comfyui" / "pyproject.toml").read_text()
    assert f'requires-comfyui = ">={models.nodes().sampling.OLDEST}"' in said


def test_no_input_is_called_as_the_page_expects_a_second_one_behind():
    """ComfyUI's page adds 'control after generate' behind a widget of such a name, and values move by one."""
    for node in models.nodes().NODE_CLASS_MAPPINGS.values():
        given = node.INPUT_TYPES()
        assert not {"seed", "noise_seed"} & {*given["required"], *given.get("optional", {})}


def test_workflows_are_of_these_nodes():
    """Every link of an example joins an output with an input of its type, and values are as many as widgets."""
    known = models.nodes().NODE_CLASS_MAPPINGS
    files = sorted((models.ROOT / "integrations" / "comfyui" / "example_workflows").glob("*.json"))
    assert [file.stem for file in files] == ["accelerate", "calibrate"]
    for file in files:
        workflow = json.loads(file.read_text())
        assert str(uuid.UUID(workflow["id"])) == workflow["id"]
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for link, source, slot, target, place, kind in workflow["links"]:
            assert link in nodes[source]["outputs"][slot]["links"]
            assert nodes[target]["inputs"][place]["link"] == link and kind
        mine = [node for node in nodes.values() if node["type"] in known]
        assert mine
        for node in mine:
            types_of = known[node["type"]].INPUT_TYPES()
            specs = {**types_of["required"], **types_of.get("optional", {})}
            links = {one["name"] for one in node["inputs"]}
            assert len(node["widgets_values"]) == len(specs) - len(links) and links <= set(specs)
