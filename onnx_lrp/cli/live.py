"""The command ``live``: a camera, a video or a folder of frames in, each frame explained as it comes."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

from onnx_lrp.cli.batches import bounds
from onnx_lrp.cli.console import say
from onnx_lrp.cli.options import (
    Commands,
    add_maps,
    add_pixels,
    add_rewriting,
    add_running,
    class_names,
    class_number,
    command,
    count,
    preprocessing,
    rewriting,
)
from onnx_lrp.cli.screen import Screen
from onnx_lrp.errors import InputError
from onnx_lrp.explainer import Explainer
from onnx_lrp.frames import open_frames, open_sink
from onnx_lrp.live import Live, View
from onnx_lrp.show import CHANNELS, COLORMAPS

_EVERY = 2.0  # seconds between two lines, where there is no terminal to write over one
_PORT = 8000


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the command."""
    parser = command(commands, "live", run, "explain frame after frame: a camera, a video, or a folder of frames")
    add_rewriting(parser, choose_inputs=False, layers=False)
    about = "a camera by its number, such as 0; a video; the address of a stream; or a folder of frames"
    parser.add_argument("source", metavar="SOURCE", help=about)
    parser.add_argument("-t", "--target", metavar="CLASS", help="class to explain; default: what each frame shows")
    parser.add_argument("-o", "--out", metavar="OUT", help="write what is seen: an .mp4, an .avi, or a folder/")
    parser.add_argument("--frames", type=count, metavar="N", help="stop after so many; default: when there are no more")
    about = f"show it in a browser on this machine, at this port; default {_PORT}"
    parser.add_argument("--serve", type=int, nargs="?", const=_PORT, metavar="PORT", help=about)
    parser.add_argument("--labels", metavar="FILE", help="class names: one per line, or JSON; default: the model's")
    add_maps(parser, colormap="hot")
    add_running(parser)
    add_pixels(parser)
    return [parser]


def run(args: argparse.Namespace) -> int:
    """Explain frames until there are no more, enough of them, or an interruption."""
    if args.colormap not in (names := (*COLORMAPS, *CHANNELS)):
        raise InputError(f"--colormap {args.colormap} is unknown; give one of {', '.join(names)}")
    with contextlib.closing(open_frames(args.source)) as frames:
        live, reading = _live(args)
        line = _Line(quiet=args.quiet)
        with (
            open_sink(args.out, frames.rate, [Path(args.source), Path(args.model)]) as sink,
            Screen(args.serve) if args.serve is not None else contextlib.nullcontext() as screen,
            line,
            _between_frames() as interrupted,
        ):
            if not args.quiet:
                say(reading, *([f"seen at {screen.address}; Ctrl-C ends it"] if screen else []))
            for frame in islice(frames, args.frames):
                view = live(frame)
                sink.add(view.image)
                if screen:
                    screen.show(view.image)
                line.show(view)
                if interrupted:
                    break
    if interrupted:
        raise KeyboardInterrupt(", ".join([line.summary(), *([f"{args.out} is complete"] if args.out else [])]))
    if not args.quiet:
        say(line.summary(), *([f"written {args.out}"] if args.out else []))
    return 0


@contextlib.contextmanager
def _between_frames() -> Iterator[list[bool]]:
    """Let an interruption wait until a frame is done; the list is not empty then. A second one does not wait."""
    came: list[bool] = []

    def note(*_: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield came  # signals are for the main thread
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _live(args: argparse.Namespace) -> tuple[Live, str]:
    """What explains the frames, and a line about it."""
    explainer = Explainer(
        args.model, args.method, device=args.device, threads=args.threads, batch_size=1, **rewriting(args)
    )
    explained = explainer.explained
    pre, origin = preprocessing(args, explained.source)
    names = class_names(args.labels, explained.source, explained.classes[-1])
    target = None if args.target is None else class_number(args.target, names)
    labels = names and [name.split(",")[0] for name in names]
    extra = bounds(args, pre, explainer)
    live = Live(explainer, pre, labels=labels, target=target, colormap=args.colormap, extra=extra)
    providers = ", ".join(explainer.providers)
    return live, f"{args.model} by {explained.method} on {providers}; frames as {pre} ({origin})"


class _Line:
    """The class and the frames per second of now: written over on a terminal, else a line every few seconds.

    Attributes:
        done: how many frames there have been.
    """

    def __init__(self, *, quiet: bool):
        self.done = 0
        self._quiet, self._over = quiet, sys.stderr.isatty()
        self._begun = self._said = self._seconds = 0.0
        self._width = 0

    def __enter__(self) -> Self:
        self._begun = self._said = time.perf_counter()
        return self

    def show(self, view: View) -> None:
        """Say what a frame shows."""
        self.done += 1
        now = time.perf_counter()
        text = f"frame {self.done}: {view.says}, {view.rate:.1f} frames/s"
        if self._quiet:
            return
        if self._over:
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)
        elif self.done == 1 or now - self._said >= _EVERY:
            say(text)
            self._said = now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._seconds = time.perf_counter() - self._begun
        if self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def summary(self) -> str:
        """All frames in a line."""
        rate = f" in {self._seconds:.1f} s, {self.done / self._seconds:.1f} frames/s" if self.done else ""
        return f"{self.done} frame(s){rate}"
