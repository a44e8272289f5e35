"""How fast an explanation is: onnx_lrp next to zennit, captum, LXT and torch on the same networks.

    python -m benchmarks.peers --write docs/performance.md
    python -m benchmarks.peers --device cuda --batches 1,64 --peak-tflops 989 --json cuda.json

An engine takes turns with the one of ours that computes the same, and with the forward pass, so that every ratio is one
of times taken side by side (benchmarks.measure says how). Which engines belong to which network: benchmarks.engines.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import (
    ENGINES,
    FORWARD,
    SWITCHED,
    TABLE,
    Case,
    Runs,
    beside,
    dtype_of,
    engines,
    lead,
    options,
    spelled,
)
from benchmarks.measure import MB, command, described, medians, peak, publish
from benchmarks.sizes import Sizes
from onnx_lrp.errors import InputError
from onnx_lrp.runtime import choose_providers

NETWORKS = ("vgg16", "resnet50", "mobilenet_v2", "minilm")  # half an hour on two slow cores
Results = dict[str, Any]  # as it is written to a file: see `measured`


# ---- measuring -------------------------------------------------------------------------------------------------------


def prepare(
    case: Case, wanted: Sequence[str], source: Path | None = None, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Write the source, its inputs and the models that `wanted` engines run; return what each rewriting took."""
    import onnx_lrp

    if case.file().exists():
        pass  # by another batch
    elif source is not None:
        case.file().symlink_to(source.resolve())
    else:
        replace(case, device="cpu").network().write(case.file(), fixed=case.fixed)
    np.savez(case.file().with_suffix(f".{case.batch}.npz"), **inputs(case))
    files = {}
    for method in dict.fromkeys(beside(case, name) for name in wanted):
        if method == FORWARD or case.file(method).exists():
            continue
        seconds: list[float] = []
        while not seconds or (len(seconds) < repeats and sum(seconds) < 2):
            start = time.perf_counter()
            explained = onnx_lrp.rewrite(case.file(), spelled(case, method), **options(method))
            seconds.append(time.perf_counter() - start)
        explained.save(case.file(method))
        before, after = (path.stat().st_size / MB for path in (case.file(), case.file(method)))
        files[method] = {"seconds": statistics.median(seconds), "source_mb": before, "explained_mb": after}
    if SWITCHED in wanted and not case.file(SWITCHED).exists():
        onnx_lrp.rewrite(case.file(), lead(case), switch=True, **options(lead(case))).save(case.file(SWITCHED))
    return files


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Return the network's own inputs; for a file random numbers, its open sizes being the batch or the picture's."""
    if not case.given:
        return {name: x.numpy() for name, x in replace(case, device="cpu").network().feeds.items()}
    import onnxruntime as ort

    found = {}
    for node in ort.InferenceSession(case.file(), providers=["CPUExecutionProvider"]).get_inputs():
        shape = [case.batch, *(size if isinstance(size, int) else case.sizes.picture for size in node.shape[1:])]
        if isinstance(node.shape[0], int) and node.shape[0] != case.batch:
            raise SystemExit(f"{case.name} takes batches of {node.shape[0]} only: --batches {node.shape[0]}")
        numbers, dtype = np.random.default_rng(0).standard_normal(shape), dtype_of(node)
        found[node.name] = (numbers if dtype.kind == "f" else np.abs(numbers * 10)).astype(dtype)
    return found


def groups(case: Case, wanted: Sequence[str]) -> list[list[str]]:
    """Return engines that take turns: those that compute the same, and the forward pass with each.

    All at once would hold every one's weights, some three or four times over.
    """
    found: dict[str, list[str]] = {}
    for name in wanted:
        found.setdefault(beside(case, name), [FORWARD]).append(name)
    return [list(dict.fromkeys(group)) for group in found.values()]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, in parts of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def timed(case: Case, wanted: Sequence[str], rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Measure a case: ms and the ratio to the forward pass by engine; and how far peers are from what ours found."""
    rows: dict[str, dict[str, float]] = {}
    apart: dict[str, float] = {}
    for group in groups(case, wanted):
        calls: dict[str, Runs] = {name: ENGINES[name].make(case) for name in group}
        for name, ms in (times := medians(calls, rounds)).items():
            if name not in rows:
                rows[name] = {"ms": ms, "per_forward": ms / times[FORWARD]}
        for name, call in calls.items():
            ours = calls.get(beside(case, name))
            if ENGINES[name].same and ours is not None and ours is not call:
                apart[name] = difference(ours.found(), call.found())
        del calls, call, ours
        gc.collect()
    return {name: rows[name] for name in wanted}, apart


def memory(case: Case, name: str) -> float | None:
    """Return the engine's peak memory in MB beyond imports, or None where it cannot be told."""
    engine = ENGINES[name]
    runs = 1 if engine.slow else 2
    return peak(
        functools.partial(engine.make, case), engine.imports, forget=engine.torch, runs=runs, device=case.device
    )


def operations(case: Case, method: str) -> float | None:
    """Return the floating-point operations of one run, those of products of tensors; None where a loop hides some."""
    import onnx

    from benchmarks.costs import nodes, products

    model = onnx.load(case.file(method))
    if any(node.op_type == "Loop" for node in nodes(model.graph)):
        return None
    once = 1 if case.fixed else case.batch
    return 2.0 * once * products(model, {k: x if case.fixed else x[:1] for k, x in case.feeds().items()})


def measured(args: argparse.Namespace, arguments: Sequence[str]) -> Iterator[Results]:
    """Measure, and yield all that is known after each network in each batch size."""
    hardware = graphics(args) if args.device == "cuda" else ""
    packages = ("onnxruntime", "onnxruntime-gpu", "onnx", "torch", "zennit", "captum", "lxt", "numpy")
    results: Results = {
        "machine": described(packages, args.threads, hardware),
        "command": command("peers", arguments),
        "rounds": args.rounds,
        "device": args.device,
        "float16": args.half,
        "graphs": args.graphs,
        "peak_tflops": args.peak_tflops,
        "networks": {},
    }
    given = {Path(path).stem: Path(path) for path in args.onnx}
    for name in (*args.networks, *given):
        found: Results = {"batches": {}, "differences": {}, "files": {}}
        results["networks"][name] = found
        with tempfile.TemporaryDirectory() as folder:
            for batch in args.batches:
                case = Case(
                    name,
                    Path(folder),
                    batch,
                    Sizes(args.size, args.length, args.shrink),
                    threads=args.threads,
                    device=args.device,
                    dtype="float16" if args.half else "float32",
                    fixed=args.graphs,
                    tf32=args.tf32,
                    steps=args.steps,
                    given=name in given,
                )
                wanted = engines(case, args.engines)
                files = prepare(case, wanted, given.get(name))
                found["files"] = files | found["files"]
                rows, apart = timed(case, wanted, args.rounds)
                for engine, row in rows.items():
                    row.update(further(case, engine, row["ms"], args))
                found["batches"][str(batch)] = rows
                found["differences"] = apart | found["differences"]
                yield results


def further(case: Case, engine: str, ms: float, args: argparse.Namespace) -> dict[str, float]:
    """Return what a row says beside times: samples a second, peak memory, the share of the hardware's peak."""
    row = {"a_second": 1000 * case.batch / ms}
    if args.memory and (used := memory(case, engine)) is not None:
        row["peak_mb"] = used
    counted = case.file(engine).exists() and engine != SWITCHED  # which runs a part of its file
    if args.peak_tflops and counted and (done := operations(case, engine)) is not None:
        row["share"] = done / ms / 1e9 / args.peak_tflops
    return row


def graphics(args: argparse.Namespace) -> str:
    """Return the name of the GPU.

    Raises:
        SystemExit: there is none, or not for ONNX Runtime and torch both.
    """
    try:
        choose_providers("cuda")
    except InputError as error:
        raise SystemExit(f"--device cuda: {error}") from None
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU (a build without CUDA, or no driver)")
    tf32 = "TF32" if args.tf32 else "no TF32"
    return f"{torch.cuda.get_device_name()} ({'float16' if args.half else f'float32, {tf32}'})"


def joined(parts: Sequence[Results]) -> Results:
    """Return the results of several runs as those of one.

    Raises:
        SystemExit: they are of different devices or types, so that one table cannot show them.
    """
    results = dict(parts[0], networks={})
    results["command"] = ", ".join(part["command"] for part in parts)
    for part in parts:
        if any(part[key] != results[key] for key in ("device", "float16", "graphs", "peak_tflops")):
            raise SystemExit("these files are of runs on different devices or in different types: show each by itself")
        for name, found in part["networks"].items():
            known = results["networks"].setdefault(name, {"batches": {}, "differences": {}, "files": {}})
            for batch, rows in found["batches"].items():
                known["batches"][batch] = rows | known["batches"].get(batch, {})
            for key in ("differences", "files"):
                known[key] = found[key] | known[key]
    return results


# ---- showing ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "ms": ("ms", "{:.1f}"),
    "per_forward": ("per forward", "{:.2f}"),
    "peak_mb": ("peak MB", "{:.0f}"),
    "a_second": ("a second", "{:.1f}"),
    "share": ("of peak", "{:.0%}"),
}


def columns(results: Results) -> list[str]:
    """Return the columns that say something: rates and shares are for those who ask for the share of the peak."""
    hidden = set() if results["device"] == "cuda" or results["peak_tflops"] else {"a_second"}
    rows = [
        row for found in results["networks"].values() for rows in found["batches"].values() for row in rows.values()
    ]
    return [name for name in COLUMNS if name not in hidden and any(name in row for row in rows)]


def report(results: Results) -> Iterator[str]:
    """Yield the lines of a page."""
    yield results["machine"]
    yield (
        f"Medians of {results['rounds']}; networks given by name have random weights. Memory is the peak of a process"
        " of its own beyond imports, loading included."
    )
    yield results["command"]
    for name, found in results["networks"].items():
        yield f"\n**{name}**\n"
        yield from table(found["batches"], columns(results))
        if compared := list(faster(found)):
            yield (
                "\n| times as fast | "
                + " | ".join(f"batch {batch}" for batch in found["batches"])
                + " | largest difference |"
            )
            yield "| --- |" + " ---: |" * (len(found["batches"]) + 1)
            for engine, ratios, apart in compared:
                cells = [f"{ratios[batch]:.2f} ×" if batch in ratios else "-" for batch in found["batches"]]
                yield f"| {against(engine)} | " + " | ".join([*cells, f"{apart:.0e}"]) + " |"
    rows = [(name, *pair) for name, found in results["networks"].items() for pair in found["files"].items()]
    if rows:
        yield "\n| network | method | rewriting s | source MB | explained MB |\n| --- | --- |" + " ---: |" * 3
    for name, method, row in rows:
        yield f"| {name} | {method} | {row['seconds']:.2f} | {row['source_mb']:.1f} | {row['explained_mb']:.1f} |"


def table(batches: Mapping[str, Mapping[str, Mapping[str, float]]], shown: Sequence[str]) -> Iterator[str]:
    """Yield the table of one network, its batches side by side."""
    heads = [COLUMNS[name][0] for name in shown]
    yield "| | " + " | ".join(" | ".join([f"batch {batch}: {heads[0]}", *heads[1:]]) for batch in batches) + " |"
    yield "| --- |" + " ---: |" * len(shown) * len(batches)
    for engine in (name for name in ENGINES if any(name in rows for rows in batches.values())):
        rows = [found.get(engine, {}) for found in batches.values()]
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "-" for row in rows for name in shown]
        yield f"| {ENGINES[engine].title} | " + " | ".join(cells) + " |"


def faster(found: Results) -> Iterator[tuple[str, dict[str, float], float]]:
    """Yield every peer, how many times as fast ours is by batch, and how far apart the two are."""
    for engine, apart in found["differences"].items():
        if ENGINES[engine].torch:
            ours = ENGINES[engine].beside
            both = {batch: rows for batch, rows in found["batches"].items() if engine in rows and ours in rows}
            yield (
                engine,
                {batch: rows[engine]["per_forward"] / rows[ours]["per_forward"] for batch, rows in both.items()},
                apart,
            )


def against(engine: str) -> str:
    """Return the title of a comparison."""
    ours = ENGINES[engine].beside
    return f"{'ONNX Runtime' if ours == FORWARD else ours} against {short(engine)}"


def short(engine: str) -> str:
    """Return an engine's title for places where it stands beside the one that it is compared with."""
    return ENGINES[engine].title.removesuffix(", forward only")


def plot(results: Results, path: Path) -> None:
    """Draw what explanations cost in forward passes, and how many times as fast as peers they are."""
    import matplotlib.pyplot as plt

    networks = results["networks"]
    batches = sorted({batch for found in networks.values() for batch in found["batches"]}, key=int)
    costs: list[tuple[str, dict[str, float]]] = []
    speeds: list[tuple[str, dict[str, float]]] = []
    for name, found in networks.items():
        for engine in (e for e in ENGINES if ENGINES[e].beside == e != FORWARD and not ENGINES[e].slow):
            ratios = {b: rows[engine]["per_forward"] for b, rows in found["batches"].items() if engine in rows}
            costs += [(f"{name}, {engine}", ratios)] if ratios else []
        for engine, ratios, _ in faster(found):
            speeds.append((f"{name}, {short(engine)}", ratios))
    panels = [
        (rows, title)
        for rows, title in (
            (costs, "explanation, in forward passes"),
            (speeds, "times as fast as peers that compute the same"),
        )
        if rows
    ]
    longest = max(len(rows) for rows, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 1.2 + 0.24 * longest), squeeze=False)
    for axis, (rows, title) in zip(axes[0], panels, strict=True):
        for place, batch in enumerate(batches):
            height = 0.8 / len(batches)
            at = [
                index + (place - (len(batches) - 1) / 2) * height
                for index, (_, found) in enumerate(rows)
                if batch in found
            ]
            lengths = [found[batch] for _, found in rows if batch in found]
            axis.barh(at, lengths, height, label=f"batch {batch}")
        axis.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the command -----------------------------------------------------------------------------------------------------


def listed(kind: type[Any], known: Sequence[str] = ()) -> Any:
    """Return a reader of values by commas, which must be among `known` where that is given; "all" is each of them."""

    def read(text: str) -> tuple[Any, ...]:
        if known and text == "all":
            return tuple(known)
        found = tuple(kind(part) for part in text.split(",") if part)
        if strange := [part for part in found if known and part not in known]:
            raise argparse.ArgumentTypeError(f"there is no {strange[0]}; there are {', '.join(known)}")
        return found

    return read


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--networks", type=listed(str, list(TABLE)), default=NETWORKS, help=f"by commas, or all: {', '.join(TABLE)}")
    add("--onnx", action="append", default=[], metavar="PATH", help="a model's file; may be repeated")
    add(
        "--engines",
        type=listed(str, list(ENGINES)),
        default=(),
        help=f"by commas; default: all that apply but integrated gradients and rarer ones. {', '.join(ENGINES)}",
    )
    add("--batches", type=listed(int), default=(1, 8), help="by commas; a model whose batch is fixed allows no other")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=50, help="of integrated gradients")
    add("--size", type=int, default=224, help="height and width of the pictures")
    add("--length", type=int, help="of texts (128) and sequences (200)")
    add("--shrink", type=int, default=1, help="divides all widths of the networks")
    add("--no-memory", action="store_false", dest="memory", help="do not measure memory, which wants processes")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--half", action="store_true", help="float16 weights and inputs")
    add("--graphs", action="store_true", help="files without open axes; on CUDA their runs are replayed as CUDA graphs")
    add("--no-tf32", action="store_false", dest="tf32", help="CUDA: full float32 products, in all engines")
    add("--peak-tflops", type=float, help="of the hardware in this type: shows the share of it that is reached")
    add("--json", type=Path, metavar="FILE", help="write all numbers there, as they come")
    add(
        "--from",
        type=Path,
        nargs="+",
        metavar="FILE",
        dest="stored",
        help="measure nothing: show numbers of such files",
    )
    add("--plot", type=Path, metavar="FILE", help="draw a picture of them (.png, .svg)")
    add("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    add("--section", default="peers", help="the name in the markers <!-- NAME:begin --> and <!-- NAME:end -->")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parsed(given)
    if args.stored:
        results = joined([json.loads(path.read_text()) for path in args.stored])
    else:
        for results in measured(args, given):
            name, found = list(results["networks"].items())[-1]
            print(
                f"{time.strftime('%H:%M:%S')} {name}, batch {list(found['batches'])[-1]}", file=sys.stderr, flush=True
            )
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    publish(report(results), args.write, args.section)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
