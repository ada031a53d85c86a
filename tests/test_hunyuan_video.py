"""HunyuanVideo: five-dimensional latents, the tap at the output and at the norm, and the path from runs to clips."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TRAINED, build_hunyuan_pipeline, build_hunyuan_transformer
from torch import Tensor

from lesa.bench import records
from lesa.bench.benchmark import draw as draw_pairs
from lesa.bench.benchmark import rounded
from lesa.bench.bound import decode
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, label
from lesa.cli import main
from lesa.host.head import from_tokens, head, to_tokens
from lesa.host.pipelines import with_call
from lesa.host.runtime import accelerate
from lesa.host.tap import TAPS, place_of, tap_of
from lesa.learn.collect import record
from lesa.learn.training import Problem, Runs
from lesa.predictors import L2P, Origin, Predictor, configuration
from lesa.rows.forecasters import Taylor
from lesa.rows.grid import from_scheduler
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

PROMPT, OTHER = "small red apple on white, left", "fish"
STEPS, TOKENS = 8, torch.arange(12)
EVERY = Schedule.every(3)
CALL = dict(height=32, width=48, num_frames=5, num_inference_steps=STEPS, max_sequence_length=16)
GUIDED = dict(negative_prompt=OTHER, true_cfg_scale=3.0)
PLACES = ["feature", "norm"]
KIND = "HunyuanVideoTransformer3DModel"


def draw(pipe, prompt=PROMPT, **changes) -> Tensor:
    call = dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe(prompt, **{**call, **changes}).frames


@pytest.fixture(scope="module")
def reference(tiny_hunyuan) -> Tensor:
    return draw(tiny_hunyuan, **GUIDED)


def test_it_is_tapped_at_its_output(tiny_hunyuan):
    usual = tap_of(tiny_hunyuan.transformer)
    assert usual == tap_of(tiny_hunyuan.transformer, "output") == TAPS[KIND]
    assert usual == Tap(("transformer_blocks", "single_transformer_blocks"), None)
    norm = tap_of(tiny_hunyuan.transformer, "norm")
    assert [place_of(KIND, tap) for tap in (usual, norm)] == PLACES
    origin = Origin("tiny", KIND, configuration(tiny_hunyuan.transformer), usual, (1.0, 0.5, 0.0), "every:2")
    assert label(L2P(origin)) == "L2P"
    assert label(L2P(Origin(**{**vars(origin), "tap": norm}))) == "L2P (norm tap)"


@pytest.mark.parametrize("place", PLACES)
def test_with_every_step_full_nothing_changes(tiny_hunyuan, reference, place):
    with accelerate(tiny_hunyuan, Taylor(1), schedule=Schedule.every(1), tap=place) as run:
        assert torch.equal(draw(tiny_hunyuan, **GUIDED), reference)
    assert {name: done.full_steps for name, done in run.summary().items()} == {"cond": STEPS, "uncond": STEPS}
    assert torch.equal(draw(tiny_hunyuan, **GUIDED), reference)


@pytest.mark.parametrize("place", PLACES)
def test_a_skipped_step_is_the_weighted_sum_of_its_row(tiny_hunyuan, place):
    tap = tap_of(tiny_hunyuan.transformer, place)
    with accelerate(tiny_hunyuan, Taylor(2), schedule=EVERY, tap=place) as run:
        [seen] = record(tiny_hunyuan, [PROMPT], [0], TOKENS, tap=tap, **CALL, **GUIDED)
        plans = {name: run.plan(name) for name in ("cond", "uncond")}
    assert seen.full == EVERY.full_steps(STEPS)
    for stream, plan in plans.items():
        features = seen.features[stream]
        for step, (past, coefficients, *_) in plan.rows.items():
            expected = torch.einsum("k,knc->nc", torch.tensor(coefficients), features[list(past)])
            torch.testing.assert_close(features[step], expected, rtol=0, atol=1e-5)


def test_swapped_prompts_swap_the_streams(tiny_hunyuan):
    """The same latents at every step, whatever the streams make of them: each stream sees its own text and past."""
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(1, 4, 2, 4, 6, generator=generator) for _ in range(STEPS)]

    def held(prompt: str, negative_prompt: str) -> dict[str, Tensor]:
        def force(_pipe, step, *_):
            if step == STEPS - 2:  # later they are freed
                stream_runs = run._executor._stream_runs.values()
                found.update(
                    (stream_run.name, stream_run.parts[0][1][0]._features.clone()) for stream_run in stream_runs
                )
            return {"latents": given[step]}

        found: dict[str, Tensor] = {}
        guided = dict(negative_prompt=negative_prompt, true_cfg_scale=3.0)
        with accelerate(tiny_hunyuan, Taylor(2), schedule=EVERY) as run:
            draw(tiny_hunyuan, prompt, **guided, callback_on_step_end=force)
        return found

    ours, theirs = held(PROMPT, OTHER), held(OTHER, PROMPT)
    assert torch.equal(ours["cond"], theirs["uncond"]) and torch.equal(ours["uncond"], theirs["cond"])
    assert not torch.equal(ours["cond"], ours["uncond"])


@pytest.mark.parametrize("call", [{}, dict(true_cfg_scale=4.0), dict(negative_prompt=OTHER)])
def test_without_guidance_there_is_one_stream(tiny_hunyuan, call):
    with accelerate(tiny_hunyuan, Taylor(1), schedule=EVERY) as run:
        draw(tiny_hunyuan, **call)
    assert list(run.summary()) == ["cond"] and run.summary()["cond"].skipped_steps == 5


@pytest.mark.parametrize("history", ["int8", "cpu"])
def test_histories_of_videos_are_stored_otherwise(tiny_hunyuan, reference, history):
    with accelerate(tiny_hunyuan, Taylor(1), schedule=EVERY):
        plain = draw(tiny_hunyuan, **GUIDED)
    with accelerate(tiny_hunyuan, Taylor(1), schedule=EVERY, history=history):
        stored = draw(tiny_hunyuan, **GUIDED)
    torch.testing.assert_close(stored, plain, rtol=0, atol=0.02 * float(plain.std()))
    assert not torch.equal(plain, reference)


# --- tokens


@pytest.mark.parametrize(("patch", "patch_t"), [(2, 1), (1, 2), (2, 2)])
def test_tokens_are_in_the_order_of_the_transformers_own(patch, patch_t):
    transformer = build_hunyuan_transformer(patch_size=patch, patch_size_t=patch_t)
    passed = []
    hook = transformer.proj_out.register_forward_hook(lambda _module, _args, output: passed.append(output))
    latents = torch.randn(2, 4, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mask, text, pooled = torch.ones(2, 5), torch.ones(2, 5, 32), torch.ones(2, 32)
        [output] = transformer(latents, torch.ones(2), text, mask, pooled, torch.ones(2), return_dict=False)
    hook.remove()
    assert torch.equal(to_tokens(transformer, output), passed[0])
    assert torch.equal(from_tokens(transformer, passed[0], like=latents), output)


def test_what_is_neither_tokens_nor_videos_is_refused(tiny_flux, tiny_hunyuan):
    for transformer, shape in ((tiny_hunyuan.transformer, (1, 4, 4, 6)), (tiny_flux.transformer, (1, 4, 2, 4, 6))):
        with pytest.raises(ValueError, match=r"tokens \(B, N, C\), or videos"):
            to_tokens(transformer, torch.zeros(shape))


@pytest.mark.parametrize("place", PLACES)
def test_the_head_gives_the_recorded_outputs(tiny_hunyuan, place):
    tap = tap_of(tiny_hunyuan.transformer, place)
    [run] = record(tiny_hunyuan, [PROMPT], [3], TOKENS, tap=tap, **CALL, **GUIDED)
    assert run.streams == ("cond", "uncond")
    for stream in run.streams:
        assert run.outputs[stream].shape == (STEPS, 12, 16)
        with torch.no_grad():
            outputs = head(tiny_hunyuan.transformer, tap)(run.features[stream], run.conditioning[stream])
        torch.testing.assert_close(outputs, run.outputs[stream])


@pytest.mark.parametrize("place", PLACES)
def test_the_unrolled_loop_on_tokens_is_the_run(tiny_hunyuan, place):
    """Euler's steps over recorded tokens end where the run does, and unrolled rows move them as a real run's."""
    tap = tap_of(tiny_hunyuan.transformer, place)
    [exact] = record(tiny_hunyuan, [PROMPT], [3], TOKENS, tap=tap, **CALL)
    grid = from_scheduler(tiny_hunyuan.scheduler)
    durations = grid.diff().float()
    way = torch.einsum("s,snc->nc", durations, exact.outputs["cond"])
    torch.testing.assert_close(exact.latents[0] + way, exact.latents[-1], rtol=0, atol=1e-5)
    origin = Origin("tiny", KIND, configuration(tiny_hunyuan.transformer), tap, tuple(grid.tolist()), str(EVERY))
    predictor = L2P(origin)
    with accelerate(tiny_hunyuan, predictor, schedule=EVERY):
        [real] = record(tiny_hunyuan, [PROMPT], [3], TOKENS, tap=tap, **CALL)
    problem = Problem(predictor, head(tiny_hunyuan.transformer, tap), "latents")
    runs = Runs.stack([real], ("cond",), tap=tap)
    pasts = {step: problem.pasts[step] for step in problem.skipped}
    rows = {"cond": predictor.stream_rows("cond", predictor.grid, pasts)}
    with torch.no_grad():
        forecasts = problem.forecasts(rows, runs.at(problem.full).features, closed_loop=True)
        outputs = problem.head(forecasts, runs.conditioning[:, :, problem.skipped])
    torch.testing.assert_close(outputs[0, 0], real.outputs["cond"][problem.skipped], rtol=0, atol=1e-4)


def test_recorded_latents_decode_to_the_clips_of_their_runs():
    pipe, pairs = with_call(build_hunyuan_pipeline(), CALL), [Pair(PROMPT, 0), Pair(OTHER, 1)]
    pipe.set_progress_bar_config(disable=True)
    clips, full_steps = draw_pairs(pipe, REFERENCE, pairs)
    assert full_steps == STEPS and [clip.shape for clip in clips] == [(5, 32, 48, 3)] * 2
    runs = record(pipe, [PROMPT, OTHER], [0, 1], TOKENS)
    for clip, decoded in zip(clips, decode(pipe, pairs, torch.stack([run.latents[-1] for run in runs])), strict=True):
        assert np.array_equal(clip, rounded(decoded))


# --- the commands


@pytest.fixture(scope="module")
def model(tiny_hunyuan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-hunyuan")
    tiny_hunyuan.save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps(CALL))
    (folder / "prompts").mkdir()
    splits = dict(train=["small blue pear on grey, left", "large red fish on white, right"], validation=[PROMPT])
    for split, prompts in dict(splits, heldout=["large green pear on white, left"]).items():
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(prompts) + "\n")
    return folder


def lesa(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_predictors_at_both_taps_from_runs_to_clips(model, tmp_path):
    prompts, runs = model / "prompts", tmp_path / "runs"
    assert lesa("collect", model, "--prompts", prompts / "train.txt", "--tap", "norm", "--out", runs) == 0
    train = ["train", model, "--data", runs, "--schedule", EVERY, "--rounds", 1, "--updates", 4, 4]
    train += ["--validation-prompts", prompts / "validation.txt"]
    for place in ("feature", "norm"):
        assert lesa(*train, "--tap", place, "--out", tmp_path / place) in TRAINED
    assert Predictor.from_pretrained(tmp_path / "feature").origin.tap == TAPS[KIND]
    shown = ["--predictors", tmp_path / "feature", tmp_path / "norm", "--schedules", EVERY, "--pairs", 1, "--timed", 1]
    assert lesa("bench", model, *shown, "--budgets", 4, "--out", tmp_path) == 0
    comparison = records.load(tmp_path)
    named = {result.method: result for result in comparison.results()}
    assert {"LESA", "LESA (norm tap)", "all full"} <= set(named)
    assert named["all full"].scores["motion"] == 60 and 0 < named["LESA"].scores["motion"] < 60
    assert all(one.shape == (5, 32, 48, 3) for kept in comparison.pictures.values() for one in kept)
    errors = {record.method: record.feature_error for kept in comparison.records.values() for record in kept}
    assert set(errors["all full"]) == {0.0} and max(errors["LESA"]) > 0
    with Image.open(tmp_path / "clips.gif") as clips:
        assert clips.n_frames == 5


def test_a_clip_is_written_with_its_frames(model, tmp_path):
    for name in ("clip.gif", "clip.png"):
        assert lesa("generate", model, PROMPT, "--full", "--out", tmp_path / name) == 0
        with Image.open(tmp_path / name) as clip:
            assert clip.n_frames == 5 and clip.size == (48, 32)
            assert np.asarray(clip).std() > 0
