"""Any pipeline is recorded at the sampler, planned for, trained for, and runs what was planned and trained."""

from functools import cache

import pytest
import torch
from zoo.oracle import watch
from zoo.pipelines import ZOO, Specimen

from lesa.host.runtime import accelerate
from lesa.learn.collect import collect, record, rerun
from lesa.learn.planning import Planner
from lesa.learn.rounds import origin_of, recording
from lesa.learn.training import Config, Lesson, drift, train
from lesa.learn.trajectory import Store
from lesa.predictors.predictor import L2P
from lesa.rows.forecasters import Reuse
from lesa.rows.guidance import ALL

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


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Rewritten latents are warned of."""


def test_a_recording_is_what_passes_the_sampler(specimen):
    with specimen.around():
        [run] = record(specimen.pipe, [specimen.arguments], [3], torch.arange(8), seam=True)
    with torch.no_grad():
        seen = watch(specimen.pipe, lambda: specimen.call(3))
    first, last = seen.latents[0].flatten()[:8].float(), run.latents[-1, :, 0].float()
    kept = last != 0
    torch.testing.assert_close(last[kept], first[kept])
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
