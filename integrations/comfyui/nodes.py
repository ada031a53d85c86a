"""The nodes: LESA Accelerate, LESA Calibrate, LESA Report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.host.outside import FULL, REFUSE, Asked
from lesa.learn.calibrate import APART
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.metrics import psnr
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration
from lesa.predictors.curve import Point
from lesa.predictors.shelf import fetch
from lesa.rows.default import Default

from . import calibrating, sampling

CATEGORY = "sampling/lesa"
CALIBRATED, UNTRAINED, FOLDER = "calibrated, else without training", "without training", "from a folder"
OTHERWISE = {"stop with the reason": REFUSE, "run every step in full": FULL}
log = logging.getLogger("lesa")


class Accelerate:
    """Run a model on a few full steps of each sampling, and forecast the others."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Runs the model on a few full steps and forecasts what it would have said on the others."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "accelerate"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": ("MODEL",),
                "predictor": (
                    [CALIBRATED, UNTRAINED, FOLDER],
                    {"tooltip": "What LESA Calibrate made for this model, a default, or a folder's predictor."},
                ),
                "budget": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2000, "tooltip": "Full steps; 0: the predictor's own number."},
                ),
                "quality": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "psnr:40, ssim:0.97, lpips:0.1 or drift:-45 in place of a budget, if calibrated.",
                    },
                ),
                "otherwise": (list(OTHERWISE), {"tooltip": "What becomes of a sampling that no predictor fits."}),
            },
            "optional": {
                "folder": ("STRING", {"default": "", "tooltip": "Of a predictor, or of a calibration."}),
            },
        }

    def accelerate(
        self, model: Any, predictor: str, budget: int, quality: str, otherwise: str, folder: str = ""
    ) -> tuple[Any]:
        """Return a clone of the model that is accelerated; the model stays as it is."""
        if budget and quality.strip():
            raise ValueError("a budget says how many steps are full, and a quality chooses them; give one of them.")
        if folder.strip() and predictor != FOLDER:
            raise ValueError(
                f"a folder goes with the predictor {FOLDER!r}, got {predictor!r}; choose that, or leave it empty."
            )
        asked = Asked(
            forecaster=Default() if predictor == UNTRAINED else None,
            predictor=read(folder.strip()) if predictor == FOLDER else None,
            budget=budget or None,
            quality=quality.strip() or None,
            fallback=OTHERWISE[otherwise],
        )
        return (sampling.accelerated(model, asked),)


def read(folder: str) -> Predictor | Calibration:
    """Read what is in a folder: a predictor, or a calibration.

    Raises: FileNotFoundError if there is none; ValueError if it cannot be read.
    """
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError(f"the folder of a predictor is needed, got {folder!r}, which is none; name one.")
    return fetch(folder) or Predictor.from_pretrained(folder)


class Calibrate:
    """Find full steps and rows for a model as it is sampled here, check them, and keep them on lesa's shelf."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Finds which steps have to be full, and how to forecast the others, from a few runs of your own."
    RETURN_TYPES = ("MODEL", "IMAGE", "STRING")
    RETURN_NAMES = ("model", "full and accelerated", "report")
    FUNCTION = "calibrate"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        prompts = {f"positive_{k}": ("CONDITIONING",) for k in range(2, 9)}
        return {
            "required": {
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "cfg": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "sampler": ("SAMPLER",),
                "sigmas": ("SIGMAS",),
                "latent_image": ("LATENT",),
                "budgets": ("STRING", {"default": "", "tooltip": "Full steps, such as 8, 6, 5; empty: a sixth."}),
                "runs": ("INT", {"default": 12, "min": 2, "max": 64, "tooltip": "A third of them is checked on."}),
                "seeds": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "Another number takes other seeds."}),
                "search": ("INT", {"default": 16, "min": 1, "max": 200, "tooltip": "Schedules tried for a budget."}),
                "at_once": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Runs that go through the model together."},
                ),
            },
            "optional": {"vae": ("VAE",), **prompts},
        }

    def calibrate(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        cfg: float,
        sampler: Any,
        sigmas: Tensor,
        latent_image: dict,
        budgets: str,
        runs: int,
        seeds: int,
        search: int,
        at_once: int,
        vae: Any = None,
        **others: Any,
    ) -> dict:
        """Calibrate; returns the accelerated model, pictures in full and accelerated, and what was found."""
        if sampling.of(model) is not None:
            raise ValueError(
                "a model is calibrated as it is, got one that is accelerated; connect it before that node."
            )
        prompts = [positive, *(others[name] for name in sorted(others))]
        lines: list[str] = []
        made = calibrating.Calibrating(
            sampler,
            len(prompts),
            runs,
            numbers_in(budgets),
            vae,
            at_once,
            seeds=seeds,
            search=search,
            what=calibrating.digest_of([prompts, negative, cfg, latent_image["samples"]]),
            on_point=lambda point, _pictures: lines.append(say(point)),
        )
        run = Run(model, prompts, negative, cfg, latent_image["samples"])
        run(made, sigmas, seed=0)
        chosen = sampling.accelerated(model, Asked(budget=made.predictor and len(made.predictor.full)))
        one = replace(run, prompts=[prompts[made.checked_prompt]])
        pictures, found = self._shown(one, chosen, sampler, sigmas, VALIDATION_SEED + seeds * APART, vae)
        text = "\n".join([*lines, found])
        return {"ui": {"text": [text]}, "result": (chosen, pictures, text)}

    def _shown(self, run: Run, chosen: Any, sampler: Any, sigmas: Tensor, seed: int, vae: Any) -> tuple[Tensor, str]:
        """Sample a run that was checked in full and accelerated, as any other node would."""
        full, fast = run(sampler, sigmas, seed), replace(run, model=chosen)(sampler, sigmas, seed)
        drift = 10 * float(((fast - full).norm() / full.norm()).square().clamp_min(1e-12).log10())
        if vae is None:
            return torch.zeros(1, 8, 8, 3), f"seed {seed}: drift {drift:.2f} dB"
        drawn = [vae.decode(one) for one in (full, fast)]
        drawn = [one.reshape(-1, *one.shape[-3:]).cpu().float() for one in drawn]
        arrays = [(one.clamp(0, 1) * 255).round().byte().numpy() for one in drawn]
        return torch.cat(drawn, dim=2), f"seed {seed}: drift {drift:.2f} dB, PSNR {psnr(*arrays):.2f} dB"


@dataclass(frozen=True)
class Run:
    """Samples a model on some prompts, as its nodes do, with any sampler."""

    model: Any
    prompts: Sequence[Any]
    negative: Any
    cfg: float
    latent: Tensor

    def __call__(self, sampler: Any, sigmas: Tensor, seed: int) -> Tensor:
        import comfy.sample
        import comfy.samplers

        guider = comfy.samplers.CFGGuider(self.model)
        named = {calibrating.positive(k): prompt for k, prompt in enumerate(self.prompts)}
        guider.inner_set_conds({**named, "negative": self.negative})
        guider.set_cfg(self.cfg)
        latent = comfy.sample.fix_empty_latent_channels(self.model, self.latent)[:1]
        noise = comfy.sample.prepare_noise(latent, seed)
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed)


def numbers_in(text: str) -> tuple[int, ...]:
    """Read full steps, such as '8, 6, 5'.

    Raises: ValueError if these are none.
    """
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"budgets are numbers of full steps, such as 8, 6, 5, got {text!r}; write them so.") from None


def say(point: Point) -> str:
    """Say what was found for a number of full steps."""
    return f"{point.full_steps} full steps, {point.kept.rows} on {point.kept.schedule}: {point.promise}"


class Report:
    """Say what the newest sampling of an accelerated model did."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Full and skipped steps, speedup and what was promised, of the newest sampling before this node."
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        after = {"tooltip": "What the sampler gave: this node waits for it, and passes it on."}
        return {"required": {"model": ("MODEL",), "latent": ("LATENT", after)}}

    def report(self, model: Any, latent: dict) -> dict:
        """Return the latent as it is, and the text."""
        text = report_of(model)
        log.info(text)
        return {"ui": {"text": [text]}, "result": (latent, text)}


def report_of(model: Any) -> str:
    """Return what the newest sampling of an accelerated model did.

    Raises: ValueError if the model is not accelerated.
    """
    how = sampling.of(model)
    if how is None:
        raise ValueError("a report is of an accelerated model, got one that is not; connect LESA Accelerate's model.")
    newest = how.newest
    if newest is None:
        return "no sampling yet: connect the latent that the sampler gives."
    summary = newest.summary()
    full = max((one.full_steps for one in summary.values()), default=0)
    lines = [
        f"{newest.steps} evaluations by {newest.sampler}: {full} full, {newest.steps - full} skipped, step ratio "
        f"{newest.steps / max(full, 1):.2f}, speedup {newest.speedup:.2f}x in {newest.seconds:.2f} s",
        str(summary),
    ]
    if how.samplings > 1:
        lines.append(f"sampling {how.samplings} of this model")
    return "\n".join(lines)


NODE_CLASS_MAPPINGS = {"LESAAccelerate": Accelerate, "LESACalibrate": Calibrate, "LESAReport": Report}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LESAAccelerate": "LESA Accelerate",
    "LESACalibrate": "LESA Calibrate",
    "LESAReport": "LESA Report",
}
