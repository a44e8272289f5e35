"""How fast an explanation is: onnx_lrp next to zennit, captum and torch on one CPU.

    python -m benchmarks.peers --write docs/performance.md

How it is measured: benchmarks.measure.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import MB, Call, command, described, medians, peak, publish

if TYPE_CHECKING:
    import torch

METHODS = ("epsilon_plus", "epsilon")
SWITCHED = "switched"


@dataclass(frozen=True)
class Case:
    """One network in one batch size."""

    name: str
    folder: Path
    batch: int
    threads: int
    size: int
    width: int
    real: bool  # given as a file: there is no torch module for it

    def path(self, method: str | None = None) -> Path:
        """Return the file of the source model, or of the one explained by `method`."""
        return self.folder / (f"{self.name}.onnx" if method is None else f"{self.name}.{method}.onnx")

    def network(self) -> tuple[torch.nn.Module, torch.Tensor]:
        """Build the network in torch, and its batch of pictures."""
        import torch

        from exporters import torch_nets

        torch.set_num_threads(self.threads)
        options: dict[str, Any] = {"width": self.width}
        if self.name.startswith("vgg"):
            options |= {"size": self.size, "hidden": self.width * 64}
        if self.name == "mobilenet":
            options["activation"] = torch.nn.ReLU  # the one that captum knows
        return getattr(torch_nets, self.name)(**options), torch.from_numpy(self.picture())

    def picture(self) -> np.ndarray:
        """Return a batch of random pictures."""
        return np.random.default_rng(0).standard_normal((self.batch, 3, self.size, self.size)).astype(np.float32)


def ort_call(case: Case, method: str | None) -> Call:
    """Return a call of the source model, or of the explained one, with inputs and outputs bound beforehand."""
    import onnxruntime as ort

    from onnx_lrp.runtime import session_options

    # Explained models get the explainer's options, the source model ONNX Runtime's own, which optimize as much.
    options = ort.SessionOptions() if method is None else session_options(case.threads)
    options.intra_op_num_threads = case.threads
    session = ort.InferenceSession(case.path(method), options, providers=["CPUExecutionProvider"])
    given = feeds(case, session)
    binding = session.io_binding()
    for name, x in given.items():
        binding.bind_cpu_input(name, x)
    for output, y in zip(session.get_outputs(), session.run(None, given), strict=True):
        binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(np.array(y)))
    return functools.partial(session.run_with_iobinding, binding)


def feeds(case: Case, session: Any) -> dict[str, np.ndarray]:
    """Return random arrays for the inputs that have no default; open sizes are the batch or the picture's."""
    found = {}
    for node in session.get_inputs():
        shape = [case.batch, *(size if isinstance(size, int) else case.size for size in node.shape[1:])]
        if isinstance(node.shape[0], int) and node.shape[0] != case.batch:
            raise ValueError(f"{case.name} takes batches of {node.shape[0]} only")
        dtype = {"float": "float32", "double": "float64"}.get(node.type[7:-1], node.type[7:-1])  # of tensor(float)
        floats = np.random.default_rng(0).standard_normal(shape)
        found[node.name] = (np.abs(floats * 10) if "int" in node.type else floats).astype(dtype)
    return found


def switched_off_call(case: Case) -> Call:
    """Return a call of the model explained behind its switch, by a client that wants the prediction alone."""
    import onnxruntime as ort

    from onnx_lrp.runtime import session_options

    session = ort.InferenceSession(
        case.path(SWITCHED), session_options(case.threads), providers=["CPUExecutionProvider"]
    )
    given = feeds(case, session) | {"explain": np.array(False)}
    wanted = [session.get_outputs()[0].name]
    return lambda: session.run(wanted, given)


def explainer_call(case: Case) -> Call:
    """Return a call of the explainer as a user would make it."""
    import onnx_lrp

    explainer = onnx_lrp.Explainer(case.path(), METHODS[0], device="cpu", threads=case.threads)
    x = case.picture()
    return lambda: explainer(x)


def torch_forward(case: Case) -> Call:
    """Return a call of the network in torch."""
    import torch

    net, x = case.network()
    return torch.inference_mode()(lambda: net(x))


def torch_gradient(case: Case) -> Call:
    """Return a call for the gradient of the largest logits by the input."""
    import torch

    net, x = case.network()
    net.requires_grad_(False)
    return lambda: torch.autograd.grad(net(x.requires_grad_()).amax(1).sum(), x)


def zennit_call(case: Case) -> Call:
    """Return a call of zennit's EpsilonPlus, for which rules and folds stay in place from call to call."""
    import torch

    from tests.peers.zennit_peer import zennit

    package = zennit()
    net, x = case.network()
    composite = package.composites.EpsilonPlus(canonizers=[package.torchvision.ResNetCanonizer()])
    attributor = package.attribution.Gradient(net, composite)
    attributor.__enter__()

    def seed(logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
        return chosen * logits.detach()

    return lambda: attributor(x, seed)


def captum_call(case: Case) -> Call:
    """Return a call of captum's LRP with the epsilon rule; captum wants the rules set anew for each."""
    from captum.attr import LRP

    from tests.peers.captum_peer import fold_batchnorm, set_rules

    net, x = case.network()
    net = fold_batchnorm(net)
    target = list(range(case.batch))

    def call() -> object:
        set_rules(net, "epsilon")
        return LRP(net).attribute(x.requires_grad_(), target=target)

    return call


@dataclass(frozen=True)
class Engine:
    """One row of the table."""

    title: str
    call: Callable[[Case], Call]
    imports: tuple[str, ...]
    files_too: bool = False  # also measured for models that are given as a file


FORWARD = "forward"
NETS = "exporters.torch_nets"
ORT = ("onnxruntime", "onnx_lrp")
ENGINES = {
    FORWARD: Engine("ONNX Runtime, forward only", lambda case: ort_call(case, None), ORT, files_too=True),
    "epsilon_plus": Engine(
        "**onnx_lrp epsilon_plus**", lambda case: ort_call(case, "epsilon_plus"), ORT, files_too=True
    ),
    "epsilon": Engine("**onnx_lrp epsilon**", lambda case: ort_call(case, "epsilon"), ORT, files_too=True),
    "switched": Engine("onnx_lrp epsilon_plus, switched off", switched_off_call, ORT, files_too=True),
    "explainer": Engine("`Explainer(...)(x)`, epsilon_plus", explainer_call, ORT),
    "torch": Engine("torch, forward only", torch_forward, (NETS,)),
    "gradient": Engine("torch, gradient of the input", torch_gradient, (NETS,)),
    "zennit": Engine("zennit EpsilonPlus", zennit_call, (NETS, "tests.peers.zennit_peer:zennit")),
    "captum": Engine("captum LRP, epsilon", captum_call, (NETS, "captum.attr")),
}


def prepare(case: Case, given: Path | None) -> list[str]:
    """Write the source and the explained models, and return a table row on each rewriting."""
    import onnx_lrp

    if given is not None:
        case.path().symlink_to(given.resolve())
    else:
        from exporters.torch_nets import export

        export(case.network()[0], case.path(), (1, 3, case.size, case.size), folded=True)
    rows = []
    for method in METHODS:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            explained = onnx_lrp.rewrite(case.path(), method)
            seconds.append(time.perf_counter() - start)
        explained.save(case.path(method))
        before, after = (path.stat().st_size / MB for path in (case.path(), case.path(method)))
        rows.append(f"| {case.name} | {method} | {statistics.median(seconds):.2f} | {before:.1f} | {after:.1f} |")
    onnx_lrp.rewrite(case.path(), METHODS[0], switch=True).save(case.path(SWITCHED))
    return rows


def peak_of(case: Case, name: str) -> float | None:
    """Return the engine's peak memory in MB beyond imports, or None where it cannot be told."""
    engine = ENGINES[name]
    return peak(functools.partial(made, case, name), engine.imports, forget=NETS in engine.imports)


def made(case: Case, name: str) -> Call:
    """Return the call of an engine."""
    return ENGINES[name].call(case)


def table(cases: Sequence[Case], rounds: int, with_memory: bool) -> Iterator[str]:
    """Measure one network in several batch sizes, and yield the lines of its table."""
    times, memory = [], []
    chosen = {name: engine for name, engine in ENGINES.items() if engine.files_too or not cases[0].real}
    for case in cases:
        memory.append({name: peak_of(case, name) for name in chosen} if with_memory else {})
        times.append(medians({name: engine.call(case) for name, engine in chosen.items()}, rounds))
    yield "| | " + " | ".join(f"batch {case.batch}: ms | per forward | peak MB" for case in cases) + " |"
    yield "| --- |" + " ---: |" * 3 * len(cases)
    for name, engine in chosen.items():
        cells: list[str] = []
        for found, used in zip(times, memory, strict=True):
            megabytes = "-" if used.get(name) is None else f"{used[name]:.0f}"
            cells += [f"{found[name]:.1f}", f"{found[name] / found[FORWARD]:.2f}", megabytes]
        yield f"| {engine.title} | " + " | ".join(cells) + " |"


def report(args: argparse.Namespace, arguments: Sequence[str]) -> Iterator[str]:
    """Measure everything, and yield the lines of the report."""
    yield described(("onnxruntime", "onnx", "torch", "zennit", "captum", "numpy"), args.threads)
    yield f"Medians of {args.rounds}. Memory is the peak beyond imports; networks given by name have random weights."
    yield command("peers", arguments)
    rewritten = ["\n| network | method | rewriting s | source MB | explained MB |", "| --- | --- |" + " ---: |" * 3]
    files = {Path(path).stem: Path(path) for path in args.onnx}
    for name in [*filter(None, args.models.split(",")), *files]:
        with tempfile.TemporaryDirectory() as folder:
            shared = (args.threads, args.size, args.width, name in files)
            cases = [Case(name, Path(folder), int(batch), *shared) for batch in args.batches.split(",")]
            rewritten += prepare(cases[0], files.get(name))
            yield f"\n**{name}**\n"
            yield from table(cases, args.rounds, not args.no_memory)
    yield from rewritten


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", default="vgg16,resnet50", help="networks of exporters.torch_nets, by commas")
    parser.add_argument("--onnx", action="append", default=[], metavar="PATH", help="a model's file; may be repeated")
    parser.add_argument("--batches", default="1,8", help="a model whose batch is fixed allows no other")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the report between its markers there")
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(given)
    publish(report(args, given), args.write, "peers")


if __name__ == "__main__":
    main()
