"""How the benchmarks measure: calls that take turns, memory of a process of its own, the line on machine and versions.

All engines live in one process with equally many threads and take turns, so that whatever else the computer does falls
on all of them alike. Before each sample there is a pause, in which the other engines' threads go to sleep, and one call
that is not counted; a sample repeats the call for at least a quarter of a second. Numbers are medians. Memory is
measured apart, in a new process for every engine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import pkgutil
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Call = Callable[[], object]

ENOUGH = 0.25  # seconds that a sample lasts at least
MB = 1e6


def samples(
    calls: Mapping[str, Call], rounds: int, enough: float = ENOUGH, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return each call's times in milliseconds; see :func:`onnx_lrp.measure.turns`."""
    from onnx_lrp.measure import turns  # here, so that a process that measures memory does not import it

    return {name: [1000 * t for t in found] for name, found in turns(calls, rounds, enough, clock).items()}


def medians(calls: Mapping[str, Call], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return each call's median time in milliseconds over `rounds` samples, all calls taking turns."""
    return {name: statistics.median(found) for name, found in samples(calls, rounds, clock=clock).items()}


def alone(function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """Return what a function of a module returns in a new process, which inherits nothing.

    Raises:
        BrokenProcessPool: the process died, as one does that takes more memory than there is.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **options).result()


def peak(
    make: Callable[[], Call],
    imports: Sequence[str] = (),
    *,
    beyond: Literal["imports", "loaded"] = "imports",
    forget: bool = False,
    runs: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
) -> float | None:
    """Return the peak memory in MB of a few calls in a process of its own; None where there is no Linux to tell it.

    Args:
        make: makes the call; a function of a module, or functools.partial of one.
        imports: what is imported before the memory is looked at first: modules, or "module:function" to be called.
        beyond: whether what importing took is subtracted, or what the process held once the call was made.
        forget: only what the calls take at their peak counts, not what making took at its own (such as random weights).
        runs: how many calls.
        device: "cuda": memory of the GPU, all that the process takes of it; pools never shrink, so that is the peak.
    """
    if device == "cuda":
        return alone(_peak_of_gpu, make, imports, beyond == "loaded", runs)
    if not Path("/proc/self/clear_refs").exists():
        return None
    return alone(_peak, make, imports, beyond == "loaded", forget, runs)


def _import(names: Sequence[str]) -> None:
    for name in names:
        found = pkgutil.resolve_name(name)
        if callable(found):
            found()


def _peak_of_gpu(make: Callable[[], Call], imports: Sequence[str], loaded: bool, runs: int) -> float:
    import torch

    def taken() -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / MB

    _import(imports)
    before = taken()
    call = make()
    before = taken() if loaded else before
    for _ in range(runs):
        call()
    return taken() - before


def _peak(make: Callable[[], Call], imports: Sequence[str], loaded: bool, forget: bool, runs: int) -> float:
    _import(imports)
    before = _resident("VmRSS")
    call = make()
    if forget or loaded:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held now
    if loaded:
        before = _resident("VmRSS")
    for _ in range(runs):
        call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Memory of this process in MB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / MB


def processor() -> str:
    """Return the processor's name, and whether it has AVX-512, on which much of a ratio depends."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    if not name:
        return platform.machine()
    return f"{name} {'with' if 'avx512f' in text else 'without'} AVX-512" if "flags" in text else name


def described(packages: Sequence[str], threads: int, hardware: str = "") -> str:
    """Return the line that a table needs: date, machine, threads, and versions of those packages that are installed."""
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in packages if name in found)
    today = datetime.datetime.now(datetime.UTC)
    machine = f"{hardware}, {processor()}" if hardware else processor()
    return f"{today:%d %B %Y}, {machine}, {threads} threads, Python {platform.python_version()}, {versions}."


def command(module: str, arguments: Sequence[str]) -> str:
    """Return the command line that makes a table, as a page shows it."""
    return f"`{shlex.join(['python', '-m', f'benchmarks.{module}', *arguments])}`"


def publish(lines: Iterable[str], page: Path | None = None, name: str = "") -> None:
    """Print lines as they come; then put them into a page, where one is given.

    Raises:
        SystemExit: the page has no lines `<!-- NAME:begin -->` and `<!-- NAME:end -->` to write between.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page is not None and not all(mark in page.read_text(encoding="utf-8") for mark in (begin, end)):
        raise SystemExit(f"{page} has no lines {begin} and {end} to write between")
    shown = []
    for line in lines:
        print(line, flush=True)
        shown.append(line)
    if page is not None:
        text = page.read_text(encoding="utf-8")
        head, tail = text.split(begin, 1)[0], text.split(end, 1)[1]
        page.write_text(f"{head}{begin}\n" + "\n".join(shown) + f"\n{end}{tail}", encoding="utf-8")
