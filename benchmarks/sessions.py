"""What options of ONNX Runtime's sessions, and samples per run, do to the time and the memory of an explanation.

`python -m benchmarks.sessions`: ResNet-50 by `epsilon_plus`, eight pictures of 224 x 224 per call. Numbers of samples
take turns in one process, and so does each option with the session as the explainer has it; medians. Memory is the peak
beyond imports of a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnx_lrp.measure import alone, medians, resident
from onnx_lrp.runtime import session_options

Change = Callable[[Any], object]
SAMPLES, CHUNKS = 8, (1, 2, 4, 8)
LEVEL = ort.GraphOptimizationLevel


def entry(key: str, value: str = "1") -> Change:
    """Return a change of one configuration entry."""
    return lambda options: options.add_session_config_entry(key, value)


def attribute(name: str, value: Any) -> Change:
    """Return a change of one attribute."""
    return lambda options: setattr(options, name, value)


def exact_arena(options: Any) -> None:
    """Let the arena grow by what is asked for, not to the next power of two."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    settings = {
        "max_mem": 0,
        "arena_extend_strategy": 1,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(settings))
    options.add_session_config_entry("session.use_env_allocators", "1")


CHANGES: dict[str, Change] = {
    "as the explainer has them": lambda options: None,
    "memory pattern on": attribute("enable_mem_pattern", True),
    "arena off": attribute("enable_cpu_mem_arena", False),
    "arena grows by what is asked for": exact_arena,
    "no reuse of memory": attribute("enable_mem_reuse", False),
    "no prepacked weights": entry("session.disable_prepacking"),
    "initializers outside the arena": entry("session.use_device_allocator_for_initializers"),
    "threads do not spin": entry("session.intra_op.allow_spinning", "0"),
    "denormals are zero": entry("session.set_denormal_as_zero"),
    "nodes by priority": attribute("execution_order", ort.ExecutionOrder.PRIORITY_BASED),
    "memory-efficient order": attribute("execution_order", ort.ExecutionOrder.MEMORY_EFFICIENT),
    "branches in parallel": attribute("execution_mode", ort.ExecutionMode.ORT_PARALLEL),
    "optimisation: extended (no blocked layout)": attribute("graph_optimization_level", LEVEL.ORT_ENABLE_EXTENDED),
    "optimisation: basic": attribute("graph_optimization_level", LEVEL.ORT_ENABLE_BASIC),
}


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Return seconds for all samples by each option and number of samples per run, and this process's peak in MB."""
    imported = resident("VmRSS")
    x = np.random.default_rng(0).standard_normal((SAMPLES, 3, 224, 224)).astype(np.float32)
    calls: dict[str, Callable[[], None]] = {}
    for change in job["changes"]:
        options = session_options(job["threads"])
        CHANGES[change](options)
        session = ort.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
        for step in job["steps"]:

            def call(session: Any = session, step: int = step) -> None:
                for i in range(0, SAMPLES, step):
                    session.run(None, {"input": x[i : i + step]})

            calls[f"{change}/{step}"] = call
            call()
    peak = (resident("VmHWM") - imported) / 1e6
    return {"peak": peak, "seconds": medians(calls, job["rounds"]) if job["rounds"] else {}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="epsilon_plus")
    parser.add_argument("--steps", type=int, default=4, help="samples per run where options are compared")
    parser.add_argument("--only", default="", metavar="REGEX", help="options to compare; default: all")
    args = parser.parse_args(arguments)
    import onnx_lrp
    from exporters.torch_nets import export, resnet50

    own, *others = CHANGES
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(folder) / "resnet50.onnx", Path(folder) / "explained.onnx"
        export(resnet50(), source, (1, 3, 224, 224), folded=True)
        onnx_lrp.rewrite(source, args.method).save(file)

        def run(changes: Sequence[str], steps: Sequence[int], rounds: int) -> dict[str, Any]:
            job = {"file": str(file), "threads": args.threads, "changes": changes, "steps": steps, "rounds": rounds}
            found: dict[str, Any] = alone("benchmarks.sessions", job)
            return found

        print("| samples per run | ms per sample | peak MB |\n| ---: | ---: | ---: |")
        for key, seconds in run([own], CHUNKS, args.rounds)["seconds"].items():
            step = int(key.split("/")[1])
            print(f"| {step} | {1e3 * seconds / SAMPLES:.1f} | {run([own], [step], 0)['peak']:.0f} |", flush=True)
        print("\n| option | time | peak MB |\n| --- | ---: | ---: |", flush=True)
        print(f"| {own} | 1.00 | {run([own], [args.steps], 0)['peak']:.0f} |", flush=True)
        for change in others:
            if re.search(args.only, change):
                before, after = run([own, change], [args.steps], args.rounds)["seconds"].values()
                peak = run([change], [args.steps], 0)["peak"]
                print(f"| {change} | {after / before:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        print(json.dumps(measured(json.loads(sys.argv[1]))))
    else:
        main()
