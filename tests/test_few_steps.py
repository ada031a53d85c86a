"""Few-step models: the student emoji-schnell, the LoRA emoji-qwen/lightning, and predictors for 4 and 8 steps."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from composed_emoji import Atlas
from peft import LoraConfig
from tiny import TRAINED

import lesa
from lesa.cli import main
from lesa.host.pipelines import with_call
from lesa.learn.metrics import psnr
from lesa.predictors import LESA, Origin, Predictor, shipped_for
from lesa.rows.grid import from_scheduler
from lesa.rows.plan import compile

MODELS = Path(__file__).parent.parent / "models"
FLUX, SCHNELL, QWEN = MODELS / "emoji-flux", MODELS / "emoji-schnell", MODELS / "emoji-qwen"
LIGHTNING = QWEN / "lightning"
HELD_OUT = (FLUX / "prompts" / "heldout.txt").read_text().splitlines()
SHIFTED = [3 * t / (1 + 2 * t) for t in torch.linspace(1, 0, 9).tolist()]
GRIDS = {"schnell": [1, 0.75, 0.5, 0.25, 0], "lightning": SHIFTED}
FULL = {"schnell": (0, 3), "lightning": (0, 4, 6, 7)}
HALF = {"schnell": (0, 2), "lightning": (0, 1, 3, 5)}
"""The full steps of the schedules shipped, and of the published ones."""
each = pytest.mark.parametrize("name", GRIDS)


@pytest.fixture(scope="module")
def pipes():
    loaded = {"schnell": lesa.load(SCHNELL), "lightning": lesa.load(QWEN, lora=LIGHTNING)}
    for pipe in loaded.values():
        pipe.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe, prompts=HELD_OUT[:2], **changes) -> list[np.ndarray]:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return [np.asarray(image) for image in pipe(prompt=prompts, generator=seeds, **changes).images]


def near(pictures, others) -> float:
    return float(np.mean([psnr(a, b) for a, b in zip(pictures, others, strict=True)]))


# --- the models


@each
def test_a_student_walks_its_few_steps_and_draws_held_out_prompts(pipes, name):
    prompts = HELD_OUT[:8]
    pictures = draw(pipes[name], prompts)
    expected = torch.tensor(GRIDS[name], dtype=torch.float64)
    torch.testing.assert_close(from_scheduler(pipes[name].scheduler), expected, atol=1e-6, rtol=0)
    assert sum(Atlas(SCHNELL).is_prompted(prompts, pictures)) >= 7


def test_schnell_is_emoji_flux_with_another_transformer_and_scheduler(pipes):
    for file in sorted(path.relative_to(FLUX) for path in FLUX.glob("*/*")):
        if file.parts[0] not in ("transformer", "scheduler", "lesa"):
            assert (SCHNELL / file).read_bytes() == (FLUX / file).read_bytes(), file
    assert sum(file.stat().st_size for file in SCHNELL.rglob("*")) <= 25e6


def test_lightning_is_small_and_saved_as_the_pipeline_saves_loras(pipes):
    saved = LIGHTNING / "pytorch_lora_weights.safetensors"
    assert saved.stat().st_size < 4e6
    state = type(pipes["lightning"]).lora_state_dict(LIGHTNING)
    assert all(key.startswith("transformer.transformer_blocks.") for key in state)


# --- predictors


@each
def test_the_predictor_shipped_for_few_steps_is_found_and_better_than_fewer_steps_and_the_published_schedule(
    pipes, name
):
    pipe, prompts = pipes[name], HELD_OUT[:4]
    reference = draw(pipe, prompts)
    with lesa.accelerate(pipe) as run:
        forecast = draw(pipe, prompts)
    done = run.summary()
    assert list(done) == ["cond"] and run.plan().full == FULL[name] and done["cond"].step_ratio == 2
    published = lesa.Schedule.at(HALF[name])
    with lesa.accelerate(pipe, schedule=published) as run:
        others = [draw(pipe, prompts)]
    assert run.plan().full == HALF[name]
    others.append(draw(pipe, prompts, num_inference_steps=len(GRIDS[name]) // 2))
    assert near(forecast, reference) > 1 + max(near(other, reference) for other in others)


def test_a_predictor_for_long_runs_refuses_few_steps():
    pipe = lesa.load(FLUX)
    for budget in (None, 4):
        with (
            lesa.accelerate(pipe, budget=budget),
            pytest.raises(ValueError, match=r"trained for 20 to 50 steps, got 4 steps .* train one"),
        ):
            pipe("large penguin on orange, middle", num_inference_steps=4)
    with (
        lesa.accelerate(pipe, Predictor.from_pretrained(FLUX / "lesa" / "lesa-paper7")),
        pytest.raises(ValueError, match=r"trained for 50 steps .*, got 4 steps"),
    ):
        pipe("large penguin on orange, middle", num_inference_steps=4)


@each
def test_a_predictor_for_few_steps_refuses_others(pipes, name):
    steps = len(GRIDS[name]) - 1
    with lesa.accelerate(pipes[name]), pytest.raises(ValueError, match=rf"trained for {steps} steps .*, got 6 steps"):
        pipes[name]("large penguin on orange, middle", num_inference_steps=6)


def test_the_predictors_of_a_model_are_not_those_of_its_lora(tmp_path):
    bare = tmp_path / "lightning"
    shutil.copytree(LIGHTNING, bare, ignore=shutil.ignore_patterns("lesa"))
    with pytest.raises(LookupError, match=f"no predictor is shipped for {bare}"):
        shipped_for(lesa.load(QWEN, lora=bare))


def test_an_expert_with_fewer_past_features_uses_its_newest_weights():
    grid = tuple(GRIDS["schnell"])
    origin = Origin("tiny", "FluxTransformer2DModel", {}, lesa.Tap(("blocks",), "norm_out"), grid, "at:0,2")
    for memories in ((4, 8, 8), (1, 1, 2)):
        predictor = LESA(origin, memories=memories)
        alphas = torch.tensor([0.0, 0.5, 0.0, 0.25])
        predictor.absorb(alphas, "cond")
        with torch.no_grad():
            for expert in predictor.stage_experts("cond"):
                expert.weight.copy_(torch.arange(1.0, len(expert.weight) + 1) - len(expert.weight))
                expert.weight[-1] = 2.0
        rows = compile(predictor, grid, predictor.schedule).rows
        assert rows[1].past == (0,) and rows[1].coefficients == pytest.approx((1 + 0.5 * 2,), abs=1e-2)
        assert rows[3].coefficients == pytest.approx((0.25 * -1, 1 + 0.25 * 2), abs=1e-2)


def test_forecasts_with_a_short_history_are_counted(pipes):
    with lesa.accelerate(pipes["schnell"], lesa.Taylor(1), schedule=lesa.Schedule.at([0, 2])) as run:
        draw(pipes["schnell"])
    assert run.summary()["cond"].short_rows == 1  # step 1 has one past feature, step 3 has two
    with (
        lesa.accelerate(pipes["schnell"], lesa.Taylor(1), schedule=lesa.Schedule.at([0, 2]), strict=True),
        pytest.raises(ValueError, match=r"step 1 is skipped but .* wants 2 past features there, got 1"),
    ):
        draw(pipes["schnell"])


# --- LoRA


def test_a_lora_is_loaded_before_or_after(pipes):
    pipe, late = pipes["lightning"], lesa.load(QWEN)
    late.scheduler, call = pipe.scheduler, dict(num_inference_steps=8, true_cfg_scale=1.0)
    late.set_progress_bar_config(disable=True)
    predictor = Predictor.from_pretrained(next(LIGHTNING.glob("lesa/lesa-*")))
    with lesa.accelerate(pipe, predictor):
        before = draw(pipe)
    with lesa.accelerate(late, predictor) as run:
        without = draw(late, **call)
        late.load_lora_weights(LIGHTNING)
        after = draw(late, **call)
        late.unload_lora_weights()
        again = draw(late, **call)
    assert np.array_equal(before, after) and np.array_equal(without, again)
    assert not np.array_equal(without, after)
    assert run.summary()["cond"].skipped_steps == 3 * 4


@pytest.mark.parametrize("place", ["projection", "norm", "output"])
def test_a_lora_of_the_tapped_module_sees_forecasts_too(tiny_qwen, place):
    """Its layer takes the module's place: what was put at the old one must go on to the new one."""
    call = dict(height=32, width=32, num_inference_steps=8, output_type="latent", prompt="fish")
    schedule = lesa.Schedule.every(2)

    def latents(pipe):
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    def add(pipe):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))

    pipes = [
        type(tiny_qwen)(**{**tiny_qwen.components, "transformer": copy.deepcopy(tiny_qwen.transformer)}) for _ in "12"
    ]
    add(pipes[0])
    with lesa.accelerate(pipes[0], lesa.Reuse(), schedule=schedule, tap=place):
        before = latents(pipes[0])
    with lesa.accelerate(pipes[1], lesa.Reuse(), schedule=schedule, tap=place):
        latents(pipes[1])
        add(pipes[1])
        after = latents(pipes[1])
    assert torch.equal(before, after)
    assert torch.equal(latents(pipes[0]), latents(pipes[1]))  # and nothing is left of the acceleration


# --- commands


@pytest.mark.parametrize(
    ("model", "steps", "schedule"),
    [
        ([str(SCHNELL)], 4, "at:0,2"),
        pytest.param([str(QWEN), "--lora", str(LIGHTNING)], 8, "at:0,1,3,5", marks=pytest.mark.broad),
    ],
)
def test_the_commands_collect_train_and_compare_at_few_steps(tmp_path, capsys, model, steps, schedule):
    runs, out = str(tmp_path / "runs"), tmp_path / "lesa-2x"
    train, validation = (str(FLUX / "prompts" / f"{split}.txt") for split in ("train", "validation"))
    main(["collect", *model, "--steps", str(steps), "--prompts", train, "--limit", "4", "--out", runs])
    few = ["--validation-prompts", validation, "--validation", "2", "--rounds", "1", "--updates", "10", "10"]
    assert main(["train", *model, "--data", runs, "--memories", "1,2,2", *few, "--out", str(out)]) in TRAINED
    predictor = Predictor.from_pretrained(out)
    assert str(predictor.schedule) == schedule and predictor.memory == 2
    assert predictor.origin.model.split(" with ") == [model[0], *model[2:]]
    capsys.readouterr()
    compared = ["--all", "--pairs", "2", "--timed", "0", "--predictors", str(out), "--out", str(tmp_path / "bench")]
    assert main(["bench", *model, *compared]) == 0
    table = capsys.readouterr().out
    for method in ("fewer steps", "reuse", "Taylor-1 (our tap)", "LESA", "bound (output tap)"):
        assert method in table
    assert main(["generate", *model, HELD_OUT[0], "--out", str(tmp_path / "picture.png")]) == 0
    assert "2.00" in capsys.readouterr().out


# --- distillation


def test_students_learn_from_the_teachers_path(tiny_flux, call, monkeypatch):
    monkeypatch.syspath_prepend(str(MODELS))
    from emoji_students import teacher_latents

    noise, path = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)), []
    small = {k: call[k] for k in ("height", "width", "num_inference_steps", "max_sequence_length")}
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), small)
    pipe.set_progress_bar_config(disable=True)

    def keep(_pipe, _step, _time, tensors):
        path.append(tensors["latents"])
        return {}

    pipe(prompt=["a"], latents=noise, output_type="latent", callback_on_step_end=keep)
    grid = from_scheduler(pipe.scheduler).float()
    between = (grid[2] + 3 * grid[3]) / 4
    found = teacher_latents(pipe, ["a"], noise, torch.stack([grid[0], between, grid[5], grid[8]]))[0]
    wanted = torch.cat([noise, (path[1] + 3 * path[2]) / 4, path[4], path[7]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
