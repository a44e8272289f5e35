"""What the command says: results on stdout, complaints and progress on stderr."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator


def say(*lines: str) -> None:
    """Print to stdout; a reader that has left does not stop the work."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        close_stdout()


def complain(*lines: str) -> None:
    """Print to stderr, each line with the program's name."""
    with contextlib.suppress(OSError, ValueError):
        for line in lines:
            print(f"onnx-lrp: {line}", file=sys.stderr)
        sys.stderr.flush()


def tolerant_stdout() -> None:
    """Print what the terminal's encoding lacks as escapes, lest a class name ends the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_stdout() -> None:
    """Point stdout at nothing: the interpreter flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


@contextlib.contextmanager
def logs_to_stderr(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Show the library's log on stderr while a command runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("onnx-lrp: %(levelname)s: %(message)s".replace("%(levelname)s", "%(lower)s"))
    )
    handler.addFilter(_lower)
    logger = logging.getLogger("onnx_lrp")
    before = logger.level
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _lower(record: logging.LogRecord) -> bool:
    record.lower = record.levelname.lower()
    return True


class Progress:
    """How far a long run is, as one line on stderr that is written over; on a terminal only."""

    def __init__(self, total: int, *, quiet: bool = False):
        self._total, self._width = total, 0
        self._shown = total > 1 and not quiet and sys.stderr.isatty()

    def show(self, done: int, what: str = "") -> None:
        """Say that `done` of all are finished."""
        if self._shown:
            bar = "#" * (20 * done // self._total)
            text = f"[{bar:<20}] {done}/{self._total} {what}"[:100]
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)

    def clear(self) -> None:
        """Take the line away, before other output or at the end."""
        if self._shown and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0
