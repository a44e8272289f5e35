"""Whole networks: our relevance is zennit's and captum's.

The explained graph is compared in float64, where nothing but the definitions can differ, and in float32 as it is used.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import onnx_lrp
from tests.peers import captum_peer, zennit_peer
from tests.peers.captum_peer import captum_relevance
from tests.peers.networks import NETS, positive_vgg
from tests.peers.zennit_peer import zennit_relevance, zennit_rule
from tests.support import run_double, to_double, worst

if TYPE_CHECKING:
    import torch

pytest.importorskip("torch")

EXACT = 1e-9
ROUNDED = 1e-6  # in float64 too, where folding left constants that were rounded to float32
SINGLE = 1e-4
TARGETS = [3, 7]
BOX = {"low": np.full((1, 3, 1, 1), -5.0, np.float32), "high": np.full((1, 3, 1, 1), 4.0, np.float32)}
SHAPE = (3, 32, 32)


PARITY_NETS = ("vgg", "vgg_batchnorm", "vgg_grouped", "resnet_basic", "resnet_bottleneck", "resnext", "mobilenet")


@functools.cache
def net(name: str) -> torch.nn.Module:
    """Return one network, the same at each call."""
    return NETS[name]()


@functools.cache
def source(name: str, shape: tuple[int, ...] = SHAPE, dynamic_size: bool = False) -> onnx.ModelProto:
    """Return that network as ONNX, its batch norms unfolded and its batch open."""
    from exporters.torch_nets import export

    return export(net(name), None, (1, *shape), dynamic_size=dynamic_size)


@functools.cache
def explained(name: str, method: str, double: bool = True, **options: Any) -> onnx.ModelProto:
    """Return the explained graph of that network, made from its source in float64 or in float32."""
    model = source(name, **options)
    return onnx_lrp.rewrite(to_double(model) if double else model, method).model


def pictures(count: int = len(TARGETS), shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Return random pictures."""
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def flat_blocks() -> np.ndarray:
    """Return pictures of 8x8 blocks of one colour, with colours that are multiples of 1/8."""
    colours = np.random.default_rng(1).integers(-8, 9, (len(TARGETS), 3, 4, 4)) / 8
    return np.kron(colours, np.ones((8, 8))).astype(np.float32)


def box(method: str) -> dict[str, np.ndarray]:
    """Return the additional inputs of `method`."""
    return BOX if method == "epsilon_gamma_box" else {}


def ours_double(model: onnx.ModelProto, x: np.ndarray, method: str) -> np.ndarray:
    """Return our relevance in float64 for `TARGETS`."""
    feeds = {"input": x, "target": np.array(TARGETS)} | box(method)
    return run_double(model, feeds)["relevance/input"]


def ours_single(name: str, x: np.ndarray, method: str, **options: Any) -> np.ndarray:
    """Return our relevance by the explainer, in float32, for `TARGETS`."""
    explainer = onnx_lrp.Explainer(source(name, **options), method, device="cpu", threads=1)
    return explainer({"input": x} | box(method), target=TARGETS).relevance["input"]


def zennits(name: str, x: np.ndarray, method: str, targets: list[int] | None = None) -> np.ndarray:
    """Return zennit's relevance in float64."""
    return zennit_relevance(net(name), x, method, targets or TARGETS, **box(method))


class TestOracles:
    """The oracles themselves, by values worked out by hand and by conservation."""

    X = np.array([[1.0, -2.0, 0.5, 0.0]])
    R = np.array([[1.0, -0.5, 2.0]])

    @staticmethod
    def layer() -> torch.nn.Module:
        """Return a small dense layer."""
        import torch

        layer = torch.nn.Linear(4, 3).double()
        weight = [[0.5, -1, 2, 1], [-1.5, 0.25, 1, -0.5], [1, 1, -1, 0.5]]
        layer.weight.data = torch.tensor(weight, dtype=torch.float64)
        layer.bias.data = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
        return layer

    @pytest.mark.parametrize(
        ("rule", "options", "expected"),
        [
            ("epsilon", {}, [-1.96895264, 3.74182722, 1.25816908, 0]),
            ("epsilon", {"epsilon": 0.25}, [-1.6340556, 3.14989608, 1.07760056, 0]),
            ("epsilon", {"zero_params": "bias"}, [-1.69047501, 3.07142674, 1.11904698, 0]),
            ("zplus", {}, [1.67734921, 0.5555554, -0.2222213, 0]),
            ("alpha_beta", {}, [3.69560735, -0.37525225, -0.84444244, 0]),
            ("gamma", {}, [-1.37366743, 3.15639113, 1.07381991, 0]),
            ("zbox", {"low": np.array(-3.0), "high": np.array(3.0)}, [0.82471768, 0.50118831, 0.75519899, 0.41889479]),
            ("wsquare", {}, [0.32645526, 0.74987207, 1.09898728, 0.27474682]),
            ("flat", {}, [0.62499984] * 4),
        ],
    )
    def test_zennit_rules(self, rule: str, options: dict[str, Any], expected: list[float]) -> None:
        found = zennit_rule(self.layer(), self.X, rule, self.R, **options)
        np.testing.assert_allclose(found, [expected], atol=5e-8)

    @pytest.mark.parametrize(
        ("rule", "options", "expected"),
        [
            ("epsilon", {}, [0.5, 2, 1, 0]),
            ("gamma", {}, [0.566038, 1.811321, 1.132075, 0]),
            ("gamma", {"set_bias_to_zero": True}, [0.580645, 1.858065, 1.16129, 0]),
            ("alpha1_beta0", {}, [1.125, 0, 2.25, 0]),
            ("alpha1_beta0", {"set_bias_to_zero": True}, [1.2, 0, 2.4, 0]),
        ],
    )
    def test_captum_rules(self, rule: str, options: dict[str, Any], expected: list[float]) -> None:
        import torch

        found = captum_relevance(torch.nn.Sequential(self.layer()), self.X, rule, 0, **options)
        np.testing.assert_allclose(found, [expected], atol=5e-7)

    def test_zennit_conserves_without_biases(self) -> None:
        """Only the dense layers' biases and the stabilizers absorb anything, and both are taken away."""
        bare = positive_vgg()
        for layer in bare.classifier:
            if hasattr(layer, "bias"):
                layer.bias.data.zero_()
        relevance = zennit_relevance(bare, pictures(), "epsilon_plus", TARGETS, start="one")
        np.testing.assert_allclose(relevance.sum((1, 2, 3)), 1, rtol=1e-4)

    def test_batch_norms_leave_nothing_behind(self) -> None:
        """Folding by torch and merging by zennit give the same relevance."""
        folded = captum_peer.fold_batchnorm(copy.deepcopy(net("resnet_basic")).double())
        before = zennit_relevance(net("resnet_basic"), pictures(), "epsilon_plus", TARGETS)
        assert worst(zennit_relevance(folded, pictures(), "epsilon_plus", TARGETS), before) < EXACT

    def test_batch_norms_stay_in_the_export(self) -> None:
        nodes = [node for node in source("resnet_bottleneck").graph.node if node.op_type == "BatchNormalization"]
        assert len(nodes) == 13
        assert all(len(node.output) == 1 for node in nodes)


@pytest.mark.parametrize("method", zennit_peer.COMPOSITES)
@pytest.mark.parametrize("name", PARITY_NETS)
class TestZennit:
    """Every composite on every kind of network."""

    def test_double(self, name: str, method: str) -> None:
        x = pictures()
        assert worst(ours_double(explained(name, method), x, method), zennits(name, x, method)) < EXACT

    def test_single_graph_in_double(self, name: str, method: str) -> None:
        x = pictures()
        model = explained(name, method, double=False)
        assert worst(ours_double(model, x, method), zennits(name, x, method)) < ROUNDED

    def test_single(self, name: str, method: str) -> None:
        x = pictures()
        assert worst(ours_single(name, x, method), zennits(name, x, method)) < SINGLE


@pytest.mark.parametrize("method", ["epsilon_plus", "epsilon_alpha2_beta1_flat", "epsilon_gamma_box"])
@pytest.mark.parametrize("name", ["ties", "ties_overlapping"])
class TestTies:
    """Pictures of flat blocks, where many pooling windows have several maxima and the first must win."""

    def test_there_are_ties(self, name: str, method: str) -> None:
        import torch

        layers = net(name)[:2] if name == "ties_overlapping" else net(name).features[:2]
        with torch.no_grad():
            y = layers(torch.as_tensor(flat_blocks()))
        windows = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        tied = (windows == windows.amax(-1, keepdim=True)).sum(-1) > 1
        assert (tied & (windows.amax(-1) > 0)).float().mean() > 0.1

    def test_double(self, name: str, method: str) -> None:
        x = flat_blocks()
        assert worst(ours_double(explained(name, method), x, method), zennits(name, x, method)) < EXACT

    def test_single(self, name: str, method: str) -> None:
        x = flat_blocks()
        assert worst(ours_single(name, x, method), zennits(name, x, method)) < SINGLE


@pytest.mark.parametrize("name", ["vgg", "resnet_basic", "mobilenet"])
class TestBatches:
    """One explained graph for every batch size."""

    def test_a_batch_is_its_samples_one_by_one(self, name: str) -> None:
        x = pictures(5)
        explainer = onnx_lrp.Explainer(source(name), "epsilon_plus", device="cpu", threads=1)
        together = explainer(x)
        for index in range(len(x)):
            alone = explainer(x[index : index + 1])
            assert worst(together.relevance["input"][index], alone.relevance["input"][0]) < 1e-6
            assert together.target[index] == alone.target[0]

    @pytest.mark.parametrize("count", [1, 3])
    def test_any_batch_size_in_double(self, name: str, count: int) -> None:
        x = pictures(count, seed=count)
        feeds = {"input": x, "target": np.arange(count)}
        found = run_double(explained(name, "epsilon_plus"), feeds)["relevance/input"]
        assert worst(found, zennits(name, x, "epsilon_plus", list(range(count)))) < EXACT


class TestSizes:
    """Odd picture sizes, where strides and poolings leave rows and columns over."""

    @pytest.mark.parametrize("method", ["epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1"])
    def test_static(self, method: str) -> None:
        x = pictures(shape=(3, 37, 41))
        model = explained("vgg_odd", method, shape=(3, 37, 41))
        assert worst(ours_double(model, x, method), zennits("vgg_odd", x, method)) < EXACT

    @pytest.mark.parametrize("size", [(37, 41), (32, 32), (45, 34)])
    @pytest.mark.parametrize("method", ["epsilon_plus", "epsilon_plus_flat"])
    @pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "mobilenet"])
    def test_dynamic(self, name: str, method: str, size: tuple[int, int]) -> None:
        x = pictures(shape=(3, *size))
        expected = zennits(name, x, method)
        assert worst(ours_double(explained(name, method, dynamic_size=True), x, method), expected) < EXACT
        assert worst(ours_single(name, x, method, dynamic_size=True), expected) < SINGLE


class TestCaptum:
    """captum's rules, where their definitions meet ours."""

    @pytest.mark.parametrize("name", ["vgg", "vgg_grouped", "resnet_basic", "resnet_bottleneck", "mobilenet_relu"])
    def test_epsilon(self, name: str) -> None:
        x = pictures()
        expected = captum_relevance(net(name), x, "epsilon", TARGETS, epsilon=1e-6, pool_epsilon=1e-30)
        assert worst(ours_double(explained(name, "epsilon"), x, "epsilon"), expected) < EXACT
        assert worst(ours_single(name, x, "epsilon"), expected) < SINGLE

    def test_alpha1_beta0_is_zplus_on_positive_pictures(self) -> None:
        x = np.abs(pictures())
        options = {"epsilon": 1e-6, "pool_epsilon": 1e-30, "rule_on_dense": False}
        expected = captum_relevance(net("vgg_positive"), x, "alpha1_beta0", TARGETS, **options)
        assert worst(ours_double(explained("vgg_positive", "epsilon_plus"), x, "epsilon_plus"), expected) < EXACT

    @pytest.mark.parametrize("name", ["vgg", "resnet_bottleneck"])
    def test_epsilon_as_captum_sets_it(self, name: str, tmp_path: Path) -> None:
        x = pictures()
        expected = captum_relevance(net(name), x, "epsilon", TARGETS, pool_epsilon=1e-30)
        assert worst(by_rule_book(name, x, EPSILON, tmp_path), expected) < EXACT

    def test_gamma_on_positive_pictures(self, tmp_path: Path) -> None:
        """Without biases, on positive inputs, captum's gamma is the generalized one wherever relevance arrives."""
        x = np.abs(pictures())
        options = {"epsilon": 1e-6, "pool_epsilon": 1e-30, "rule_on_dense": False}
        expected = captum_relevance(net("vgg_positive"), x, "gamma", TARGETS, **options)
        assert worst(by_rule_book("vgg_positive", x, GAMMA, tmp_path), expected) < EXACT


def by_rule_book(name: str, x: np.ndarray, book: str, folder: Path) -> np.ndarray:
    """Return our relevance in float64 by a rule book given as text."""
    file = folder / "book.toml"
    file.write_text(book)
    return ours_double(onnx_lrp.rewrite(to_double(source(name)), str(file)).model, x, "")


GAMMA = """
base = "_base"
assign = [
    { where = { op = "Conv", live = 1 }, rule = "gamma", gamma = 0.25 },
    { where = { op = ["Gemm", "MatMul"], live = 1 }, rule = "epsilon", epsilon = 1e-6 },
]
"""
EPSILON = """
base = "_base"
assign = [
    { where = { op = ["Conv", "Gemm", "MatMul"], live = 1 }, rule = "epsilon", epsilon = 1e-9 },
    { where = { op = ["Add", "AveragePool", "GlobalAveragePool"] }, rule = "norm", epsilon = 1e-9 },
]
"""
