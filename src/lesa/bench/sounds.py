"""Clips of sound as numbers: their log-mel spectra, and how far one is from another.

A clip is float samples in [-1, 1] of shape (samples,), or (channels, samples); its rate is in samples a second.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

BANDS = 40
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.016
FLOOR = 1e-6
"""The power that is added to each band, 60 dB below that of full scale: what is as quiet is silence."""


def log_mel(clip: np.ndarray, rate: int) -> np.ndarray:
    """Return the power of a clip in dB, of shape (..., frames, BANDS): Hann windows, bands that overlap by half on the
    mel scale (2595 log10(1 + f / 700)).

    Raises: ValueError if a clip is shorter than one window.
    """
    window, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    if clip.shape[-1] < window:
        raise ValueError(f"a clip has at least {window} samples at {rate} a second, got {clip.shape[-1]}.")
    cut = np.lib.stride_tricks.sliding_window_view(clip, window, axis=-1)[..., ::hop, :]
    shape = np.hanning(window + 2)[1:-1]
    spectra = np.abs(np.fft.rfft(cut * shape, axis=-1)) * (2 / shape.sum())
    return 10 * np.log10(spectra**2 @ _bands(rate, window).T + FLOOR)


@lru_cache(maxsize=4)
def _bands(rate: int, window: int) -> np.ndarray:
    """Return triangles of height 1 over the frequencies of a spectrum, of shape (BANDS, window // 2 + 1)."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    step = rate / window
    edges = np.maximum(edges, np.arange(BANDS + 2) * step)  # no band narrower than what a window resolves
    frequencies = np.arange(window // 2 + 1) * step
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.clip(np.minimum(rising, falling), 0, None)


def log_mel_distance(clip: np.ndarray, reference: np.ndarray, rate: int) -> float:
    """Return the mean distance of two clips of one shape in dB, over the frames and bands of their log-mel spectra."""
    _check(clip, reference)
    return float(np.abs(log_mel(clip, rate) - log_mel(reference, rate)).mean())


def signal_to_noise(clip: np.ndarray, reference: np.ndarray) -> float:
    """Return how much stronger a reference is than what a clip differs by, in dB; at most `MOST_DECIBELS`."""
    _check(clip, reference)
    wide, wanted = clip.astype(np.float64), reference.astype(np.float64)
    signal, noise = np.square(wanted).sum(), np.square(wide - wanted).sum()
    if noise <= signal * 10 ** (-MOST_DECIBELS / 10):
        return MOST_DECIBELS
    return float(10 * np.log10(max(signal, 1e-12) / noise))


MOST_DECIBELS = 60.0
"""What identical clips count as: the ceiling that the PSNR of pictures has."""


def _check(clip: np.ndarray, reference: np.ndarray) -> None:
    if clip.shape != reference.shape:
        raise ValueError(f"clips are compared in one shape, got {clip.shape} and {reference.shape}.")


SHADES = np.array([(0, 0, 12), (70, 15, 110), (190, 50, 90), (250, 150, 50), (255, 255, 200)], dtype=np.float64)
"""The colours of a spectrum's picture, from silence to full scale."""
PIXELS_A_CELL = 2


def sound_picture(clip: np.ndarray, rate: int) -> np.ndarray:
    """Draw the log-mel spectrum of a clip as uint8 RGB: time to the right, pitch upwards, channels above each other."""
    loud = 1 - log_mel(np.atleast_2d(clip), rate) / (10 * np.log10(FLOOR))
    cells = np.concatenate(list(loud.swapaxes(1, 2)[:, ::-1]))  # (channels * BANDS, frames)
    places = np.linspace(0, 1, len(SHADES))
    colours = np.stack([np.interp(cells, places, SHADES[:, k]) for k in range(3)], axis=-1)
    return colours.round().astype(np.uint8).repeat(PIXELS_A_CELL, 0).repeat(PIXELS_A_CELL, 1)
