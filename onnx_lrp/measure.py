"""What explanations of a model cost beside its forward pass: time, peak memory, bytes, nodes and where they run.

Calls take turns in one process; memory is the peak of a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_lrp import model as models
from onnx_lrp.errors import InputError, ModelError
from onnx_lrp.methods import Method
from onnx_lrp.model import ModelLike
from onnx_lrp.placement import Placement, placement
from onnx_lrp.rewrite import Explained, rewrite
from onnx_lrp.roles import Spec, noise
from onnx_lrp.runtime import (
    ON_CUDA,
    Array,
    Device,
    Session,
    has_fixed_batch,
    onnxruntime,
    opened,
    session_options,
)

FORWARD = "forward"
_PAUSE = 0.01  # seconds: threads of the call before, which still spin, come to rest
_ENOUGH = 0.25  # seconds that one turn lasts at least


def turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    enough: float = _ENOUGH,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each of its turns.

    The calls take turns in this process, so that what disturbs the machine disturbs all of them. A turn begins with one
    call that does not count, save that a long call is warmed up once only; short calls are repeated.

    Args:
        calls: by name.
        rounds: turns of each, at least 1.
        enough: seconds that a turn lasts at least.
        clock: on a computer that has other work too, time.process_time for calls of one thread.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            if not found[name] or found[name][-1] < enough:
                call()
            begin, runs = clock(), 0
            while not runs or clock() - begin < enough:
                call()
                runs += 1
            found[name].append((clock() - begin) / runs)
    return found


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, enough: float = _ENOUGH) -> dict[str, float]:
    """Seconds of each call: the median of its :func:`turns`."""
    return {name: statistics.median(seconds) for name, seconds in turns(calls, rounds, enough).items()}


def resident(field: str) -> int:
    """Bytes of memory of this process, Linux only: ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def knows_memory() -> bool:
    """Whether this system tells the peak memory of a process."""
    return Path("/proc/self/clear_refs").exists()


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        method: the method, or "forward" for the model alone.
        batch: samples per call.
        seconds: median time of a call.
        per_forward: the same in forward passes.
        samples_per_second: batch / seconds.
        peak_bytes: peak of the host's memory beyond imports, in a process of its own; None where the system does not
            tell, or where it was not asked for.
    """

    method: str
    batch: int
    seconds: float
    per_forward: float
    samples_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Made:
    """What rewriting made of the model.

    Attributes:
        method: the method, or "forward" for the model as it was given.
        rewriting_seconds: time of rewriting, reading the file included; 0 for the model itself.
        file_bytes: of the .onnx file and its external data.
        nodes: of the file.
        placement: where those nodes run that are left when the session is made.
    """

    method: str
    rewriting_seconds: float
    file_bytes: int
    nodes: int
    placement: Placement


@dataclass(frozen=True)
class Benchmark:
    """The result of :func:`benchmark`.

    Attributes:
        model: its name.
        providers: execution providers in use.
        threads: threads per operator; None: ONNX Runtime's choice.
        rounds: turns of each call.
        machine: processor, system and versions.
        costs: of each method in each batch size, the forward pass before the methods.
        made: one per method, the model itself first.
    """

    model: str
    providers: list[str]
    threads: int | None
    rounds: int
    machine: str
    costs: list[Cost]
    made: list[Made]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        made = [{**vars(m), "placement": m.placement.to_json()} for m in self.made]
        return {**vars(self), "costs": [vars(cost) for cost in self.costs], "made": made}

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", threads: {self.threads}"
        source = self.made[0]
        costs = [("batch", "", "ms", "per forward", "samples/s", "peak MB")]
        for c in self.costs:
            peak = "-" if c.peak_bytes is None else f"{c.peak_bytes / 1e6:.0f}"
            times = (_number(1e3 * c.seconds), f"{c.per_forward:.2f}", _number(c.samples_per_second))
            costs.append((str(c.batch), c.method, *times, peak))
        files = [("", "rewriting s", "file MB", "per source", "nodes", "added")]
        for m in self.made:
            taken = f"{m.rewriting_seconds:.2f}" if m is not source else "-"
            size = (_number(m.file_bytes / 1e6), f"{m.file_bytes / source.file_bytes:.2f}")
            files.append((m.method, taken, *size, str(m.nodes), str(m.nodes - source.nodes)))
        return "\n".join(
            (
                f"{self.model} on {', '.join(self.providers)}{threads}; medians of {self.rounds}",
                self.machine,
                "",
                *_aligned(costs),
                "",
                *_aligned(files),
                "",
                "nodes that run, after ONNX Runtime's optimisation:",
                *_aligned([(f"  {m.method}", str(m.placement)) for m in self.made]),
            )
        )


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = [rows[-1][i].strip()[:1].isalpha() for i in range(len(widths))]
    return [
        "  ".join(c.ljust(w) if left else c.rjust(w) for c, w, left in zip(r, widths, words, strict=True)).rstrip()
        for r in rows
    ]


def benchmark(
    model: ModelLike,
    methods: Sequence[str | os.PathLike[str] | Method] = ("epsilon_plus_flat",),
    *,
    batch_sizes: Sequence[int] | None = None,
    device: Device = "auto",
    providers: Sequence[Any] | None = None,
    threads: int | None = None,
    rounds: int = 5,
    memory: bool = True,
    enough: float = _ENOUGH,
    **options: Any,
) -> Benchmark:
    """Measure a model and its explanations on noise in the shapes that it declares.

    Inputs and outputs are bound beforehand, on the device where there is one, so that copies of them are not measured.

    Args:
        model: as for :func:`onnx_lrp.rewrite`.
        methods: as for :func:`onnx_lrp.rewrite`, each measured.
        batch_sizes: samples per call, each measured; default: 1, or the model's fixed batch.
        device: "auto" (CUDA where it loads, else CPU), "cpu" or "cuda".
        providers: ONNX Runtime's own list, overrides `device`.
        threads: threads per operator.
        rounds: turns of each call.
        memory: measure memory, too, which starts a process for each row.
        enough: seconds that a turn lasts at least.
        options: as for :func:`onnx_lrp.rewrite`; ``shapes`` says lengths that the model leaves open.

    Raises:
        OnnxLrpError: as for :func:`onnx_lrp.rewrite`; InputError where the device does not load, the batch is fixed at
            another length, or a length is open.
    """
    if rounds < 1:
        raise InputError(f"rounds is at least 1, not {rounds}")
    rewritten: dict[str, Explained] = {}
    taken: dict[str, float] = {}
    for method in methods:
        begin = time.perf_counter()
        explained = rewrite(model, method, **options)
        name = os.fspath(method) if isinstance(method, str | os.PathLike) else explained.method
        if name in rewritten:
            raise InputError(f"method {name} is given twice")
        rewritten[name], taken[name] = explained, time.perf_counter() - begin
    if not rewritten:
        raise InputError("give at least one method")
    source = next(iter(rewritten.values())).source
    protos = {FORWARD: source.original} | {name: explained.model for name, explained in rewritten.items()}
    # Of the explained model, since there the lengths given as shapes are fixed.
    running: dict[str, Any] = {"device": device, "providers": providers, "threads": threads, "folder": source.folder}
    session = Session(next(iter(rewritten.values())).model, **running)
    # What really loads is used from here on: where "auto" fell back, each session would try again and say so.
    specs, in_use, chosen = session.specs(), session.providers, session.asked
    del session
    sizes = _batch_sizes(specs, batch_sizes)
    costs = []
    with tempfile.TemporaryDirectory(prefix="onnx_lrp_") as inside:
        files = {name: _written(m, Path(inside) / f"{i}.onnx") for i, (name, m) in enumerate(protos.items())}
        jobs = {
            name: {
                "file": str(files[name]),
                "folder": None if source.folder is None else str(source.folder),
                "threads": threads,
                "fixed": has_fixed_batch(proto),
                "providers": chosen,
            }
            for name, proto in protos.items()
        }
        sessions = {name: _session(job) for name, job in jobs.items()}
        for batch in sizes:
            feeds = noise(specs, batch)
            fed = Path(inside) / f"feeds{batch}.npz"
            np.savez(fed, **feeds)  # type: ignore[arg-type]
            peaks = {
                name: alone("onnx_lrp.measure", job | {"feeds": str(fed)}) if memory and knows_memory() else None
                for name, job in jobs.items()
            }
            calls = {name: _call(session, feeds) for name, session in sessions.items()}
            times = medians(calls, rounds, enough)
            costs += [Cost(n, batch, t, t / times[FORWARD], batch / t, peaks[n]) for n, t in times.items()]
        size = {name: models.bytes_on_disk(file, source.folder) for name, file in files.items()}
        size |= {FORWARD: models.bytes_on_disk(Path(os.fspath(model)))} if isinstance(model, str | os.PathLike) else {}
        feeds = noise(specs, sizes[0])
        running["providers"] = chosen
        made = [
            Made(
                name,
                taken.get(name, 0.0),
                size[name],
                len(proto.graph.node),
                placement(proto, feeds, **running),
            )
            for name, proto in protos.items()
        ]
    return Benchmark(source.name, in_use, threads, rounds, machine(), costs, made)


def alone(module: str, job: Mapping[str, Any]) -> Any:
    """What ``python -m module JOB`` prints last, as JSON, in a process of its own.

    Raises:
        ModelError: the process fails; says how.
    """
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"a process that measures alone ends with code {done.returncode}: {last[:200]}")
    return json.loads(done.stdout.splitlines()[-1])


def _batch_sizes(specs: Mapping[str, Spec], wanted: Sequence[int] | None) -> list[int]:
    """How many samples to run, each size once."""
    fixed = {spec.shape[0] for spec in specs.values() if spec.shape}
    lengths = [length for length in fixed if isinstance(length, int)]
    own = lengths[0] if len(lengths) == len(fixed) == 1 else None
    found = list(dict.fromkeys(wanted or [own or 1]))
    bad = [size for size in found if size < 1 or (own is not None and size != own)]
    if bad and own is not None:
        raise InputError(f"the model takes batches of {own} only, not of {bad[0]}: leave batch_size= out")
    if bad:
        raise InputError(f"batch_size is at least 1, not {bad[0]}")
    return found


def _written(model: onnx.ModelProto, path: Path) -> Path:
    """The model's file; external data stays where it is."""
    data = models.serialized(model)
    if data is None:
        models.save(model, path)
    else:
        path.write_bytes(data)
    return path


def _session(job: Mapping[str, Any]) -> Any:
    """ONNX Runtime's session of a file, as the explainer would have it."""
    options = session_options(job["threads"], fixed_batch=job["fixed"])
    file: str | bytes = job["file"]
    if job["folder"] is not None and not Path(job["file"] + ".data").exists():
        # ONNX Runtime looks for external data in the folder only if the model comes as bytes.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", job["folder"])
        file = Path(job["file"]).read_bytes()
    providers = [tuple(p) if isinstance(p, list) else p for p in job["providers"]]
    return opened(file, options, providers)


def _call(session: Any, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """A run with inputs and outputs at places of their own."""
    ort = onnxruntime()
    device = "cuda" if session.get_providers()[0] in ON_CUDA else "cpu"
    binding = session.io_binding()
    for info in session.get_inputs():
        binding.bind_ortvalue_input(info.name, ort.OrtValue.ortvalue_from_numpy(feeds[info.name], device, 0))
    for info in session.get_outputs():
        binding.bind_output(info.name, device)
    return functools.partial(session.run_with_iobinding, binding)


def _peak(job: Mapping[str, Any]) -> int:
    """Peak of this process's memory beyond imports, in bytes."""
    onnxruntime()
    imported = resident("VmRSS")
    with np.load(job["feeds"]) as file:
        call = _call(_session(job), dict(file))
    for _ in range(3):
        call()
    return resident("VmHWM") - imported


def machine() -> str:
    """Processor, system and versions in a line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = f"onnxruntime {onnxruntime().__version__}, onnx {onnx.__version__}"
    return f"{cpu}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    print(json.dumps(_peak(json.loads(sys.argv[1]))))
