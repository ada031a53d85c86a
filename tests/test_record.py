"""Any pipeline is recorded at the sampler, planned for, trained for, and runs what was planned and trained."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from zoo.oracle import watch
from zoo.pipelines import ZOO, Specimen

from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.calls import label
from lesa.learn.collect import collect, record, rerun
from lesa.learn.planning import Planner
from lesa.learn.recording import origin_of, recording
from lesa.learn.training import Config, Lesson, drift, train
from lesa.learn.trajectory import Store, Trajectory
from lesa.predictors import L2P
from lesa.rows.forecasters import Reuse
from lesa.rows.guidance import ALL
from lesa.rows.schedule import Schedule

KINDS = {
    "flux_guided": "Euler, packed",
    "flux_img2img_guided": "begins within its grid, calls without names",
    "flux_inpaint_guided": "rewrites its latents",
    "sd3_guided": "4-D latents, guidance in one batch",
    "chroma_guided": "guidance without names",
    "wan21_guided": "UniPC",
    "wan22_guided": "two denoisers",
    "wan_i2v_guided": "an image given",
    "z_image_truncated": "lists, guidance that ends",
    "stable_diffusion_ddim_guided": "DDIM, a U-Net",
    "sana_dpm_guided": "DPM++",
    "ltx2_guided": "video and sound, two samplers",
    "stable_audio_edm_guided": "sound",
    "sd3_heun_guided": "times that repeat",
    "dit_guided": "class labels, no prompt",
    "modular_flux2_klein_guided": "modular",
}
SEEDS = (3, 4, 5)


@cache
def built(name: str) -> Specimen:
    return ZOO[name]()


@pytest.fixture(params=KINDS)
def specimen(request) -> Specimen:
    return built(request.param)


def test_a_recording_is_what_passes_the_sampler(specimen):
    with specimen.around():
        [run] = record(specimen.pipe, [specimen.arguments], [3], seam=True)
    with torch.no_grad():
        seen = watch(specimen.pipe, lambda: specimen.call(3))
    expected = torch.cat([x.flatten() for x in seen.latents]).float()
    last = run.latents[-1, :, 0].float()
    kept = last != 0  # or rewritten
    torch.testing.assert_close(last[kept], expected[kept])
    assert run.streams == (ALL,) and run.whole and run.steps == seen.ticks + run.begins[0]
    assert run.sampler is not None


def test_a_pipeline_is_collected_planned_for_and_trained_for(specimen, tmp_path):
    pipe = specimen.pipe
    with specimen.around():
        store = collect(pipe, lambda _: specimen.arguments, SEEDS, tmp_path, model="tiny", seam=True)
        reference = list(Store.open(tmp_path))
        calls = [specimen.arguments]
        planner = Planner.of(pipe, reference, calls=calls)
        budget = 3 + len(reference[0].begins)
        schedule = planner.plan(Reuse(), budget)
        assert len(schedule.full_steps(planner.steps, planner.begins[0])) == budget
        predictor = L2P(origin_of(pipe, reference[0], schedule, "tiny"), memory=2, slope=False)
        lesson = Lesson(reference[:2], reference[2:])
        config = Config(updates=(30, 30), rounds=1, batch=2)
        result = train(predictor, [lesson], lambda x, _: x, recording(pipe, calls), config)
        assert min(result.scores) < planner.real(Reuse(), schedule) + 3
        with accelerate(pipe, result.predictor) as run:
            [mine] = rerun(pipe, reference[2:], calls=calls)
        assert drift([mine], reference[2:]) == pytest.approx(min(result.scores), abs=1e-3)
        done = run.summary()
    assert sum(each.skipped_steps for each in done.values()) > 0
    assert len(store) == 3


def test_a_clipping_sampler_is_recorded_and_accelerated_but_not_planned_for():
    subject = built("unconditional_ddim_clipped")
    [run] = record(subject.pipe, [subject.arguments], [3])
    assert run.sampler is None
    with pytest.raises(ValueError, match=r"this one has none: .* clips its data prediction \(clip_sample=True\)"):
        Planner.of(subject.pipe, [run], calls=[subject.arguments])
    with accelerate(subject.pipe, Reuse(), schedule=Schedule.every(2)) as accelerated:
        [skipped] = rerun(subject.pipe, [run], calls=[subject.arguments])
    assert accelerated.summary()["cond"].skipped_steps == 3 and len(skipped.full) == 3


def test_rewritten_latents_are_told_and_left_out():
    subject = built("flux_inpaint_guided")
    with pytest.warns(UserWarning, match="50% are rewritten in between steps"):
        [run] = record(subject.pipe, [subject.arguments], [3], seam=True)
    changed = (run.latents != 0).any(0)
    assert float(changed.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(changed, (run.outputs[ALL] != 0).any(0))


def test_a_step_that_is_tried_first_is_one_step():
    """Cosmos steps once to see the data, sets its scheduler back, and steps."""
    subject = built("cosmos_text2world_guided")
    [run] = record(subject.pipe, [subject.arguments], [3])
    assert run.sampler is not None and run.latents[0].numel() == subject.call(3)[0].numel()


def test_a_recording_leaves_an_acceleration_listening_to_copies_of_its_scheduler():
    subject = built("skyreels_forcing_guided")
    with accelerate(subject.pipe, Reuse(), schedule=Schedule.every(3)) as run:
        record(subject.pipe, [subject.arguments], [3])
        before = run.summary()["cond"].skipped_steps
        subject.call(3)
    assert before == 4 and run.summary()["cond"].skipped_steps == 8


def test_prompts_are_recorded_in_one_batch_as_one_by_one(tiny_flux):
    call = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
    together = record(tiny_flux, ["pear", "fish"], [5, 6], seam=True, **call)
    alone = [record(tiny_flux, [text], [seed], seam=True, **call)[0] for text, seed in (("pear", 5), ("fish", 6))]
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.prompt, ours.seed) == (theirs.prompt, theirs.seed)
        torch.testing.assert_close(ours.latents, theirs.latents)
        torch.testing.assert_close(ours.outputs[ALL], theirs.outputs[ALL])


def test_a_recording_says_the_same_as_one_per_stream(tiny_flux):
    call = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
    guided = dict(negative_prompt="fish", true_cfg_scale=3.0)
    [run] = record(tiny_flux, ["pear"], [5], seam=True, **call, **guided)
    [tokens] = record(tiny_flux, ["pear"], [5], torch.arange(16), **call, **guided)
    torch.testing.assert_close(run.latents.reshape(5, 16, 16), tokens.latents)
    velocity = tokens.outputs["uncond"] + 3.0 * (tokens.outputs["cond"] - tokens.outputs["uncond"])
    torch.testing.assert_close(run.outputs[ALL].reshape(4, 16, 16), velocity)
    assert tokens.sampler is not None and torch.equal(run.sampler.response, tokens.sampler.response)


def test_a_stored_call_is_given_again_or_kept_whole(tmp_path):
    subject = built("flux_guided")
    plain = {name: value for name, value in subject.arguments.items() if not isinstance(value, torch.Tensor)}
    [run] = record(subject.pipe, [subject.arguments], [3], seam=True)
    run.save(tmp_path / "one")
    stored = Trajectory.load(tmp_path / "one")
    assert torch.equal(stored.features[ALL], run.features[ALL]) and torch.equal(
        stored.sampler.outputs, run.sampler.outputs
    )
    with pytest.raises(ValueError, match=r"kept by their digest alone, got call .* give such calls"):
        rerun(subject.pipe, [stored])
    [again] = rerun(subject.pipe, [stored], calls=[subject.arguments])
    assert torch.equal(again.latents, run.latents) and again.prompt == run.prompt
    other = {**subject.arguments, "true_cfg_scale": 2.0}
    assert label(other) != run.prompt and label(plain) == label(dict(reversed(plain.items())))
    replace(run, call=plain).save(tmp_path / "two")
    assert Trajectory.load(tmp_path / "two").call == plain


def test_a_collection_of_other_calls_is_refused(tmp_path):
    subject = built("dit_guided")
    collect(subject.pipe, [subject.arguments], [3], tmp_path, model="tiny")
    before = Store.open(tmp_path).digest()
    with pytest.raises(ValueError, match="other prompts"):
        collect(subject.pipe, [{**subject.arguments, "class_labels": [2]}], [3], tmp_path, model="tiny")
    collect(subject.pipe, lambda number: [subject.arguments][number], [3], tmp_path, model="tiny")
    assert Store.open(tmp_path).digest() == before and Store.open(tmp_path).collection.seam


def test_what_cannot_be_recorded_is_refused(tiny_flux):
    call = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
    with pytest.raises(ValueError, match="at a feature tap prompts are recorded"):
        record(tiny_flux, ["pear"], [5], tap=tap_of(tiny_flux.transformer), seam=True, **call)
    with pytest.raises(ValueError, match="recorded per stream for prompts"):
        record(tiny_flux, [dict(prompt="pear")], [5], seam=False, **call)
    with (
        accelerate(tiny_flux, Reuse(), schedule=Schedule.every(2), tap="feature"),
        pytest.raises(ValueError, match="recorded at the sampler are accelerated at the output"),
    ):
        record(tiny_flux, [dict(prompt="pear")], [5], **call)

    def interrupt(pipe, step, _time, tensors):
        pipe._interrupt = step == 1
        return tensors

    with pytest.raises(ValueError, match="walks its whole grid of 4 steps; this one stopped after 2"):
        record(tiny_flux, ["pear"], [5], seam=True, callback_on_step_end=interrupt, **call)
    chrono = built("chrono_edit_guided")
    with pytest.raises(ValueError, match="keep their size"):
        record(chrono.pipe, [chrono.arguments], [3])
