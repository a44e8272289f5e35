"""What is compared: engines that explain, on the networks that they apply to.

An engine makes a call for a case: a network in one batch size on one device. `TABLE` says which engines belong to which
network; `Engine.beside` says which of ours an engine computes the same as.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

    from benchmarks.networks import Network
    from benchmarks.sizes import Sizes

Array = np.ndarray[Any, Any]
FORWARD, SWITCHED, LEAD = "forward", "switched", "lead"


@dataclass(frozen=True)
class Case:
    """One network in one batch size on one device.

    Attributes:
        name: of `benchmarks.networks.NETWORKS`, or of a file that was given.
        folder: where its files lie.
        batch: samples.
        sizes: of the network.
        threads: of the CPU, for ONNX Runtime and torch alike.
        device: where everything runs.
        dtype: of weights and inputs: ONNX Runtime has no convolutions in float64 on a CPU, torch has.
        fixed: no axis of the files is open; on CUDA their runs are then replayed as CUDA graphs.
        tf32: CUDA may round factors of float32 products to 10 bits, which is ONNX Runtime's default.
        steps: of integrated gradients.
        given: the network is a file: there is no torch module for it.
    """

    name: str
    folder: Path
    batch: int
    sizes: Sizes
    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float16", "float32", "float64"] = "float32"
    fixed: bool = False
    tf32: bool = True
    steps: int = 50
    given: bool = False

    def file(self, method: str = FORWARD) -> Path:
        """Return the file of the source model, or of the one explained by a method."""
        return self.folder / f"{self.name}{f'.{self.batch}' if self.fixed else ''}.{method}.onnx"

    def network(self) -> Network:
        """Build the network in torch, where the case runs."""
        import torch

        from benchmarks.networks import network

        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = True  # ONNX Runtime tries all of cuDNN's algorithms by default, too
        built = network(self.name, self.batch, self.sizes)
        for layer in built.module.modules():
            if isinstance(layer, torch.nn.RNNBase) and self.device == "cuda":
                layer.train()  # cuDNN has no backward pass of them otherwise; there is nothing else that it changes
        return built.to(self.device, getattr(torch, self.dtype))

    def feeds(self) -> dict[str, Array]:
        """Return the inputs, which lie beside the source model."""
        with np.load(self.file().with_suffix(f".{self.batch}.npz")) as found:
            return dict(found)

    def providers(self) -> list[Any]:
        """Return ONNX Runtime's providers."""
        from onnx_lrp.runtime import choose_providers

        first, *rest = choose_providers(self.device)
        if self.device == "cpu":
            return [first]
        return [(first, {"use_tf32": str(int(self.tf32)), "enable_cuda_graph": str(int(self.fixed))}), *rest]


class Bound:
    """Runs of a model whose inputs and outputs lie on the device, bound beforehand."""

    def __init__(self, case: Case, method: str = FORWARD, switched_off: bool = False):
        import onnxruntime as ort

        from onnx_lrp.runtime import session_options

        # Explained models get the explainer's options, the source model ONNX Runtime's own, which optimize as much.
        plain = method == FORWARD
        options = ort.SessionOptions() if plain else session_options(case.threads, fixed_batch=case.fixed)
        options.intra_op_num_threads = case.threads
        session = ort.InferenceSession(case.file(method), options, providers=case.providers())
        if case.device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("the CUDA provider does not load; onnx-lrp doctor says why")
        feeds = case.feeds() | ({"explain": np.array(False)} if switched_off else {})
        self.names = [node.name for node in session.get_outputs()][: 1 if switched_off else None]
        self.binding = session.io_binding()
        for name, array in feeds.items():
            x = ort.OrtValue.ortvalue_from_numpy(array, case.device, 0)
            self.binding.bind_ortvalue_input(name, x)
        for name, shape, dtype in self._shapes(session, feeds):
            y = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, case.device, 0)
            self.binding.bind_ortvalue_output(name, y)
        self.session = session

    def _shapes(self, session: Any, feeds: Mapping[str, Array]) -> list[tuple[str, Sequence[int], Any]]:
        """What the outputs are; a run tells what the model leaves open, but must not be recorded as a CUDA graph."""
        nodes = {node.name: node for node in session.get_outputs()}
        if all(isinstance(length, int) for name in self.names for length in nodes[name].shape):
            return [(name, nodes[name].shape, dtype_of(nodes[name])) for name in self.names]
        found = session.run(self.names, dict(feeds))
        return [(name, y.shape, y.dtype) for name, y in zip(self.names, found, strict=True)]

    def __call__(self) -> None:
        """Run once; it is done when this returns."""
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def found(self) -> Array:
        """Return the relevance that the last run found, or the model's output where there is none."""
        reported = [index for index, name in enumerate(self.names) if name.startswith("relevance/")]
        return self.binding.copy_outputs_to_cpu()[reported[0] if reported else 0]


def dtype_of(node: Any) -> Any:
    """Return numpy's type of an input or output of a session."""
    name = node.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


class Explained:
    """Calls of an explainer, or of what is built on one."""

    def __init__(self, call: Callable[[], Any]):
        self.call, self.last = call, None

    def __call__(self) -> None:
        """Explain once."""
        self.last = self.call()

    def found(self) -> Array:
        """Return the relevance of the first input that has any."""
        explanation = getattr(self.last, "explanation", self.last)
        return next(iter(explanation.relevance.values()))


class Torch:
    """Calls of torch, which have come to their end when they return."""

    def __init__(self, case: Case, call: Callable[[], Any]):
        import torch

        self.call, self.last = call, None
        self.wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None

    def __call__(self) -> None:
        """Run once."""
        self.last = self.call()
        self.wait()

    def found(self) -> Array:
        """Return the tensor that the last call made."""
        assert self.last is not None
        return self.last.detach().float().cpu().numpy()


Runs = Bound | Explained | Torch


def explainer(case: Case) -> Explained:
    """Return calls of the explainer as a user would make them."""
    import onnx_lrp

    made = onnx_lrp.Explainer(case.file(), lead(case), device=case.device, threads=case.threads, **options(lead(case)))
    feeds = case.feeds()
    return Explained(lambda: made(feeds))


def live(case: Case) -> Explained:
    """Return calls for frames as `onnx-lrp live` makes them: cut, scaled, explained by z-plus, drawn."""
    from PIL import Image

    import onnx_lrp
    from onnx_lrp.live import Live
    from onnx_lrp.preprocess import PRESETS

    method = "zplus_wplus"
    made = onnx_lrp.Explainer(case.file(), method, device=case.device, threads=case.threads, **options(method))
    size = case.sizes.picture
    show = Live(made, dataclasses.replace(PRESETS["caffe"], size=size))
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8))
    return Explained(lambda: show(frame))


def torch_forward(case: Case) -> Torch:
    """Return calls of the network in torch."""
    import torch

    net = case.network()
    return Torch(case, torch.inference_mode()(lambda: net.module(*net.feeds.values())))


def torch_gradient(case: Case, *, times_input: bool = False) -> Torch:
    """Return calls for the gradient of the largest outputs, by a tensor that may be multiplied by it."""
    net = case.network()
    return Torch(case, lambda: slope(net, net.module.requires_grad_(False), times_input))


def slope(net: Network, module: torch.nn.Module, times_input: bool) -> torch.Tensor:
    """Return the gradient, times the input; of tokens, the sum over their embedding."""
    import torch

    score, x = net.score(module)
    (found,) = torch.autograd.grad(score.sum(), x)
    found = found * x if times_input else found
    return found if net.embedding is None else found.sum(-1)


def lxt(case: Case, *, cp: bool = False) -> Torch:
    """Return calls of LXT's efficient form: input times a gradient whose backward pass it has changed."""
    from benchmarks.lxt import patched

    net = case.network()
    rules = patched(net.module.requires_grad_(False), cp=cp)
    for name, held in net.held.items():
        setattr(rules, name, held)
    return Torch(case, lambda: slope(net, rules, times_input=True))


def zennit(case: Case, composite: str) -> Torch:
    """Return calls of a composite of zennit's, for which rules and folds stay in place from call to call."""
    import torch

    from tests.peers.zennit_peer import exact_batchnorm, seen_sums
    from tests.peers.zennit_peer import zennit as imported

    package = imported()
    net = case.network()
    (x,) = net.feeds.values()
    box = {}
    if composite == "epsilon_gamma_box":  # that of each sample, as ours takes where nothing is said
        box = {"low": x.amin((1, 2, 3), keepdim=True), "high": x.amax((1, 2, 3), keepdim=True)}
    canonizers = [package.torchvision.ResNetCanonizer()]
    rules = package.composites.COMPOSITES[composite](canonizers=canonizers, **box)
    attributor = package.attribution.Gradient(seen_sums(exact_batchnorm(net.module)), rules)
    attributor.__enter__()

    def seed(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]) * logits.detach()

    return Torch(case, lambda: attributor(x, seed)[1])


def captum_lrp(case: Case) -> Torch:
    """Return calls of captum's LRP with the epsilon rule; captum wants the rules set anew for each."""
    from captum.attr import LRP

    from tests.peers.captum_peer import fold_batchnorm, set_rules

    net = case.network()
    (x,), module = net.feeds.values(), fold_batchnorm(net.module)
    target = module(x).argmax(1)

    def call() -> Any:
        set_rules(module, "epsilon", epsilon=1e-6, pool_epsilon=1e-30)
        return LRP(module).attribute(x.requires_grad_(), target=target)

    return Torch(case, call)


def captum(case: Case, name: str, **options: Any) -> Torch:
    """Return calls of a gradient method of captum's."""
    import captum.attr

    net = case.network()
    (x,) = net.feeds.values()
    target = net.module(x).argmax(1)
    method = getattr(captum.attr, name)(net.module)
    return Torch(case, lambda: method.attribute(x.requires_grad_(), target=target, **options))


def captum_path(case: Case) -> Torch:
    """Return calls of captum's integrated gradients, four steps at a time, as ours."""
    return captum(case, "IntegratedGradients", n_steps=case.steps, internal_batch_size=4 * case.batch)


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
        title: of the row.
        make: makes the calls.
        beside: the engine of ours that it takes turns with; `LEAD`: the first one of the network.
        same: it computes the same as that one.
        torch: it runs in torch.
        slow: only run when it is named, for it takes long or few ask for it.
        batch: the only batch that it takes.
        imports: what is imported before memory is measured.
    """

    title: str
    make: Callable[[Case], Runs]
    beside: str = LEAD
    same: bool = True
    torch: bool = False
    slow: bool = False
    batch: int | None = None
    imports: tuple[str, ...] = ("onnxruntime", "onnx_lrp")


def _peer(
    title: str, beside: str, make: Callable[..., Runs], *imports: str, slow: bool = False, **options: Any
) -> Engine:
    needed = ("benchmarks.networks", *imports)
    made = functools.partial(make, **options)
    return Engine(title, made, beside, torch=True, slow=slow, imports=needed)


def _ours(method: str, slow: bool = False) -> Engine:
    return Engine(f"**onnx_lrp {method}**", functools.partial(Bound, method=method), method, slow=slow)


CAPTUM, ZENNIT = "captum.attr", "tests.peers.zennit_peer:zennit"
ENGINES: dict[str, Engine] = {
    FORWARD: Engine("ONNX Runtime, forward only", Bound, FORWARD),
    **{
        method: _ours(method)
        for method in (
            "epsilon_plus",
            "epsilon_plus_flat",
            "epsilon",
            "epsilon_alpha2_beta1",
            "epsilon_gamma_box",
            "attnlrp",
            "cp_lrp",
            "gradient",
            "input_x_gradient",
        )
    },
    "integrated_gradients": _ours("integrated_gradients", slow=True),
    "zplus_wplus": _ours("zplus_wplus"),
    "zplus_wplus_average": _ours("zplus_wplus_average", slow=True),
    "live": Engine("`onnx-lrp live`, zplus_wplus", live, "zplus_wplus", same=False, batch=1),
    SWITCHED: Engine(
        "onnx_lrp, switched off", functools.partial(Bound, method=SWITCHED, switched_off=True), same=False
    ),
    "explainer": Engine("`Explainer(...)(x)`", explainer),
    "torch": _peer("torch, forward only", FORWARD, torch_forward),
    "torch_gradient": _peer("torch, gradient of the input", "gradient", torch_gradient),
    "torch_input_x_gradient": _peer(
        "torch, gradient times embedding", "input_x_gradient", torch_gradient, times_input=True
    ),
    "zennit_plus": _peer("zennit EpsilonPlus", "epsilon_plus", zennit, ZENNIT, composite="epsilon_plus"),
    "zennit_alpha_beta": _peer(
        "zennit EpsilonAlpha2Beta1", "epsilon_alpha2_beta1", zennit, ZENNIT, composite="epsilon_alpha2_beta1"
    ),
    "zennit_gamma_box": _peer(
        "zennit EpsilonGammaBox", "epsilon_gamma_box", zennit, ZENNIT, slow=True, composite="epsilon_gamma_box"
    ),
    "captum_lrp": _peer("captum LRP, epsilon", "epsilon", captum_lrp, CAPTUM),
    "captum_input_x_gradient": _peer(
        "captum InputXGradient", "input_x_gradient", captum, CAPTUM, name="InputXGradient"
    ),
    "captum_integrated": _peer("captum IntegratedGradients", "integrated_gradients", captum_path, CAPTUM, slow=True),
    "lxt": _peer("LXT AttnLRP, efficient form", "attnlrp", lxt, "benchmarks.lxt"),
    "lxt_cp": _peer("LXT CP-LRP, efficient form", "cp_lrp", lxt, "benchmarks.lxt", cp=True),
}

_EVERYWHERE = (SWITCHED, "explainer", "torch")
_GRADIENTS = ("gradient", "input_x_gradient", "integrated_gradients")
_TORCH_GRADIENTS = ("torch_gradient", "captum_input_x_gradient", "captum_integrated")
_ZENNIT = ("zennit_plus", "zennit_alpha_beta", "zennit_gamma_box")
_CONVOLUTIONAL = (
    *(FORWARD, "epsilon_plus", "epsilon", "epsilon_alpha2_beta1", "epsilon_gamma_box", *_GRADIENTS),
    *(*_EVERYWHERE, *_TORCH_GRADIENTS),
)
_VGG = (*_CONVOLUTIONAL, *_ZENNIT, "captum_lrp", "zplus_wplus", "zplus_wplus_average", "live")
_ATTENTION = (FORWARD, "attnlrp", "cp_lrp", "lxt", "lxt_cp", *_EVERYWHERE)
_RECURRENT = (FORWARD, "epsilon_plus_flat", "epsilon", *_GRADIENTS, *_EVERYWHERE, *_TORCH_GRADIENTS)
# zennit has no rule for a norm that no convolution precedes, as DenseNet's; zennit and captum have none for attention
# and gates, and captum's LRP none for ReLU6; captum differentiates by tensors that are fed, which token ids are not.
TABLE: dict[str, tuple[str, ...]] = {
    "vgg16": _VGG,
    "vgg19": _VGG,
    "resnet50": (*_CONVOLUTIONAL, *_ZENNIT, "captum_lrp"),
    "mobilenet_v2": (*_CONVOLUTIONAL, *_ZENNIT),
    "densenet121": (*_CONVOLUTIONAL, "captum_lrp"),
    "vit": (*_ATTENTION, *_GRADIENTS, *_TORCH_GRADIENTS),
    "minilm": (*_ATTENTION, "input_x_gradient", "torch_input_x_gradient"),
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn": _RECURRENT,
}
_FILES = (FORWARD, "epsilon_plus", "epsilon", SWITCHED)


def engines(case: Case, wanted: Sequence[str] = ()) -> list[str]:
    """Return the names of the engines that apply to a case, in the order of the table; `wanted` chooses among them."""
    row = _FILES if case.given else TABLE[case.name]
    chosen = [name for name in ENGINES if name in row and ENGINES[name].batch in (None, case.batch)]
    return [name for name in chosen if (name in wanted or name == FORWARD if wanted else not ENGINES[name].slow)]


def lead(case: Case) -> str:
    """Return the method that the explainer and the switch are measured with."""
    return next(name for name in (_FILES if case.given else TABLE[case.name]) if name != FORWARD)


def beside(case: Case, engine: str) -> str:
    """Return the engine that one takes turns with."""
    found = ENGINES[engine].beside
    return lead(case) if found == LEAD else found


def options(method: str) -> dict[str, Any]:
    """Return what `onnx_lrp.rewrite` is told besides the method."""
    return {"start": "softmax"} if method.startswith("zplus_") else {}


def spelled(case: Case, method: str) -> str:
    """Return a method as `onnx_lrp.rewrite` takes it."""
    return f"{method}:steps={case.steps}" if method == "integrated_gradients" else method
