"""Which ONNX operators compute an adjoint fastest: the measurements that the lowering's choices rest on.

    python -m benchmarks.constructions --write docs/performance.md

Each family is one thing to be computed, with several ways to compute it, at shapes that networks have. Every way is
tried in context: what it reads comes out of a convolution and what it makes goes into one (depthwise 1x1, hardly more
than a pass over memory), so that leaving ONNX Runtime's blocked layout and coming back is paid for. Ways that are not
equal to the first one are refused, not timed. Ways take turns; numbers are medians.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.measure import Call, command, described, publish, samples
from benchmarks.ways import convolutions, elementwise, pooling
from benchmarks.ways.graph import LIMIT, Array, Case, Family, model_of
from onnx_lrp.runtime import session_options

ENOUGH = 0.05  # seconds that a sample lasts at least

FAMILIES = {
    "stride_one": convolutions.STRIDE_ONE,
    "strided": convolutions.STRIDED,
    "depthwise": convolutions.DEPTHWISE,
    "first_back": convolutions.FIRST_BACK,
    "signed_forward": convolutions.SIGNED_FORWARD,
    "max_pool": pooling.MAX_POOL,
    "average_pool": pooling.AVERAGE_POOL,
    "relu": elementwise.RELU,
    "stabilizer": elementwise.STABILIZER,
    "own_share": elementwise.OWN_SHARE,
    "stacked": elementwise.STACKED,
    "dense": elementwise.DENSE,
    "last_axis": elementwise.LAST_AXIS,
    "place_sum": elementwise.PLACE_SUM,
    "broadcast": elementwise.BROADCAST,
}


def bound(model: onnx.ModelProto, given: Mapping[str, Array], threads: int) -> tuple[Call, list[Array]]:
    """A call with inputs and outputs bound beforehand, and what it computes."""
    options = session_options(threads, fixed_batch=True)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(given))
    binding = session.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for output, array in zip(session.get_outputs(), found, strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(np.array(array)))
    return functools.partial(session.run_with_iobinding, binding), found


def difference(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """The largest difference of any output, by its largest element."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


@dataclass
class Row:
    """What was measured of one case.

    Attributes:
        family: title of what is computed.
        case: its shapes.
        used: the way that onnx_lrp takes.
        ms: median of each way that is right, in milliseconds.
        least: its minimum.
        error: what each way differs from the first by, of the largest element; too much for those not timed.
    """

    family: str
    case: str
    used: str
    ms: dict[str, float]
    least: dict[str, float]
    error: dict[str, float]

    @property
    def best(self) -> str:
        """The fastest way."""
        return min(self.ms, key=lambda way: self.ms[way])

    @property
    def lost(self) -> float:
        """How much longer onnx_lrp's way takes, as a ratio."""
        return self.ms[self.used] / self.ms[self.best]


def measured(
    family: Family, case: Case, threads: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Row:
    """Build, compare and time the ways of one case."""
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    expected: list[Array] | None = None
    for way in family.ways:
        built = model_of(family, way, case)
        if built is None:
            continue
        call, found = bound(*built, threads)
        expected = found if expected is None else expected
        errors[way] = difference(found, expected)
        if errors[way] <= family.limits.get(way, LIMIT):
            calls[way] = call
    times = samples(calls, rounds, ENOUGH, clock)
    medians, least = ({way: pick(found) for way, found in times.items()} for pick in (statistics.median, min))
    return Row(family.title, str(case), family.used(case), medians, least, errors)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One family's lines: the fastest way is bold, onnx_lrp's in italics."""
    ways = list(dict.fromkeys(way for row in rows for way in row.error))
    yield f"\n**{rows[0].family}**, ms\n"
    yield "| | " + " | ".join(ways) + " | *onnx_lrp's* / best |"
    yield "| --- |" + " ---: |" * (len(ways) + 1)
    for row in rows:
        cells = []
        for way in ways:
            text = f"{row.ms[way]:.3g}" if way in row.ms else f"off by {row.error[way]:.0e}" if way in row.error else ""
            text = f"*{text}*" if way == row.used else text
            cells.append(f"**{text}**" if way == row.best else text)
        yield f"| {row.case} | " + " | ".join(cells) + f" | {row.lost:.2f} |"


def report(args: argparse.Namespace, arguments: Sequence[str], found: list[Row]) -> Iterator[str]:
    """Measure everything that is not found yet, and yield the lines of the report."""
    clock = time.process_time if args.busy else time.perf_counter
    yield described(("onnxruntime", "onnx", "numpy"), args.threads)
    yield f"Medians of {args.rounds}, in context. {command('constructions', arguments)}"
    for _, rows in itertools.groupby(list(found), lambda row: row.family):
        yield from table(list(rows))
    for name in args.families:
        family = FAMILIES[name]
        rows = [measured(family, case, args.threads, args.rounds, clock) for case in family.cases]
        found += rows
        yield from table(rows)
    yield "\nWhere onnx_lrp's way is not the best by more than 5 %:\n"
    for row in found:
        # One lucky sample makes no winner: both the medians and the minima have to say so.
        if row.lost > 1.05 and row.least[row.used] > 1.05 * row.least[row.best]:
            saved = row.ms[row.used] - row.ms[row.best]
            yield f"- {row.family}; {row.case}: {row.best}, not {row.used}, saves {saved:.2g} ms ({row.lost:.2f} ×)."


def loaded(path: Path) -> list[Row]:
    """The rows that an earlier run wrote.

    Raises:
        SystemExit: the file is missing, or was not written by this benchmark.
    """
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} holds no numbers of benchmarks.constructions --json: {error}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.constructions", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="one thread and its own time, where others run as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument(
        "--from", type=Path, nargs="+", default=[], dest="earlier", metavar="FILE", help="show earlier ones"
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    args.threads = 1 if args.busy else args.threads
    args.families = args.families or ([] if args.earlier else list(FAMILIES))
    found = [row for path in args.earlier for row in loaded(path)]
    publish(report(args, given, found), args.write, "constructions")
    if args.json:
        args.json.write_text(json.dumps([vars(row) for row in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
