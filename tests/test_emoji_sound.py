"""The embedded model `emoji-sound`: its clips and captions, what it says, and a comparison of sound."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from spoken_emoji import RATE, SAMPLES, VOICES, Tape, Voice, caption, compress, expand, parse

import lesa
from lesa.bench.compare import CompareOptions
from lesa.bench.methods import fewer_steps, forecast
from lesa.bench.records import sound_path
from lesa.cli import main
from lesa.host.pipelines import rate_of

MODEL = Path(__file__).parent.parent / "models" / "emoji-sound"
HELD_OUT, TRAINED = ((MODEL / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("heldout", "train"))
CALL = dict(num_inference_steps=8)


@pytest.fixture(scope="module")
def tape() -> Tape:
    return Tape(MODEL)


@pytest.fixture(scope="module")
def pipe():
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def say(pipe, prompts: list[str], **call) -> np.ndarray:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return pipe(prompts, generator=seeds, output_type="np", **call).audios


# --- clips and captions


def test_captions_are_read_back(tape):
    assert caption("red apple", Voice("low", "slow", "male")) == "low slow male voice: red apple"
    for name in tape.names:
        for voice in VOICES:
            assert parse(caption(name, voice)) == (name, voice)


@pytest.mark.parametrize(
    "prompt", ["", "red apple", "low male voice: red apple", "low slow male voice: ", "voice: sushi"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt must read like"):
        parse(prompt)


def test_the_prompts_are_all_clips_in_three_parts(tape):
    validation = (MODEL / "prompts" / "validation.txt").read_text().splitlines()
    assert sorted([*TRAINED, *validation, *HELD_OUT]) == sorted(caption(n, v) for n in tape.names for v in VOICES)
    names, voices = (set(part) for part in zip(*map(parse, TRAINED), strict=True))
    assert names == set(tape.names) and voices == set(VOICES)  # what is held out are combinations


def test_stored_samples_are_near_what_was_heard():
    heard = np.linspace(-1, 1, 1001)
    assert np.abs(expand(compress(heard)) - heard).max() < 0.025
    assert expand(compress(np.zeros(1))) == 0
    assert np.array_equal(compress(expand(np.arange(255, dtype=np.uint8))), np.arange(255))


def test_voices_differ_in_pitch_and_speed(tape):
    def seconds(voice: Voice) -> float:
        return np.flatnonzero(np.abs(tape.say("red apple", voice)) > 0.01)[-1] / RATE

    def hertz(voice: Voice) -> float:
        spectrum = np.abs(np.fft.rfft(tape.say("airplane", voice), 2 * SAMPLES))
        similar = np.fft.irfft(spectrum**2)[RATE // 400 : RATE // 60]  # periods of 60 to 400 hertz
        return RATE / (RATE // 400 + int(similar.argmax()))

    assert seconds(Voice("low", "quick", "male")) < 0.8 * seconds(Voice("low", "slow", "male"))
    low, high = (hertz(Voice(pitch, "slow", "female")) for pitch in ("low", "high"))
    assert 1.3 * low < high


def test_a_clip_is_recognised_in_its_voice(tape):
    first, second = (tape.say(name, VOICES[0])[None] for name in ("red apple", "sushi"))
    assert tape.clips.shape == (len(tape.names), len(VOICES), SAMPLES)
    told = tape.is_prompted([caption("red apple", VOICES[0])] * 3, [first, 0.7 * first + 0.3 * second, second])
    assert told == [True, True, False]


# --- the pipeline


def test_it_is_small_and_of_stable_audios_own_classes(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 25e6
    kinds = json.loads((MODEL / "model_index.json").read_text())
    assert kinds["_class_name"] == "StableAudioPipeline" and kinds["vae"][1] == "AutoencoderOobleck"
    assert kinds["transformer"][1] == "StableAudioDiTModel"
    assert kinds["scheduler"][1] == "CosineDPMSolverMultistepScheduler"
    assert rate_of(pipe) == RATE


def test_it_says_held_out_names(pipe, tape):
    said = say(pipe, HELD_OUT[:8], num_inference_steps=12)
    assert sum(tape.is_prompted(HELD_OUT[:8], list(said))) >= 6


def test_every_step_full_changes_no_bit_though_the_sampler_adds_noise(pipe):
    plain = say(pipe, HELD_OUT[:2], **CALL)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(1)):
        assert np.array_equal(say(pipe, HELD_OUT[:2], **CALL), plain)
    assert plain.shape == (2, 1, SAMPLES)
    assert not np.array_equal(say(pipe, HELD_OUT[:2], **CALL, guidance_scale=1.5), plain)


def test_its_data_prediction_is_forecast(pipe):
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(2), of="data") as run:
        say(pipe, HELD_OUT[:1], **CALL)
    assert run.summary()["cond"].full_steps == 4 and "the data prediction" in str(run.summary())


def test_a_comparison_of_sound_has_its_scores_pictures_of_spectra_and_files(pipe, tmp_path):
    options = CompareOptions(
        [forecast("reuse", lesa.Reuse(), lesa.Schedule.every(2)), fewer_steps(4)], batch_size=2, timed=0
    )
    pipe = lesa.host.pipelines.with_call(pipe, CALL)
    found = lesa.compare(pipe, HELD_OUT[:2], tmp_path, options)
    full, *others = found.results()
    assert full.scores["signal-to-noise, dB"] == 60 and full.scores["log-mel distance, dB"] == 0
    for result in others:
        assert result.scores["signal-to-noise, dB"] < 60 and result.scores["log-mel distance, dB"] > 0
        assert result.full_steps == 4 and 0 <= result.prompted <= 1 and result.float_psnr is None
    assert found.pictures["reuse", "every:2"][0].shape == (160 // 2, 2 * 63, 3)
    with wave.open(str(sound_path(tmp_path, ("reuse", "every:2"), 1))) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, SAMPLES)


def test_the_command_writes_a_wav_and_no_picture(tmp_path, capsys):
    asked = ["generate", str(MODEL), HELD_OUT[0], "--full", "--steps", "4", "--out"]
    assert main([*asked, str(tmp_path / "said.wav")]) == 0
    with wave.open(str(tmp_path / "said.wav")) as file:
        assert file.getnframes() == SAMPLES
    assert main([*asked, str(tmp_path / "said.png")]) == 2
    assert "makes sound: --out names a .wav" in capsys.readouterr().err
