"""How the cost of explaining grows: with batch, resolution, depth, classes, steps of a path, length of a text.

    python -m benchmarks.scaling --write docs/performance.md --picture docs/images/scaling.png

Each series changes one size of a network with random weights, and tells the time of the bare forward pass, of the
explanation (prediction included) and of rewriting. Calls of one size take turns; numbers are medians. The picture needs
the extra `plot`.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_lrp
from benchmarks.measure import Call, command, described, medians, publish
from benchmarks.networks import network
from benchmarks.sizes import Sizes
from onnx_lrp.runtime import Session

Array = np.ndarray
PLUS, GRADIENT, ATTENTION = "epsilon_plus", "gradient", "attnlrp"
FAST = {"ResNet-50": 1.0, "transformer": 3.0}  # seconds in which these should be rewritten
STEEPEST = 11.0  # times longer that ten times as many nodes may take


@dataclass
class Point:
    """What was measured at one size.

    Attributes:
        at: the size.
        forward: the bare forward pass, in ms; None where only rewriting was timed.
        explained: explanation and prediction by method, in ms.
        rewriting: of the first method, in seconds.
        nodes: of the source model.
    """

    at: int
    forward: float | None
    explained: dict[str, float]
    rewriting: float
    nodes: int


@dataclass
class Series:
    """How cost grows with one size.

    Attributes:
        name: of the series.
        title: what grows.
        network: what is explained.
        axis: name and unit of the size.
        power: exponent of the size that the arithmetic grows with.
        points: what was measured.
    """

    name: str
    title: str
    network: str
    axis: str
    power: int = 1
    points: list[Point] = field(default_factory=list)

    def growth(self, of: Callable[[Point], float]) -> float:
        """The exponent p of size^p over the last two steps."""
        (first, x), *_, (last, y) = ((p.at, of(p)) for p in self.points[-3:])
        return math.log(y / x) / math.log(last / first)

    @property
    def methods(self) -> list[str]:
        """The methods that were measured."""
        return list(self.points[0].explained)


@dataclass(frozen=True)
class Setting:
    """One size: a model, what it is fed, and the methods by the name that tables give them."""

    at: int
    model: onnx.ModelProto
    feeds: Mapping[str, Array]
    methods: Mapping[str, Any]


# ---- networks --------------------------------------------------------------------------------------------------------


def arrays(feeds: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors as ONNX Runtime takes them."""
    return {name: x.numpy() for name, x in feeds.items()}


def _batches(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
    net = network("resnet50", 1, Sizes(shrink=shrink, picture=224 // shrink))
    model, picture = net.write(), arrays(net.feeds)["input"]
    for batch in sizes:
        yield Setting(batch, model, {"input": np.repeat(picture, batch, 0)}, {PLUS: PLUS, GRADIENT: GRADIENT})


def _resolutions(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
    for size in sizes:
        net = network("resnet50", 1, Sizes(shrink=shrink, picture=size))
        yield Setting(size, net.write(), arrays(net.feeds), {PLUS: PLUS, GRADIENT: GRADIENT})


def _classes(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
    from exporters.torch_nets import export, resnet50

    side = 224 // shrink
    x = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    for classes in sizes:
        module = resnet50(classes=classes, width=64 // shrink)
        model = export(module, None, (1, 3, side, side), folded=True)
        yield Setting(classes, model, {"input": x}, {PLUS: PLUS, GRADIENT: GRADIENT})


def _steps(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
    net = network("resnet50", 1, Sizes(shrink=shrink, picture=224 // shrink))
    model, feeds = net.write(), arrays(net.feeds)
    for steps in sizes:
        yield Setting(steps, model, feeds, {"integrated gradients": onnx_lrp.IntegratedGradients(steps)})


def _lengths(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
    model = transformer(4, 256 // shrink)
    for length in sizes:
        ids = np.random.default_rng(0).integers(0, 1000, (1, length))
        feeds = {"ids": ids, "mask": np.ones_like(ids), "types": np.zeros_like(ids)}
        yield Setting(length, model, feeds, {ATTENTION: ATTENTION, "cp_lrp": "cp_lrp"})


def transformer(layers: int, dim: int) -> onnx.ModelProto:
    """An encoder like BERT with a mean over its tokens, batch and length open."""
    import torch

    from exporters.minilm import Encoder
    from exporters.transformers import Bert, export

    torch.manual_seed(0)
    module = Encoder(Bert(vocabulary=1000, dim=dim, heads=4, hidden=4 * dim, layers=layers))
    example = {name: torch.ones(2, 16, dtype=torch.long) for name in ("ids", "mask", "types")}
    axes = {name: {0: "batch", 1: "length"} for name in example} | {"result": {0: "batch"}}
    return export(module, None, example, "result", axes)


def chain(op: str, layers: int, width: int, side: int = 1) -> onnx.ModelProto:
    """Conv or MatMul with a Relu after each, `layers` times, with a batch that is open."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    kernel = (3, 3) if op == "Conv" else ()
    attributes: dict[str, Any] = {"pads": [1] * 4, "kernel_shape": [3, 3]} if op == "Conv" else {}
    scale = math.sqrt(2 / (width * math.prod(kernel)))  # He et al. 2015: activations neither grow nor vanish
    for i in range(layers):
        w = (rng.standard_normal((width, width, *kernel)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node(op, [x, f"w{i}"], [f"z{i}"], f"{op}_{i}", **attributes))
        nodes.append(helper.make_node("Relu", [f"z{i}"], [f"a{i}"], f"Relu_{i}"))
        x = f"a{i}"
    shape: list[str | int] = ["batch", width, side, side] if op == "Conv" else ["batch", width]
    last = "Relu" if op == "MatMul" else "GlobalAveragePool"
    nodes.append(helper.make_node(last, [x], ["pooled"], "last"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"], "flat"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _chains(op: str) -> Callable[[Sequence[int], int], Iterator[Setting]]:
    """Layers of 9 (Conv) and 4 (MatMul) million multiplications."""

    def settings(sizes: Sequence[int], shrink: int) -> Iterator[Setting]:
        width, side, batch = (64, 16, 1) if op == "Conv" else (256, 1, 64)
        width //= shrink
        shape = (batch, width, side, side) if op == "Conv" else (batch, width)
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for layers in sizes:
            yield Setting(layers, chain(op, layers, width, side), {"x": x}, {PLUS: PLUS, GRADIENT: GRADIENT})

    return settings


# ---- measuring -------------------------------------------------------------------------------------------------------


def seconds(call: Call) -> float:
    """How long one call of Python takes the processor, whatever else it has to do."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(setting: Setting, known: dict[Any, Any], threads: int, rounds: int, clock: Callable[[], float]) -> Point:
    """Rewrite, load and time one size; models that were loaded for the size before are taken from `known`."""
    if known.get("model") is not setting.model:
        known.clear()
        known |= {"model": setting.model, "forward": Session(setting.model, device="cpu", threads=threads)}
    for name, method in setting.methods.items():
        if known.get(name, (None,))[0] != method:
            rewritten = functools.partial(onnx_lrp.rewrite, setting.model, method)
            took = statistics.median(seconds(rewritten) for _ in range(3))
            known[name] = method, took, Session(rewritten().model, device="cpu", threads=threads)
    feeds = dict(setting.feeds)
    calls: dict[str, Call] = {"forward": functools.partial(known["forward"].run, feeds)}
    calls |= {name: functools.partial(known[name][2].run, feeds) for name in setting.methods}
    times = medians(calls, rounds, clock)
    forward = times.pop("forward")
    return Point(setting.at, forward, times, known[next(iter(setting.methods))][1], len(setting.model.graph.node))


def rewritings(sizes: Sequence[int], shrink: int, repeats: int) -> list[Point]:
    """How long chains of Conv and Relu of so many nodes take to be rewritten; all sizes take turns."""
    models = {nodes: chain("Conv", nodes // 2, 16 // min(shrink, 2), 8) for nodes in sizes}
    onnx_lrp.rewrite(models[min(sizes)], PLUS)  # Python and ONNX have then read what they read once
    times: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    for _ in range(repeats):
        for nodes, model in models.items():
            times[nodes].append(seconds(functools.partial(onnx_lrp.rewrite, model, PLUS)))
    return [Point(n, None, {}, statistics.median(found), len(models[n].graph.node)) for n, found in times.items()]


def named(shrink: int, repeats: int) -> dict[str, tuple[int, float]]:
    """Nodes of the networks that issue a limit, and the seconds that rewriting them takes."""
    resnet = network("resnet50", 1, Sizes(shrink=shrink)).write()
    models = {"ResNet-50": (resnet, PLUS), "transformer": (transformer(max(10 // shrink, 1), 64), ATTENTION)}
    found = {}
    for name, (model, method) in models.items():
        rewritten = functools.partial(onnx_lrp.rewrite, model, method)
        rewritten()
        found[name] = len(model.graph.node), statistics.median(seconds(rewritten) for _ in range(repeats))
    return found


SERIES: dict[str, tuple[Series, Callable[[Sequence[int], int], Iterator[Setting]] | None, Sequence[int], Sequence[int]]]
SERIES = {  # what grows, its settings, sizes, and further sizes with --long
    "batch": (
        Series("batch", "Batch", "ResNet-50, 224 × 224", "pictures in a batch"),
        _batches,
        (1, 2, 4, 8, 16, 32),
        (64,),
    ),
    "resolution": (
        Series("resolution", "Resolution", "ResNet-50, batch 1", "height and width in pixels", 2),
        _resolutions,
        (64, 96, 128, 192, 224, 256, 384, 512),
        (768, 1024),
    ),
    "conv": (
        Series("conv", "Depth, convolutions", "Conv 3 × 3 and Relu, 64 channels, 16 × 16", "layers"),
        _chains("Conv"),
        (10, 30, 100, 300, 1000),
        (3000,),
    ),
    "matmul": (
        Series("matmul", "Depth, dense layers", "MatMul and Relu, 256 units, batch 64", "layers"),
        _chains("MatMul"),
        (10, 30, 100, 300, 1000),
        (),
    ),
    "classes": (
        Series("classes", "Classes", "ResNet-50, 224 × 224", "classes of the last layer", 0),
        _classes,
        (10, 100, 1000, 10000),
        (100000,),
    ),
    "steps": (
        Series("steps", "Steps of a path", "ResNet-50, 224 × 224, integrated gradients", "steps"),
        _steps,
        (5, 10, 20, 50, 100),
        (200,),
    ),
    "length": (
        Series("length", "Length of a text", "4 transformer layers of width 256", "tokens"),
        _lengths,
        (16, 32, 64, 128, 256, 512),
        (),
    ),
    "rewriting": (
        Series("rewriting", "Rewriting", "chains of Conv and Relu", "nodes"),
        None,
        (100, 300, 1000, 3000, 10000),
        (30000,),
    ),
}


@dataclass
class Results:
    """All that was measured: series by name, and for named networks their nodes and seconds of rewriting."""

    series: dict[str, Series] = field(default_factory=dict)
    named: dict[str, tuple[int, float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def load(self, path: Path) -> None:
        """Add those of an earlier run.

        Raises:
            SystemExit: the file is missing, or was not written by this benchmark.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for name, series in found["series"].items():
                points = [Point(**point) for point in series.pop("points")]
                self.series[name] = Series(**series, points=points)
            self.named |= {name: tuple(pair) for name, pair in found["named"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} holds no numbers of benchmarks.scaling --json: {error}") from None


def measure(names: Sequence[str], args: argparse.Namespace, results: Results) -> Iterator[str]:
    """Measure series and put them into the results; yield the lines on each as it is done."""
    clock = time.process_time if args.busy else time.perf_counter
    for name in names:
        blank, settings, sizes, longer = SERIES[name]
        wanted = (*sizes, *longer) if args.long else sizes
        wanted = [n for n in wanted if args.most is None or n <= args.most]
        series = Series(name, blank.title, blank.network, blank.axis, blank.power)
        if settings is None:
            series.points = rewritings(wanted, args.shrink, args.rounds)
            results.named = named(args.shrink, args.rounds)
        else:
            known: dict[Any, Any] = {}
            series.points = [
                measured(s, known, args.threads, args.rounds, clock) for s in settings(wanted, args.shrink)
            ]
        results.series[name] = series
        if args.json:  # an interrupt loses one series at most
            results.save(args.json)
        yield from lines_on(series, results.named)


# ---- reporting -------------------------------------------------------------------------------------------------------


def _row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def lines_on(series: Series, networks: Mapping[str, tuple[int, float]]) -> Iterator[str]:
    """The lines on one series: a table with a column for each size, and how fast each row grows at its end."""
    points = series.points
    yield f"\n**{series.title}**: {series.network}\n"
    yield _row(series.axis, [*(f"{p.at:,}" for p in points), "in the end as"])
    yield "| --- |" + " ---: |" * (len(points) + 1)

    def grown(of: Callable[[Point], Any]) -> str:
        varies = len({of(p) for p in points}) > 1
        return f"n^{series.growth(of):.2f}" if varies else ""

    if points[0].forward is not None:
        yield _row("forward, ms", [*(f"{p.forward:.3g}" for p in points), grown(lambda p: p.forward)])
        for method in series.methods:
            cells = [f"{p.explained[method]:.3g}" for p in points]
            yield _row(f"{method}, ms", [*cells, grown(lambda p, method=method: p.explained[method])])
            yield _row("per forward", [*(f"{p.explained[method] / p.forward:.2f}" for p in points), ""])
    yield _row("rewriting, s", [*(f"{p.rewriting:.2f}" for p in points), grown(lambda p: p.rewriting)])
    if points[0].forward is None:
        by_size = {p.at: p.rewriting for p in points}
        if {1000, 10000} <= by_size.keys():
            ratio = by_size[10000] / by_size[1000]
            yield f"\n1,000 → 10,000 nodes: {ratio:.1f} × as long (wanted: at most {STEEPEST:.0f} ×)."
        for name, (nodes, took) in networks.items():
            yield f"{name}, {nodes:,} nodes: {took:.2f} s (wanted: less than {FAST[name]:.0f} s)."


COLOURS = {"forward": "#6b7280", PLUS: "#1d4ed8", GRADIENT: "#d97706", ATTENTION: "#047857", "cp_lrp": "#7c3aed"}
OTHER = "#be123c"


def draw(results: Results) -> bytes:
    """A picture, as PNG: a panel for each series, logarithmic in both axes, with the slope that arithmetic alone has.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("the picture needs matplotlib: pip install onnx-lrp[plot]") from None
    columns = min(4, len(results.series))
    rows = -(-len(results.series) // columns)
    figure = Figure(figsize=(3.9 * columns, 3.5 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, series in itertools.zip_longest(axes, results.series.values()):
        if series is None:
            axis.set_axis_off()
        else:
            _panel(axis, series, results.named)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _panel(axis: Any, series: Series, networks: Mapping[str, tuple[int, float]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    x = [p.at for p in series.points]
    timed = series.points[0].forward is not None
    lines: dict[str, list[float]] = {}
    if timed:
        lines["forward"] = [p.forward or math.nan for p in series.points]
        lines |= {method: [p.explained[method] for p in series.points] for method in series.methods}
    else:
        lines[f"chains, {PLUS}"] = [p.rewriting for p in series.points]
    for name, y in lines.items():
        axis.plot(x, y, "o-", color=COLOURS.get(name, OTHER), label=name, markersize=4, linewidth=1.6)
    axis.set(xscale="log", yscale="log")
    # The slope goes through the last point of the uppermost line, a little above it.
    top = max(lines.values(), key=lambda y: y[-1])
    slope = {0: "constant", 1: "∝ n", 2: "∝ n²"}[series.power]
    guide = [1.35 * top[-1] * (n / x[-1]) ** series.power for n in x]
    axis.plot(x, guide, ":", color="#9ca3af", linewidth=1.4, label=slope, zorder=0)
    if not timed:
        for (name, (nodes, took)), mark in zip(networks.items(), "D^", strict=False):
            axis.plot([nodes], [took], mark, color="#111827", markersize=6, label=name, linestyle="")
    axis.set_title(series.title, fontsize=11, fontweight="bold", loc="left", pad=18)
    axis.text(0, 1.025, series.network, transform=axis.transAxes, fontsize=8, color="#4b5563")
    axis.set_xlabel(series.axis)
    axis.set_ylabel("ms a run" if timed else "s to rewrite")
    plain = FuncFormatter(lambda n, place: f"{n:,.10g}")
    shown = [n for n in x if n not in (96, 192, 224, 384)]
    axis.xaxis.set_major_locator(FixedLocator(shown))
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = min(map(min, lines.values())), max(max(guide), *map(max, lines.values()))
    axis.set_ylim(low / 1.4, high * 1.2 * (high / low) ** 0.5)  # the legend stands above the lines
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 60 else (1,), numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.grid(color="#e5e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=2, columnspacing=1.2, handlelength=1.6)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--series", nargs="*", choices=SERIES, metavar="NAME", help=f"of {', '.join(SERIES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="samples of each number; its median counts")
    parser.add_argument("--busy", action="store_true", help="one thread and its own time, where others run as well")
    parser.add_argument("--long", action="store_true", help="larger sizes too: some take gigabytes and many minutes")
    parser.add_argument("--most", type=int, help="leave out sizes above this")
    parser.add_argument("--shrink", type=int, default=1, help="divide widths and pictures, to try the benchmark itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument(
        "--from", type=Path, nargs="+", default=[], dest="earlier", metavar="FILE", help="numbers of --json"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the series there; needs the extra plot")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    args.threads = 1 if args.busy else args.threads
    results = Results()
    for path in args.earlier:
        results.load(path)
    names = args.series if args.series is not None else [] if args.earlier else list(SERIES)

    def report() -> Iterator[str]:
        yield described(("onnxruntime", "onnx", "torch", "numpy"), args.threads)
        yield f"Medians of {args.rounds}. {command('scaling', given)}"
        for name in [name for name in SERIES if name in results.series]:
            yield from lines_on(results.series[name], results.named)
        yield from measure(names, args, results)

    publish(report(), args.write, "scaling")
    results.series = {name: results.series[name] for name in SERIES if name in results.series}
    if args.json:
        results.save(args.json)
    if args.picture:
        args.picture.write_bytes(draw(results))


if __name__ == "__main__":
    main()
