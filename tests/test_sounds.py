"""Clips of sound: their spectra, how far one is from another, their pictures and their files."""

import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lesa.bench.scores import SOUND_SCORES
from lesa.bench.sounds import BANDS, MOST_DECIBELS, log_mel, log_mel_distance, signal_to_noise, sound_picture
from lesa.host.pipelines import pictures_of, rate_of, save_sound

RATE = 8000
TIMES = np.arange(RATE) / RATE


def tone(hertz: float, loud: float = 0.5) -> np.ndarray:
    return loud * np.sin(2 * np.pi * hertz * TIMES)


def test_a_tone_is_loudest_in_the_band_of_its_pitch():
    peaks = [int(log_mel(tone(hertz), RATE).mean(0).argmax()) for hertz in (200, 400, 800, 1600, 3200)]
    assert peaks == sorted(set(peaks)) and peaks[-1] < BANDS
    middle = log_mel(tone(1000), RATE)[20:-20]
    assert middle.max() == pytest.approx(20 * np.log10(0.5), abs=1.5)  # of full scale, less what the band's edge takes
    assert np.ptp(middle.max(axis=1)) < 0.1  # it does not change


def test_silence_is_as_quiet_as_the_floor():
    assert log_mel(np.zeros(RATE), RATE) == pytest.approx(-60)
    assert log_mel(np.zeros((2, RATE)), RATE).shape == (2, 61, BANDS)


def test_half_as_loud_is_six_decibels_away():
    loud, quiet = log_mel(tone(1000), RATE), log_mel(tone(1000, 0.25), RATE)
    assert (loud - quiet).max() == pytest.approx(20 * np.log10(2), abs=0.01)
    assert log_mel_distance(tone(1000), tone(1000), RATE) == 0
    assert log_mel_distance(tone(1000), tone(1000, 0.25), RATE) < log_mel_distance(tone(1000), tone(2000), RATE)


def test_noise_of_a_tenth_is_twenty_decibels_below():
    assert signal_to_noise(1.1 * tone(500), tone(500)) == pytest.approx(20)
    assert signal_to_noise(tone(500), tone(500)) == MOST_DECIBELS == 60
    assert signal_to_noise(tone(500), np.zeros(RATE)) < -90  # of silence everything is noise
    assert signal_to_noise(np.zeros(RATE), np.zeros(RATE)) == MOST_DECIBELS


def test_scores_of_sound_are_of_a_clip_its_reference_and_their_rate():
    found = {name: score(1.1 * tone(500), tone(500), RATE) for name, score in SOUND_SCORES.items()}
    assert found["signal-to-noise, dB"] == pytest.approx(20)
    assert found["log-mel distance, dB"] == log_mel_distance(1.1 * tone(500), tone(500), RATE) > 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"in one shape, got \(7999,\) and \(8000,\)"):
        signal_to_noise(tone(500)[1:], tone(500))
    with pytest.raises(ValueError, match="at least 256 samples at 8000 a second, got 100"):
        log_mel(tone(500)[:100], RATE)


def test_a_picture_shows_high_pitch_above_low_and_channels_above_each_other():
    low, high = (sound_picture(tone(hertz), RATE).sum(axis=(1, 2)).argmax() for hertz in (300, 3000))
    assert high < low
    picture = sound_picture(np.stack([tone(300), np.zeros(RATE)]), RATE)
    assert picture.shape == (2 * BANDS * 2, 61 * 2, 3) and picture.dtype == np.uint8
    assert picture[: 2 * BANDS].max() > 150 > picture[2 * BANDS :].max()


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_file_holds_what_was_heard(kind, tmp_path):
    stereo = np.stack([tone(300), tone(500, 1.5)]).astype(np.float32)
    save_sound(kind(stereo), RATE, path := tmp_path / "clip.wav")
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, RATE, RATE)
        read = np.frombuffer(file.readframes(RATE), "<i2").reshape(-1, 2).T / 32767
    assert np.abs(read - stereo.clip(-1, 1)).max() <= 0.5 / 32767 + 1e-7


def test_clips_are_what_a_call_drew_and_their_rate_is_the_autoencoders():
    clips = torch.zeros(2, 1, 8)
    assert [clip.shape for clip in pictures_of(SimpleNamespace(audios=clips))] == [(1, 8)] * 2
    for name in ("sampling_rate", "sample_rate"):
        assert rate_of(SimpleNamespace(vae=SimpleNamespace(config={name: 16000}))) == 16000
    assert rate_of(SimpleNamespace(vae=SimpleNamespace(config={"sample_size": 64}))) is None
    assert rate_of(SimpleNamespace()) is None
