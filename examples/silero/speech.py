"""Which part of a recording made a voice detector say speech: Silero VAD, explained over all of its frames.

    python examples/silero/speech.py silero_vad.onnx recording.wav -o speech.png

The detector reads 512 samples at a time (and the 64 before them), and remembers what came before in the state of an
LSTM. What is explained is the sum of its logits over all frames in which it says speech. A frame's relevance goes to
its own samples and to the state it began with. The state's goes on: the frame before has made that state, and is
explained with this relevance to begin with. So the explained model, run from the last frame to the first, does what one
graph of all frames would do, for recordings of any length.
"""

from __future__ import annotations

import argparse
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import onnx_lrp
from onnx_lrp import show
from onnx_lrp.runtime import Session

Samples = NDArray[np.float64]
Mask = NDArray[np.bool_]

RATE, STEP, BEFORE = 16000, 512, 64
METHODS = ("epsilon", "captioning", "epsilon_plus", "zplus")


@dataclass(frozen=True)
class Heard:
    """What the detector made of a recording, and why.

    Attributes:
        probability: of speech, per frame.
        own: relevance of every sample for the frame that reads it as new or as one of the 64 before.
        carried: the same, with what reached it through the states of later frames.
        explained: sum of the explained logits.
    """

    probability: Samples
    own: Samples
    carried: Samples
    explained: float


def read(path: str | Path) -> NDArray[np.float32]:
    """Samples from -1 to 1 of a recording in 16 bits, one channel, 16 kHz; whole frames of 512."""
    with wave.open(str(path)) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (RATE, 1, 2):
            raise SystemExit(f"{path}: wants 16 kHz, one channel, 16 bits, got {form[0]} Hz, {form[1]}, {8 * form[2]}")
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples[: len(samples) // STEP * STEP].astype(np.float32) / 32768


def listen(model: str | Path, samples: NDArray[np.float32], method: str = "epsilon") -> Heard:
    """Run the detector over a recording, and explain it by a rule book.

    (By a rule book: what gradients leave at a state is no relevance to begin with at the frame before.)
    """
    shapes = {"input": (None, STEP + BEFORE)}  # the ranks of tensors inside depend on it
    first = onnx_lrp.rewrite(model, method, shapes=shapes)
    # The same model, where relevance begins at the state that it hands to the next frame.
    back = onnx_lrp.rewrite(model, method, shapes=shapes, output="stateN", start="input")
    scorer, carrier = (Session(explained.model, device="cpu") for explained in (first, back))
    padded = np.concatenate([np.zeros(BEFORE, np.float32), samples])
    starts = range(0, len(samples), STEP)
    state, runs, begun = np.zeros((2, 1, 128), np.float32), [], []
    for start in starts:
        begun.append({"input": padded[None, start : start + STEP + BEFORE], "state": state})
        if "sr" in scorer.inputs:
            begun[-1]["sr"] = np.array(RATE)
        runs.append(scorer.run(begun[-1]))
        state = runs[-1]["stateN"]
    own, carried, later, explained_score = np.zeros(len(padded)), np.zeros(len(padded)), 0 * state, 0.0
    for start, feeds, run in zip(reversed(starts), reversed(begun), reversed(runs), strict=True):
        score = float(run["score"].sum())
        says = float(score > 0)
        passed = carrier.run({**feeds, "start": later})
        here = slice(start, start + STEP + BEFORE)
        own[here] += says * run["relevance/input"][0]
        carried[here] += says * run["relevance/input"][0] + passed["relevance/input"][0]
        later = says * run["relevance/state"] + passed["relevance/state"]
        explained_score += says * score
    probability = np.array([run["output"].sum() for run in runs], np.float64)
    return Heard(probability, own[BEFORE:], carried[BEFORE:], explained_score)


def loud(samples: NDArray[np.float32], decibels: float = 20.0, window: int = RATE // 100) -> Mask:
    """Where a recording without noise holds speech: windows of 10 ms not 20 dB softer than the loudest."""
    whole = samples[: len(samples) // window * window].reshape(-1, window)
    energy = (whole.astype(np.float64) ** 2).mean(1)
    speech = np.repeat(energy > energy.max() * 10 ** (-decibels / 10), window)
    return np.concatenate([speech, np.zeros(len(samples) - len(speech), bool)])


def concentration(weight: Samples, where: Mask) -> float:
    """Share of a weight inside of a place, over that place's share of time; the most there can be is 1 / the latter."""
    return float(weight[where].sum() / weight.sum() / where.mean())


def with_noise(
    samples: NDArray[np.float32], speech: Mask, start: int = 14000, end: int = 52000
) -> tuple[Samples, Mask]:
    """The recording with white noise as loud as its speech in a pause, and where."""
    borders = np.concatenate([[-1], np.flatnonzero(speech), [len(samples)]])
    longest = int(np.diff(borders).argmax())
    where = np.zeros(len(samples), bool)
    where[borders[longest] + RATE // 5 : borders[longest + 1] - RATE // 5] = True
    rng = np.random.default_rng(0)
    level = np.sqrt((samples[speech].astype(np.float64) ** 2).mean())
    noise = (rng.standard_normal(len(samples)) * level).astype(np.float32)
    return np.where(where, samples + noise, samples), where


def smooth(relevance: Samples, window: int = RATE // 50) -> Samples:
    """Means over 20 ms: a waveform swings too fast for its single samples to be seen."""
    return np.concatenate(
        [np.full(len(part), part.mean()) for part in np.split(relevance, range(window, len(relevance), window))]
    )


def main() -> None:
    """Print how much relevance lies on speech, and draw it over the waveform, with a noise in the pause and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="silero_vad, for 16 kHz")
    parser.add_argument("recording", type=Path, help="16 kHz, one channel, 16 bits")
    parser.add_argument(
        "-m", "--method", default=METHODS[0], help="method or rule book of the picture (default epsilon)"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("speech.png"), help="the picture")
    parser.add_argument("--table", action="store_true", help="print the numbers of several rule books")
    options = parser.parse_args()
    samples = read(options.recording)
    speech = loud(samples)
    noisy, noise = with_noise(samples, speech)
    recordings = (("as recorded", samples), ("with noise in the pause", noisy))
    print(f"speech is {speech.mean():.1%} of the time, so that no concentration exceeds {1 / speech.mean():.2f}")
    print("concentration in speech of |R| own, |R| carried, R+ own, R+ carried; in the pause of |R| carried")
    figures = []
    for method in METHODS if options.table else (options.method,):
        for name, wave_form in recordings:
            heard = listen(options.model, wave_form, method)
            on_speech = [concentration(f(r), speech) for f in (np.abs, _positive) for r in (heard.own, heard.carried)]
            row = [*on_speech, concentration(np.abs(heard.carried), noise)]
            print(f"{method}, {name}:", *(f"{value:.2f}" for value in row))
            if method == options.method:
                heading = f"Relevance for speech by {method}, {name}"
                heat = smooth(heard.carried)
                figures.append(show.series(wave_form, heat, heading, axis_label="sample, 16,000 a second"))
    for name, wave_form in recordings:
        row = [concentration(np.abs(wave_form.astype(float)), where) for where in (speech, noise)]
        print(f"loudness |x| itself, {name}: {row[0]:.2f}, in the pause {row[1]:.2f}")
    print(show.save(show.stack(figures), options.out))


def _positive(relevance: Samples) -> Samples:
    return np.maximum(relevance, 0)


if __name__ == "__main__":
    main()
