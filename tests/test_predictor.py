"""A predictor's rows are the paper's recurrence, and a saved one comes back whole or not at all."""

import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from lesa.predictors import L2P, LESA, ContinuousLESA, Origin, Predictor, configuration, shipped_for
from lesa.rows.forecasters import Lagrange, Taylor
from lesa.rows.grid import from_scheduler
from lesa.rows.plan import Plan, compile
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

STEPS = 50
BOUNDS = (0.9, 0.5)
TAP = Tap(("transformer_blocks", "single_transformer_blocks"), "norm_out")
ROOT = Path(__file__).parents[1]
FILES = ["README.md", "config.json", "model.safetensors"]


def flux_grid(steps: int, mu: float = 1.15) -> torch.Tensor:
    """FLUX's grid: equal steps, shifted by mu."""
    times = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / times - 1))
    return torch.cat([shifted, torch.zeros(1, dtype=torch.float64)])


GRID = flux_grid(STEPS)


class FluxTransformer2DModel(nn.Module):
    """What a predictor looks at of a transformer: its class's name and its configuration."""

    def __init__(self, **config):
        super().__init__()
        self.config = {"num_layers": 2, "axes_dims_rope": (4, 4, 4), "_class_name": "Flux", **config}


def origin(**changes) -> Origin:
    facts = Origin(
        model="models/tiny",
        transformer="FluxTransformer2DModel",
        config=configuration(FluxTransformer2DModel()),
        tap=TAP,
        grid=tuple(GRID.tolist()),
        schedule="paper:7",
        streams=("cond", "uncond"),
        data="0123",
        training={"loss": "latents", "updates": [200, 200], "prompt": "ein großer Fisch"},
        versions={"torch": "2"},
    )
    return replace(facts, **changes)


def shaken(predictor, scale: float = 0.2):
    """Give a predictor random numbers everywhere, so that nothing is zero and streams and stages differ."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if ".kan." not in name:
                parameter += scale * torch.randn(parameter.shape, generator=random)
        if isinstance(predictor, LESA):
            for stream in predictor.origin.streams:
                predictor.absorb(0.3 * torch.randn(len(predictor.grid) - 1, generator=random), stream)
    return predictor


PREDICTORS = {
    "lesa": lambda **k: LESA(origin(**k)),
    "lesa-all": lambda **k: LESA(origin(**k), remembers_forecasts=True),
    "lesa-other": lambda **k: LESA(origin(**k), bounds=(0.8,), memories=(2, 6), hidden=(8, 8), grid_size=30),
    "l2p": lambda **k: L2P(origin(**k)),
    "l2p-all": lambda **k: L2P(origin(**k), memory=6, remembers_forecasts=True),
}
each_predictor = pytest.mark.parametrize("make", PREDICTORS.values(), ids=PREDICTORS)


# --- rows


def published(predictor: LESA, stream: str, full, features):
    """LESA as METHOD.md has it: h_s = h_{s-1} + alpha (sum_k w_k h_{s-k} + b), step by step with lists of features."""
    history, felt = [], []
    for step in range(len(GRID) - 1):
        time = float(GRID[step])
        expert = predictor.experts[stream][0 if time > BOUNDS[0] else 1 if time > BOUNDS[1] else 2]
        alpha = expert.kan((time - GRID).float()[None]).double()[0, 0]
        feature = features[step]
        if step not in full:
            newest = history[::-1][: len(expert.weight)]  # h_{s-1}, h_{s-2}, ...
            weights = expert.weight.double().flip(0)
            z = sum(w * h for w, h in zip(weights, newest, strict=False)) + expert.bias.double()
            feature = history[-1] + alpha * z
        if step in full or predictor.remembers_forecasts:
            history.append(feature)
        felt.append(feature)
    return torch.stack(felt)


@pytest.mark.parametrize("stream", ["cond", "uncond"])
@pytest.mark.parametrize("remembers_forecasts", [True, False])
@pytest.mark.parametrize("schedule", ["paper:7", "every:5", "at:0,1,9,20,21,40"])
@torch.no_grad()
def test_the_rows_of_lesa_are_the_papers_recurrence(stream, remembers_forecasts, schedule):
    predictor = shaken(LESA(origin(schedule=schedule), remembers_forecasts=remembers_forecasts), 0.1)
    features = torch.randn(STEPS, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = compile(predictor.for_stream(stream), GRID, predictor.schedule)
    unrolled = plan.unroll()
    got = torch.einsum("sk,knc->snc", unrolled[:, :-1], features) + unrolled[:, -1, None, None]
    expected = published(predictor, stream, plan.full, features)
    assert expected.abs().max() < 1e4  # nothing blew up, so the comparison means something
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(published(predictor, "uncond" if stream == "cond" else "cond", plan.full, features), got)


def test_a_short_history_that_a_predictor_was_trained_with_is_no_makeshift():
    predictor = LESA(origin(schedule="every:5"))
    assert [predictor.wants(GRID, step) for step in (1, 6, 11, 49)] == [1, 2, 3, 8]  # at most the 4, 8, 8 of its stages
    assert compile(predictor.for_stream("cond"), GRID, Schedule.every(5), strict=True).truncated == ()


def test_a_forecaster_stands_for_its_first_stream():
    predictor = shaken(LESA(origin()))
    past = [0, 1, 2, 3]
    first, other = (predictor.for_stream(name).row(GRID, 6, past) for name in ("cond", "uncond"))
    assert torch.equal(predictor.row(GRID, 6, past).coefficients, first.coefficients)
    assert not torch.allclose(first.coefficients, other.coefficients)


@pytest.mark.parametrize("kind", [LESA, L2P])
@pytest.mark.parametrize("schedule", ["paper:7", "every:5", "at:0,8,15,20,27,35,41,45,47,49"])
def test_a_new_predictor_of_full_steps_is_taylor_1(kind, schedule):
    schedule = Schedule.parse(schedule)
    new = compile(kind(origin(schedule=str(schedule))), GRID, schedule)
    taylor = compile(Taylor(1), GRID, schedule)
    torch.testing.assert_close(new.unroll(), taylor.unroll(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [LESA, LESA.paper, L2P])
def test_a_new_predictor_that_remembers_forecasts_is_near_reuse(make):
    predictor = make(origin(), remembers_forecasts=True)
    plan = compile(predictor, GRID, predictor.schedule)
    for step, row in plan.rows.items():
        assert row.coefficients[-1] == pytest.approx(1.0, abs=0.03), step
        assert sum(map(abs, row.coefficients[:-1])) < 0.03
        assert row.offset == 0
    assert plan.noise_gain().max() < 1.05


def test_a_new_predictor_is_the_same_every_time_and_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = LESA(origin()).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = LESA(origin()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_streams_and_stages_have_parameters_of_their_own():
    for predictor in (LESA(origin()), L2P(origin())):
        mine = [{id(p) for p in predictor.numbers(stream)} for stream in ("cond", "uncond")]
        assert not mine[0] & mine[1]
        assert mine[0] | mine[1] == {id(p) for p in predictor.parameters()}
    assert [len(expert.weight) for expert in LESA(origin()).stage_experts("cond")] == [4, 8, 8]


def test_the_papers_predictor_has_its_size():
    paper = LESA.paper(origin(streams=("cond",)))
    assert 2.3e6 < sum(p.numel() for p in paper.parameters()) < 2.5e6
    assert sum(len(e.weight) + e.bias.numel() for e in paper.stage_experts("cond")) == 23
    assert paper.remembers_forecasts


@pytest.mark.parametrize(("steps", "mu"), [(50, 1.15), (28, 1.15), (50, 0.5), (100, 1.8), (8, 3.0)])
def test_a_kan_takes_up_any_alphas(steps, mu):
    predictor = LESA(origin(grid=tuple(flux_grid(steps, mu).tolist()), schedule="every:3"))
    random = torch.Generator().manual_seed(0)
    for _ in range(3):  # one after the other: errors must not add up
        alphas = 2 * torch.randn(steps, generator=random)
        predictor.absorb(alphas, "uncond")
        with torch.no_grad():
            assert (predictor.alphas("uncond") - alphas).abs().max() < 1e-5
            assert (predictor.alphas("cond") - predictor.slopes()).abs().max() < 1e-5  # the other stays


def test_the_papers_kan_cannot_hold_any_alphas():
    paper, ours = LESA.paper(origin()), LESA(origin())
    alphas = torch.randn(STEPS, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"cannot hold these alphas, they miss one by .*; train the KANs themselves"):
        paper.absorb(alphas, "cond")
    with torch.no_grad():
        assert (paper.alphas("cond") - alphas).abs().max() > alphas.std()  # as the docstring of LESA says
    assert 10 * sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in paper.parameters())


def test_rows_are_differentiable_to_every_number():
    for predictor in (shaken(LESA(origin())), shaken(L2P(origin()))):
        pasts = {step: row.past for step, row in compile(predictor, GRID, predictor.schedule).rows.items()}
        rows = predictor.stream_rows("cond", GRID, pasts)
        sum(row.coefficients.square().sum() + row.offset.square() for row in rows.values()).backward()
        assert all(p.grad is not None for p in predictor.numbers("cond"))
        assert all(p.grad is None for p in predictor.numbers("uncond"))
        alphas = torch.full((STEPS,), 0.5, requires_grad=True)
        if isinstance(predictor, LESA):
            given = predictor.stream_rows("cond", GRID, pasts, alphas)
            (gradient,) = torch.autograd.grad(sum(row.coefficients.sum() for row in given.values()), alphas)
            assert gradient.nonzero().flatten().tolist() == sorted(pasts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LESA(origin(), memories=(4, 8)), "3 stages need as many memories of at least 1, got .4, 8."),
        (lambda: LESA(origin(), memories=(4, 8, 0)), "at least 1"),
        (lambda: LESA(origin(), bounds=(0.5, 0.9)), "bounds between stages fall"),
        (lambda: L2P(origin(), memory=0), "at least 1 past feature"),
        (lambda: LESA(origin(schedule="at:1,5")), "first step of a run is full"),
        (lambda: LESA(origin(schedule="at:0,50")), "below 50"),
        (lambda: L2P(origin(schedule="paper")), "a schedule reads"),
        (lambda: L2P(origin(grid=(1.5, 0.5))), "times of a grid lie in"),
        (lambda: ContinuousLESA(origin(grid=(1.0, 0.5), schedule="at:0")), "last time of a grid is 0"),
    ],
)
def test_what_does_not_fit_is_an_error_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- what it fits


@each_predictor
def test_another_grid_or_stream_is_an_error_before_the_run(make):
    predictor = make()
    with pytest.raises(ValueError, match=r"trained for 50 steps .*, got 28 steps .*num_inference_steps=50"):
        compile(predictor, flux_grid(28), Schedule.paper(7))
    with pytest.raises(ValueError, match=r"got 50 steps .*image size"):
        compile(predictor, flux_grid(50, mu=0.7), Schedule.paper(7))
    with pytest.raises(ValueError, match=r"streams cond, uncond, got 'negative'; train one"):
        predictor.for_stream("negative")


def test_a_predictor_is_for_its_schedule_only():
    free = L2P(origin(), memory=5, remembers_forecasts=True)
    for predictor in (L2P(origin()), free, LESA(origin()), LESA(origin(), remembers_forecasts=True)):
        compile(predictor, GRID, Schedule.paper(7))
        for schedule, start in ((Schedule.paper(8), 0), (Schedule.every(7), 0), (Schedule.paper(7), 5)):
            with pytest.raises(ValueError, match=r"trained for Schedule.parse\('paper:7'\), got step"):
                compile(predictor, GRID, schedule, start)


def test_another_model_or_tap_is_an_error():
    predictor = LESA(origin())
    predictor.check_model(FluxTransformer2DModel(), TAP)
    predictor.check_model(FluxTransformer2DModel(new_in_diffusers=True), TAP)
    with pytest.raises(
        ValueError, match=r"models/tiny, got another .* \(num_layers=3 instead of 2\); take the predictor"
    ):
        predictor.check_model(FluxTransformer2DModel(num_layers=3), TAP)
    with pytest.raises(ValueError, match=r"axes_dims_rope=\[4, 4, 8\] instead of \[4, 4, 4\]"):
        predictor.check_model(FluxTransformer2DModel(axes_dims_rope=(4, 4, 8)), TAP)
    other = type("QwenImageTransformer2DModel", (FluxTransformer2DModel,), {})
    with pytest.raises(ValueError, match=r"a FluxTransformer2DModel, got a QwenImageTransformer2DModel; take"):
        predictor.check_model(other(), TAP)
    with pytest.raises(ValueError, match=r"'norm_out'\), got the tap .*'proj_out'\); accelerate with"):
        predictor.check_model(FluxTransformer2DModel(), Tap(TAP.blocks, "proj_out"))


# --- saved and loaded


@each_predictor
def test_a_predictor_comes_back_as_it_was_saved(make, tmp_path, monkeypatch):
    predictor = shaken(make())
    monkeypatch.setattr(Predictor, "push_to_hub", lambda *_, **__: pytest.fail("nobody asked for it"))
    predictor.save_pretrained(tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "one")) == FILES

    def no_pickle(*_, **__):
        pytest.fail("a predictor is loaded without pickle")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, no_pickle)
    again = Predictor.from_pretrained(tmp_path / "one")
    assert type(again) is type(predictor) and not again.training
    assert again.origin == predictor.origin and again.options() == json.loads(json.dumps(predictor.options()))
    ours, theirs = predictor.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    for stream in ("cond", "uncond"):
        plan = compile(predictor.for_stream(stream), GRID, predictor.schedule)
        assert compile(again.for_stream(stream), GRID, again.schedule) == plan  # to the bit
        assert Plan.from_json(plan.to_json()) == plan
    again.save_pretrained(tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_the_json_says_what_the_predictor_fits(tmp_path):
    LESA(origin(), memories=(3, 5, 7)).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["format"] == "lesa-predictor-1" and entries["method"] == "lesa"
    assert entries["model"] == "models/tiny" and entries["transformer"] == "FluxTransformer2DModel"
    assert entries["config"] == {"num_layers": 2, "axes_dims_rope": [4, 4, 4]}
    assert entries["tap"] == [["transformer_blocks", "single_transformer_blocks"], "norm_out"]
    assert entries["grid"] == GRID.tolist() and entries["schedule"] == "paper:7"
    assert entries["streams"] == ["cond", "uncond"] and entries["data"] == "0123"
    assert entries["options"]["bounds"] == [0.9, 0.5] and entries["options"]["memories"] == [3, 5, 7]
    assert entries["versions"] == {"torch": "2"} and len(entries["sha256"]) == 64
    card = (tmp_path / "README.md").read_text()
    assert "models/tiny" in card and "50 steps" in card and "`paper:7`" in card and "More Information" not in card


def test_the_card_is_written_anew_unless_somebody_changed_it(tmp_path):
    card = tmp_path / "README.md"
    for schedule in ("paper:7", "at:0,9"):
        LESA(origin(schedule=schedule)).save_pretrained(tmp_path)
        assert f"on the schedule `{schedule}`" in card.read_text()
    for mine in (b"mine", b"\xff\xfe"):
        card.write_bytes(mine)
        LESA(origin()).save_pretrained(tmp_path)
        assert card.read_bytes() == mine


@pytest.mark.parametrize("folder", sorted({one.parent for one in (ROOT / "models").glob("*/**/lesa/**/config.json")}))
def test_the_card_of_a_shipped_predictor_is_of_it(folder):
    predictor = Predictor.from_pretrained(folder)
    assert (folder / "README.md").read_text() == str(predictor.generate_model_card())


def test_weights_take_16_bits_where_nothing_is_lost(tmp_path):
    predictor = LESA(origin())
    with torch.no_grad():
        predictor.stage_experts("cond")[0].weight[0] = 1e-9
        predictor.stage_experts("cond")[1].weight[0] = 1e6
    predictor.save_pretrained(tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), predictor.state_dict()
    assert all(torch.equal(stored[name].float(), state[name]) for name in state)
    assert {stored[f"experts.cond.{k}.weight"].dtype for k in (0, 1)} == {torch.float32}
    assert stored["experts.cond.2.weight"].dtype == stored["experts.cond.2.kan.0.spline"].dtype == torch.float16
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * 4 * sum(p.numel() for p in predictor.parameters())


def test_a_predictor_is_loaded_by_its_own_class_or_the_base_class(tmp_path):
    L2P(origin()).save_pretrained(tmp_path)
    assert isinstance(L2P.from_pretrained(tmp_path), L2P)
    with pytest.raises(ValueError, match=r"holds a L2P, not a LESA; load it as a Predictor"):
        LESA.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor")
    shaken(LESA(origin())).save_pretrained(folder)
    return folder


def rewrite(folder, change):
    file = folder / "config.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def weights_damage(change):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["experts.cond.0.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "weights cut off": weights_damage(lambda data: data[: len(data) // 2]),
    "weights empty": weights_damage(lambda data: b""),
    "one bit of the weights": weights_damage(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "other weights": other_weights,
    "JSON cut off": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:-30]),
    "JSON empty": lambda f: (f / "config.json").write_text(""),
    "JSON list": lambda f: (f / "config.json").write_text("[]"),
    "no text": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xff"),
    "other format": lambda f: rewrite(f, lambda e: e.update(format="lesa-predictor-0")),
    "no format": lambda f: rewrite(f, lambda e: e.pop("format")),
    "another library's": lambda f: (f / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}'),
    "other schedule": lambda f: rewrite(f, lambda e: e.update(schedule="paper:8")),
    "other grid": lambda f: rewrite(f, lambda e: e["grid"].__setitem__(3, 0.97)),
    "other model": lambda f: rewrite(f, lambda e: e["config"].update(num_layers=3)),
    "other method": lambda f: rewrite(f, lambda e: e.update(method="l2p")),
    "other options": lambda f: rewrite(f, lambda e: e["options"].update(remembers_forecasts=True)),
    "entry missing": lambda f: rewrite(f, lambda e: e.pop("grid")),
    "entry added": lambda f: rewrite(f, lambda e: e.update(extra=1)),
    "no digest": lambda f: rewrite(f, lambda e: e.pop("sha256")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_predictor_is_an_error(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / "predictor")
    Predictor.from_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=r"predictor holds no whole predictor of lesa \(.+\); fetch or train it again"):
        Predictor.from_pretrained(folder)


def test_the_layout_of_the_json_does_not_matter(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "predictor")
    rewrite(folder, lambda entries: None)
    assert (folder / "config.json").read_bytes() != (saved / "config.json").read_bytes()
    Predictor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "predictor")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {name}, so no predictor of lesa; name its folder"):
        Predictor.from_pretrained(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "/no/such/folder", "nobody/nothing"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(FileNotFoundError, match=rf"{source} is neither a folder here nor a predictor on the hub"):
        Predictor.from_pretrained(source, local_files_only=True)


def test_a_full_disk_is_an_error_and_leaves_nothing_that_loads(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved, tmp_path / "predictor")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        L2P(origin()).save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        Predictor.from_pretrained(folder)


def test_the_shipped_predictor_lies_beside_the_model(tmp_path):
    pipe = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))
    for name, kind, schedule in (("a", L2P, "paper:5"), ("b", LESA, "paper:10"), ("lesa-paper7", LESA, "paper:7")):
        kind(origin(schedule=schedule)).save_pretrained(tmp_path / "lesa" / name)
    (tmp_path / "lesa" / "empty").mkdir()
    assert shipped_for(pipe).schedule == Schedule.paper(7)  # LESA, and of these the one with the most full steps
    assert shipped_for(pipe, Schedule.paper(10)).schedule == Schedule.paper(10)
    assert isinstance(shipped_for(pipe, Schedule.paper(5)), L2P)
    with pytest.raises(LookupError, match=r"trained for Schedule.parse\('every:5'\), only a, b, lesa-paper7"):
        shipped_for(pipe, Schedule.every(5))
    for name, drift in (("c", -20.0), ("d", -30.0), ("e", -25.0)):
        LESA(origin(schedule="at:0,3", training={"drift": drift})).save_pretrained(tmp_path / "lesa" / name)
    assert shipped_for(pipe, budget=2).origin.training["drift"] == -30.0  # of these, what came nearest to full runs
    (tmp_path / "lesa" / "lesa-paper7" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no whole predictor"):
        shipped_for(pipe)


@pytest.mark.parametrize("pipe", [SimpleNamespace(), SimpleNamespace(config=SimpleNamespace(_name_or_path="a/b"))])
def test_without_a_shipped_predictor_the_error_says_what_to_do(pipe):
    ways = r"no predictor is shipped for .*lesa calibrate.*lesa train.*from_pretrained.*lesa plan.*every\(3\)"
    with pytest.raises(LookupError, match=ways) as raised:
        shipped_for(pipe)
    assert "paper" not in str(raised.value)  # on the paper's schedules rows without training can be below fewer steps


# --- one predictor for many grids


def continuous(**options) -> ContinuousLESA:
    """One with two grids of several budgets, bent at random."""
    schedules = [
        (tuple(GRID.tolist()), ["at:0,30,40,45,48,49", "at:0,38,46,49"]),
        (tuple(flux_grid(28).tolist()), ["at:0,14,21,24,26,27"]),
    ]
    predictor = ContinuousLESA(origin(schedule="at:0,30,40,45,48,49"), schedules=schedules, **options)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if ".1.base" in name or ".1.spline" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return predictor


@pytest.mark.parametrize("order", [1, 3])
def test_a_new_continuous_predictor_is_lagranges_polynomial(order):
    predictor, schedule = ContinuousLESA(origin(), order=order), Schedule.at([0, 3, 9, 20, 30, 41])
    ours, wanted = (compile(f, GRID, schedule) for f in (predictor, Lagrange(order)))
    torch.testing.assert_close(ours.unroll(), wanted.unroll(), rtol=1e-5, atol=1e-5)
    assert ours.truncated == wanted.truncated


def test_a_continuous_predictor_is_made_for_as_little_past_as_it_was_trained_with():
    """Its planned schedules skip step 1; on the paper's, rows have four full steps before them."""
    planned, of_paper = continuous(), ContinuousLESA(origin(schedule="paper:7"))
    schedules = Schedule.at([0, 30, 40, 45, 48, 49]), Schedule.at([0, 20, 40])
    assert all(compile(planned, GRID, schedule, strict=True).truncated == () for schedule in schedules)
    assert compile(of_paper, GRID, Schedule.paper(7), strict=True).truncated == ()
    with pytest.raises(ValueError, match=r"step 1 is skipped but ContinuousLESA.* wants 4 past features there, got 1"):
        compile(of_paper, GRID, schedules[0], strict=True)


MODELS = Path(__file__).parent.parent / "models"
SHIPPED = sorted(path.parent for path in MODELS.glob("**/lesa/**/config.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: str(folder.relative_to(MODELS)))
def test_no_forecast_of_a_shipped_predictor_is_short(folder):
    """On the schedules that it was trained for: nothing there is a makeshift, and `strict` refuses none of them."""
    predictor = Predictor.from_pretrained(folder)
    own = getattr(predictor, "schedules", [(predictor.origin.grid, [predictor.origin.schedule])])
    for grid, texts in own:
        for text in texts:
            for stream in predictor.origin.streams:
                assert compile(predictor.for_stream(stream), grid, Schedule.parse(text), strict=True).truncated == ()


@pytest.mark.parametrize("stream", ["cond", "uncond"])
def test_its_rows_are_newtons_terms_bent_by_the_stages_kan(stream):
    predictor, past, step = continuous(), (0, 20, 33, 40), 44
    t, times = float(GRID[step]), [float(GRID[k]) for k in past[::-1]]
    assert t < 0.5  # the third stage
    bends = predictor.experts[stream][2](torch.tensor([[t, *times]]))[0].detach()

    def divided(ks):  # the divided difference of the features at these times, as coefficients of the features
        if len(ks) == 1:
            return torch.eye(4, dtype=torch.float64)[3 - ks[0]]
        return (divided(ks[1:]) - divided(ks[:-1])) / (times[ks[-1]] - times[ks[0]])

    wanted, ahead = divided([0]), 1.0
    for j in range(1, 4):
        ahead *= t - times[j - 1]
        wanted = wanted + (1 + float(bends[j - 1])) * ahead * divided(list(range(j + 1)))
    row = predictor.for_stream(stream).row(GRID, step, past)
    torch.testing.assert_close(row.coefficients.double(), wanted, rtol=1e-4, atol=1e-5)
    assert float(bends.detach().abs().min()) > 1e-3 and float(row.coefficients.detach().sum()) == pytest.approx(
        1, abs=1e-5
    )
    other = predictor.for_stream("uncond" if stream == "cond" else "cond").row(GRID, step, past)
    assert not torch.equal(row.coefficients, other.coefficients)


def test_its_rows_depend_on_times_alone():
    """The same times on a grid of other steps, among other full steps, give the same row."""
    predictor, other = continuous(), torch.cat([GRID[[0, 20, 33, 40, 44]], torch.zeros(1, dtype=torch.float64)])
    row = predictor.row(GRID, 44, (0, 20, 33, 40))
    short = predictor.stream_rows("cond", other, {4: (0, 1, 2, 3)})[4]
    torch.testing.assert_close(row.coefficients, short.coefficients)
    longer = predictor.row(GRID, 44, (0, 5, 20, 33, 40))
    assert longer.coefficients[0] == 0 and len(longer.coefficients) == 5
    many = predictor.rows_of(GRID, {44: (0, 20, 33, 40), 46: (0, 20, 33, 40)})
    torch.testing.assert_close(many[44].coefficients, row.coefficients)
    assert not torch.equal(many[46].coefficients, row.coefficients)


def test_it_knows_schedules_by_budget_and_for_grids_like_those_it_was_trained_for():
    predictor = continuous()
    assert predictor.schedule_for(GRID) == predictor.schedule_for(GRID, 6) == Schedule.at([0, 30, 40, 45, 48, 49])
    assert predictor.schedule_for(GRID, 4) == Schedule.at([0, 38, 46, 49])
    assert predictor.schedule_for(flux_grid(28)) == Schedule.at([0, 14, 21, 24, 26, 27])
    near, full = flux_grid(48), predictor.schedule_for(flux_grid(48)).full_steps(48)
    assert len(full) == 6 and (near[list(full)] - GRID[[0, 30, 40, 45, 48, 49]]).abs().max() < 0.03
    assert predictor.schedule_for(flux_grid(19)) == Schedule.at([0, 11, 15, 16, 17, 18])  # 50 steps' shares
    assert predictor.schedule_for(GRID, start=35) == Schedule.at([35, 40, 45, 48, 49])
    with pytest.raises(ValueError, match=r"schedules of 4, 6 full steps, got a budget of 5 on 50 steps"):
        predictor.schedule_for(GRID, 5)
    with pytest.raises(ValueError, match="trained for 28 to 50 steps, got 4 steps"):
        predictor.schedule_for(flux_grid(4))
    for budget, schedule, known in (
        (4, None, True),
        (5, None, False),
        (None, "at:0,38,46,49", True),
        (6, "at:0,38,46,49", False),
    ):
        assert predictor.is_for(schedule and Schedule.parse(schedule), budget) is known


def shifted_twice(**options) -> ContinuousLESA:
    """One trained for two shifts, as two image sizes have: 1.15 and 2.0."""
    first, second = (["at:0,30,40,45,48,49"], ["at:0,6,9,44,48,49"])
    grids = [(tuple(flux_grid(50, mu=mu).tolist()), texts) for mu, texts in ((1.15, first), (2.0, second))]
    return ContinuousLESA(origin(schedule="at:0,30,40,45,48,49"), schedules=grids, **options)


@pytest.mark.parametrize("mu", [0.84, 1.4, 1.54, 2.6, 3.2])
def test_on_grids_of_other_shifts_the_schedule_ends_as_the_trained_ones_do(mu):
    """By the nearest times the last step was skipped between two trained shifts, which no row was trained for."""
    full = shifted_twice().schedule_for(flux_grid(50, mu=mu)).full_steps(50)
    assert len(full) == 6 and full[-2:] == (48, 49)


def test_of_several_schedules_the_one_with_rows_like_trained_ones_is_taken():
    predictor, grid = shifted_twice(), flux_grid(50, mu=1.6)
    strange = {
        text: predictor._strangeness(grid, Schedule.parse(text).full_steps(50))
        for _, (text,) in ((times, texts) for times, texts in predictor.schedules)
    }
    assert len(set(strange.values())) == 2
    assert str(predictor.schedule_for(grid)) == min(strange, key=lambda text: strange[text])
    for times, (text,) in predictor.schedules:
        assert (
            predictor._strangeness(torch.tensor(times, dtype=torch.float64), Schedule.parse(text).full_steps(50)) == 0
        )


def spread(kind: str) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **{f"use_{kind}_sigmas": True})
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 50, 50).tolist(), mu=1.15)
    return from_scheduler(scheduler)


@pytest.mark.parametrize("kind", ["beta", "karras", "exponential"])
def test_grids_of_another_shape_are_refused(kind):
    with pytest.raises(ValueError, match="up to a shift, got times spread otherwise"):
        shifted_twice().check_grid(spread(kind))
    with pytest.raises(ValueError, match="up to a shift, got times spread otherwise"):
        shifted_twice().row(spread(kind), 3, (0, 1))


def test_grids_far_off_in_shift_or_steps_are_refused():
    predictor = shifted_twice()
    for steps, mu in ((34, 1.15), (55, 1.15), (50, 0.2), (50, 3.2)):
        predictor.check_grid(flux_grid(steps, mu=mu))
    for steps in (33, 56, 70):
        with pytest.raises(ValueError, match=f"trained for 50 to 50 steps, got {steps} steps"):
            predictor.check_grid(flux_grid(steps, mu=1.15))
    for mu in (-0.6, 3.8):
        with pytest.raises(ValueError, match=r"reach t = 0\.7.* to t = 0\.8.* halfway, got .* a shift too far"):
            predictor.check_grid(flux_grid(50, mu=mu))
    with pytest.raises(ValueError, match="a shift too far"):  # trained for one shift alone, it knows no other
        continuous().check_grid(flux_grid(28, mu=0.8))


def test_a_continuous_predictor_that_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match="order is at least 1, got 0"):
        ContinuousLESA(origin(), order=0)
    with pytest.raises(ValueError, match="the bounds between stages fall"):
        ContinuousLESA(origin(), bounds=(0.4, 0.9))


def test_a_budget_picks_the_predictor(tmp_path):
    pipe = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))
    LESA(origin(schedule="at:0,9,30")).save_pretrained(tmp_path / "lesa" / "three")
    LESA(origin(schedule="at:0,9,20,30")).save_pretrained(tmp_path / "lesa" / "four")
    assert shipped_for(pipe, budget=3).full == (0, 9, 30)
    assert shipped_for(pipe).full == (0, 9, 20, 30)
    continuous().save_pretrained(tmp_path / "lesa" / "many")
    assert isinstance(shipped_for(pipe), ContinuousLESA) and isinstance(shipped_for(pipe, budget=4), ContinuousLESA)
    assert isinstance(shipped_for(pipe, budget=3), LESA)
    with pytest.raises(LookupError, match="trained for '5 full steps', only four, many, three"):
        shipped_for(pipe, budget=5)
