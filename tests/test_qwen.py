"""Qwen-Image: two streams with texts of different lengths, two taps, and the whole path from runs to pictures."""

import json
from pathlib import Path

import pytest
import torch
from tiny import TRAINED
from torch import Tensor

from lesa.bench import records
from lesa.cli import main
from lesa.host.head import head
from lesa.host.intercept import intercept
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.collect import record
from lesa.learn.planning import Planner
from lesa.learn.training import drift
from lesa.predictors import LESA, Origin, configuration
from lesa.rows.forecasters import Reuse, Taylor
from lesa.rows.schedule import Schedule

PROMPT, OTHER = "small red apple on white, left", "fish"
STEPS, TOKENS = 8, torch.arange(16)
EVERY = Schedule.every(3)
CALL = dict(height=32, width=32, num_inference_steps=STEPS)
GUIDED = dict(negative_prompt=OTHER, true_cfg_scale=3.0)
PLACES = ["feature", "norm", "projection", "output"]


def draw(pipe, prompt=PROMPT, **changes) -> Tensor:
    call = dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe(prompt, **{**call, **changes}).images


@pytest.fixture(scope="module")
def reference(tiny_qwen) -> Tensor:
    return draw(tiny_qwen, **GUIDED)


@pytest.mark.parametrize("place", PLACES)
def test_with_every_step_full_nothing_changes(tiny_qwen, reference, place):
    with accelerate(tiny_qwen, Taylor(1), schedule=Schedule.every(1), tap=place) as run:
        assert torch.equal(draw(tiny_qwen, **GUIDED), reference)
    assert {name: done.full_steps for name, done in run.summary().items()} == {"cond": STEPS, "uncond": STEPS}
    assert torch.equal(draw(tiny_qwen, **GUIDED), reference)


@pytest.mark.parametrize("place", PLACES)
def test_swapped_prompts_swap_the_histories(tiny_qwen, place):
    """The same latents at every step, whatever the streams make of them: each stream sees its own text and past."""
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(1, 16, 16, generator=generator) for _ in range(STEPS)]

    def histories(prompt: str, negative_prompt: str) -> tuple[dict, dict]:
        def force(_pipe, step, *_):
            if step == STEPS - 2:  # later they are freed
                histories = {
                    stream_run.name: stream_run.parts[0][1][0] for stream_run in run._executor._stream_runs.values()
                }
                assert histories["cond"]._shape[-1] == (16 if tap.module is None else 24)
                held.update((name, history._features.clone()) for name, history in histories.items())
            return {"latents": given[step]}

        held: dict = {}
        tap = tap_of(tiny_qwen.transformer, place)
        with accelerate(tiny_qwen, Taylor(2), schedule=EVERY, tap=place) as run:
            outputs: dict = {"cond": [], "uncond": []}
            names = iter(["cond", "uncond"] * STEPS)

            def record(go_on, _transformer, *args, **kwargs):
                output = go_on(*args, **kwargs)
                outputs[next(names)].append(output[0].clone())
                return output

            undo = intercept(tiny_qwen.transformer, "__call__", record)
            draw(tiny_qwen, prompt, negative_prompt=negative_prompt, true_cfg_scale=3.0, callback_on_step_end=force)
            undo()
        return held, outputs

    held, outputs = histories(PROMPT, OTHER)
    swapped_held, swapped_outputs = histories(OTHER, PROMPT)
    for ours, theirs in (("cond", "uncond"), ("uncond", "cond")):
        assert torch.equal(held[ours], swapped_held[theirs])
        assert all(map(torch.equal, outputs[ours], swapped_outputs[theirs]))
    assert not torch.equal(held["cond"], held["uncond"])


@pytest.mark.parametrize("call", [{}, dict(true_cfg_scale=1.0, negative_prompt=OTHER), dict(true_cfg_scale=4.0)])
def test_without_guidance_there_is_one_stream(tiny_qwen, call):
    expected = draw(tiny_qwen)
    with accelerate(tiny_qwen, Taylor(1), schedule=EVERY) as run:
        skipped = draw(tiny_qwen, **call)
    assert list(run.summary()) == ["cond"] and run.summary()["cond"].skipped_steps == 5
    with accelerate(tiny_qwen, Taylor(1), schedule=Schedule.every(1)):
        assert torch.equal(draw(tiny_qwen, **call), expected)
    assert not torch.equal(skipped, expected)


def test_guided_and_plain_calls_follow_each_other(tiny_qwen):
    with accelerate(tiny_qwen, Taylor(1), schedule=EVERY):
        plain, guided = draw(tiny_qwen), draw(tiny_qwen, **GUIDED)
        assert torch.equal(draw(tiny_qwen), plain) and torch.equal(draw(tiny_qwen, **GUIDED), guided)


def test_prompts_of_a_batch_may_differ_in_length(tiny_qwen):
    prompts, negative = [PROMPT, "large pear"], [OTHER, "grey"]
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    with accelerate(tiny_qwen, Taylor(1), schedule=EVERY):
        both = draw(tiny_qwen, prompts, negative_prompt=negative, true_cfg_scale=3.0, generator=seeds)
        alone = [
            draw(tiny_qwen, p, negative_prompt=n, true_cfg_scale=3.0, generator=torch.Generator().manual_seed(k))
            for k, (p, n) in enumerate(zip(prompts, negative, strict=True))
        ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_the_head_gives_the_outputs_of_both_streams(tiny_qwen, place):
    tap = tap_of(tiny_qwen.transformer, place)
    [run] = record(tiny_qwen, [PROMPT], [3], TOKENS, tap=tap, **CALL, **GUIDED)
    assert run.streams == ("cond", "uncond")
    for stream in run.streams:
        with torch.no_grad():
            outputs = head(tiny_qwen.transformer, tap)(run.features[stream], run.conditioning[stream])
        torch.testing.assert_close(outputs, run.outputs[stream])


@pytest.mark.parametrize("place", ["norm", "projection"])
def test_the_drift_of_guided_runs_is_planned(tiny_qwen, place):
    tap, prompts, seeds = tap_of(tiny_qwen.transformer, place), [PROMPT, "large blue fish on grey, right"], [3, 4]
    call = dict(**CALL, **GUIDED)
    reference = record(tiny_qwen, prompts, seeds, TOKENS, tap=tap, **call)
    planner = Planner.of(tiny_qwen, reference, tap, **call)
    planned = planner.search(Reuse(), 4)
    drifts = {}
    for schedule in (planned, Schedule.at([0, 1, 2, 3])):
        with accelerate(tiny_qwen, Reuse(), schedule=schedule, tap=tap):
            drifts[schedule] = drift(record(tiny_qwen, prompts, seeds, TOKENS, tap=tap, **call), reference)
        predicted = planner.drift(Reuse(), schedule.full_steps(STEPS))
        assert predicted == pytest.approx(drifts[schedule], abs=1.0)
    assert drifts[planned] < drifts[Schedule.at([0, 1, 2, 3])]


def test_stages_are_the_papers_for_each_class(tiny_qwen, tiny_flux):
    for pipe, bounds in ((tiny_qwen, (0.9, 0.4)), (tiny_flux, (0.9, 0.5))):
        transformer = pipe.transformer
        kind, grid = type(transformer).__name__, tuple(torch.linspace(1, 0, 9).tolist())
        origin = Origin("tiny", kind, configuration(transformer), tap_of(transformer), grid, "paper:3")
        assert LESA(origin).bounds == LESA.paper(origin).bounds == bounds
        assert LESA(origin, bounds=(0.7, 0.6)).bounds == (0.7, 0.6)


# --- the commands


@pytest.fixture(scope="module")
def model(tiny_qwen, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-qwen")
    tiny_qwen.save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps({**CALL, **GUIDED}))
    (folder / "prompts").mkdir()
    splits = dict(train=["small blue pear on grey, left", "large red fish on white, right"], validation=[PROMPT])
    for split, prompts in dict(splits, heldout=["large green pear on white, left"]).items():
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(prompts) + "\n")
    return folder


def lesa(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_guided_predictor_from_runs_to_pictures(model, tmp_path, capsys):
    prompts, runs, out = model / "prompts", tmp_path / "runs", tmp_path / "lesa"
    assert lesa("collect", model, "--prompts", prompts / "train.txt", "--out", runs) == 0
    few = ["--validation-prompts", prompts / "validation.txt", "--rounds", 1, "--updates", 4, 4]
    train = ["train", model, "--data", runs, *few]
    assert lesa(*train, "--budget", 4, "--out", out) in TRAINED
    config = json.loads((out / "config.json").read_text())
    assert config["streams"] == ["cond", "uncond"] and config["options"]["bounds"] == [0.9, 0.4]
    assert config["tap"] == [["transformer_blocks"], "proj_out"]
    assert lesa("bench", model, "--predictors", out, "--budgets", 4, "--pairs", 1, "--timed", 1, "--out", tmp_path) == 0
    assert [r.full_steps for r in records.load(tmp_path).results() if r.method == "LESA"] == [4]
    assert lesa(*train, "--tap", "norm", "--out", tmp_path / "other") == 2
    assert "was collected at the tap 'proj_out', got 'norm_out'" in capsys.readouterr().err
