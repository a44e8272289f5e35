"""A voice detector explained over a recording: relevance lies on speech, also when loud noise fills a pause."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from examples.silero import speech
from tests.support import worst

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ONNX_LRP_SHARED", ROOT.parent / "shared"))
MODEL, RECORDING = SHARED / "models/silero_vad_16k_static_lstm.onnx", SHARED / "images/speech_6s_16k.wav"
pytestmark = pytest.mark.skipif(
    not (MODEL.exists() and RECORDING.exists()), reason="the detector and the recording do not lie beside the checkout"
)
BOOKS = ("epsilon", "captioning", "epsilon_plus")


@cache
def heard(book: str, noisy: bool) -> speech.Heard:
    samples = speech.read(RECORDING)
    return speech.listen(MODEL, speech.with_noise(samples, speech.loud(samples))[0] if noisy else samples, book)


@cache
def places() -> tuple[np.ndarray, np.ndarray]:
    """Where there is speech, by loudness alone, and the longest pause."""
    samples = speech.read(RECORDING)
    where = speech.loud(samples)
    return where, speech.with_noise(samples, where)[1]


def test_speech_is_found_without_the_model() -> None:
    """A third of the recording, in frames that the detector calls speech; the pause is two to three seconds."""
    where, pause = places()
    said = np.repeat(heard("epsilon", False).probability > 0.5, speech.STEP)
    assert 0.25 < where.mean() < 0.4
    assert said[where].mean() > 0.97
    assert 2 < pause.sum() / speech.RATE < 3
    assert not (where & pause).any()


def test_the_detector_says_what_it_should() -> None:
    """As many frames of speech as are known of it; noise in the pause is not taken for speech."""
    assert (heard("epsilon", False).probability > 0.5).sum() == 104
    said = np.repeat(heard("epsilon", True).probability > 0.5, speech.STEP)
    assert said[places()[1]].mean() < 0.1


@pytest.mark.parametrize("noisy", [False, True], ids=["as recorded", "noise in the pause"])
@pytest.mark.parametrize("book", BOOKS)
def test_relevance_lies_on_speech(book: str, noisy: bool) -> None:
    """Its mass inside of speech is at least twice the share of time, of all relevance and of the positive one."""
    where, pause = places()
    found = heard(book, noisy)
    for relevance in (found.own, found.carried):
        assert speech.concentration(np.abs(relevance), where) >= 2
        assert speech.concentration(np.maximum(relevance, 0), where) >= 2
    # Loudness does as well where there is no noise, and no longer where there is.
    assert speech.concentration(np.abs(found.carried), pause) < 0.5


def test_loudness_alone_does_not_tell_speech_from_noise() -> None:
    samples = speech.read(RECORDING)
    where, pause = places()
    noisy = np.abs(speech.with_noise(samples, where)[0].astype(np.float64))
    assert speech.concentration(noisy, where) < 1.5
    assert speech.concentration(noisy, pause) > 1


def test_states_carry_relevance_from_frame_to_frame() -> None:
    """What the state of a frame gets is handed on, none of it twice: the last frame has nothing but its own."""
    found = heard("epsilon", False)
    last = slice(-speech.STEP + speech.BEFORE, None)
    np.testing.assert_array_equal(found.carried[last], found.own[last])
    assert worst(found.carried, found.own) > 0.1
    assert found.explained > 0


def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/silero/speech.py"), MODEL, RECORDING, "-o", tmp_path / "speech.png"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "epsilon, with noise in the pause" in done.stdout
    assert (tmp_path / "speech.png").stat().st_size > 10_000
