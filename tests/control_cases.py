"""Models with control flow, and inputs that make them take a certain way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from tests.adjoint_tools import network

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """A model with control flow.

    Attributes:
        name: what is special about it.
        signature: inputs => outputs, as for :func:`tests.adjoint_tools.network`; floats are made up.
        body: nodes.
        fed: integers and booleans that are fed.
        lengths: lengths of free axes.
        in_runtime: ONNX Runtime has all its operators in float64.
    """

    name: str
    signature: str
    body: str
    fed: Mapping[str, object] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=lambda: {"N": 2, "T": 4})
    in_runtime: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> onnx.ModelProto:
        return network(self.signature, self.body)

    @property
    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(5)
        feeds = {}
        for info in self.model.graph.input:
            if info.name in self.fed:
                feeds[info.name] = np.asarray(self.fed[info.name])
            else:
                shape = [d.dim_value or self.lengths[d.dim_param] for d in info.type.tensor_type.shape.dim]
                feeds[info.name] = rng.standard_normal(shape)
        return feeds

    @property
    def of_one_sample(self) -> Case:
        """The same with one sample, and sequences of fixed length."""
        signature = self.signature.replace("T,", f"{self.lengths['T']},")
        return replace(self, signature=signature, lengths=self.lengths | {"N": 1})

    @property
    def wanted(self) -> list[str]:
        """Float inputs."""
        return [name for name, x in self.feeds.items() if x.dtype == np.float64]


TWO_WAYS = """
    h = MatMul(x, w)
    r = Relu(h)
    y = If (xc) <
        then_branch = then () => (double[N,4] a) { m = MatMul(r, v)  b = Add(m, bias)  a = Mul(b, h) },
        else_branch = otherwise () => (double[N,4] a) { a = Softplus(r) }
    >
"""
NESTED = """
    h = MatMul(x, w)
    r = Relu(h)
    y, z = If (xc) <
        then_branch = then () => (double[N,4] a, double[N,4] same) {
            m = MatMul(r, v)
            a = If (xd) <
                then_branch = deep () => (double[N,4] c) { d = Sigmoid(m)  c = Mul(d, r) },
                else_branch = shallow () => (double[N,4] c) {
                    k = Constant <value = double {0.5}> ()
                    p = Mul(r, k)
                    c = Add(m, p)
                }
            >
            same = Identity(r)
        },
        else_branch = otherwise () => (double[N,4] a, double[N,4] same) {
            zero = Sub(r, r)
            a = Identity(zero)
            same = Tanh(h)
        }
    >
    q = Concat <axis = 1> (y, z)
"""
NOTHING = """
    h = MatMul(x, w)
    y = If (xc) <
        then_branch = then () => (double[N,4] a) { r = Relu(h)  a = MatMul(r, v) },
        else_branch = otherwise () => (double[N,4] a) { s = Shape(h)  z = ConstantOfShape <value = double[1] {0.25}> (s)
            a = Identity(z) }
    >
    q = Add(y, h)
"""
KNOWN = """
    h = MatMul(x, w)
    s = Shape(h)
    i = Constant <value = int64 {1}> ()
    n = Gather(s, i)
    four = Constant <value = int64 {4}> ()
    c = Equal(n, four)
    y = If (c) <
        then_branch = then () => (double[N,4] a) { r = Relu(h)  m = MatMul(r, v)  a = Add(m, bias) },
        else_branch = otherwise () => (double[N,4,1] a) { k = Constant <value = int64[1] {2}> ()  a = Unsqueeze(h, k) }
    >
    q = Relu(y)
"""
SCAN = """
    q = Sigmoid(xz)
    begin = MatMul(xh, w)
    h, m, ys, zs = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [1, 0],
        scan_output_axes = [1, 0], scan_output_directions = [0, 1], body = step
        (double[N,4] s, double[N,4] t, double[N,3] a, double[N,4] b)
        => (double[N,4] s1, double[N,4] t1, double[N,4] y, double[N,2] z) {
            u = MatMul(s, v)
            i = MatMul(a, k)
            j = Add(i, bias)
            sum = Add(u, j)
            gate = Mul(sum, q)
            s1 = Relu(gate)
            t1 = Add(t, b)
            y = Sub(s1, t)
            z = MatMul(t1, o)
        }
    > (begin, xh, x, xb)
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    y0 = ReduceSum <keepdims = 0> (ys, second)
    z0 = ReduceSum <keepdims = 0> (zs, first)
    all = Concat <axis = 1> (h, m, y0, z0)
"""
SCAN_SIGNATURE = """
    double[N,T,3] x, double[T,N,4] xb, double[N,4] xh, double[N,4] xz, double[4,4] w, double[4,4] v, double[3,4] k,
    double[4] bias, double[4,2] o => double[N,14] all
"""
LOOP = """
    q = Tanh(x)
    begin = MatMul(xh, w)
    h, ys = Loop (TRIPS, GO, begin) <
        body = step (int64 i, bool c, double[N,4] s) => (bool c1, double[N,4] s1, double[N,4] y) {
            u = MatMul(s, w)
            j = MatMul(q, v)
            sum = Add(u, j)
            t = Cast <to = 11> (i)
            one = Constant <value = double {0.5}> ()
            scale = Add(t, one)
            s1 = Mul(sum, scale)
            y = Relu(s1)
            GOES
        }
    >
    first = Constant <value = int64[1] {0}> ()
    all = ReduceSum <keepdims = 0> (ys, first)
    z = Concat <axis = 1> (h, all)
"""
LOOP_SIGNATURE = "double[N,3] x, double[N,4] xh, double[4,4] w, double[3,4] v"
INSIDE = """
    q = Tanh(x)
    trips = Constant <value = int64 {3}> ()
    h = Loop (trips, , xh) <body = step (int64 i, bool c, double[N,4] s) => (bool c1, double[N,4] s1) {
            two = Constant <value = int64 {2}> ()
            odd = Mod(i, two)
            flag = Cast <to = 9> (odd)
            s1 = If (flag) <
                then_branch = then () => (double[N,4] a) { m = MatMul(s, w)  g = MatMul(q, v)  a = Mul(m, g) },
                else_branch = otherwise () => (double[N,4] a) { p = MatMul(q, v)  a = Add(s, p) }
            >
            c1 = Identity(c)
        }
    >
    z = MatMul(h, w)
"""
NESTED_LOOPS = """
    trips = Constant <value = int64 {2}> ()
    begin = ConstantOfShape <value = double[1] {0.5}> (shape)
    h = Scan <num_scan_inputs = 1, body = step (double[2,4] s, double[2,3] a) => (double[2,4] s1) {
            g = MatMul(a, v)
            s1 = Loop (trips, , s) <body = turn (int64 i, bool c, double[2,4] t) => (bool c1, double[2,4] t1) {
                    m = MatMul(t, w)
                    n = Add(m, g)
                    t1 = Tanh(n)
                    c1 = Identity(c)
                }
            >
        }
    > (begin, x)
    z = MatMul(h, w)
"""
NO_STATE = """
    q = Relu(xh)
    ys = Scan <num_scan_inputs = 1, body = step (double[N,3] a) => (double[N,4] y) {
            m = MatMul(a, v)
            y = Mul(m, q)
        }
    > (x)
    first = Constant <value = int64[1] {0}> ()
    z = ReduceSum <keepdims = 0> (ys, first)
"""
PASSED = """
    y, z, last = Scan <num_scan_inputs = 1,
        body = step (double[N,4] s, double[N,4] t, double[N,4] u, double[N,3] a)
        => (double[N,4] s1, double[N,4] t1, double[N,4] u1) {
            s1 = Identity(s)
            t1 = MatMul(a, v)
            zero = Sub(s, s)
            one = Constant <value = double {0.25}> ()
            u1 = Add(one, u)
        }
    > (xh, xh, xh, x)
    q = Concat <axis = 1> (y, z, last)
"""
CONVOLUTION = """
    begin = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (xh, k)
    h = Scan <num_scan_inputs = 1, body = step (double[N,2,5,5] s, double[N,2,5,5] a) => (double[N,2,5,5] s1) {
            c = Conv <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (s, k)
            n = BatchNormalization(c, scale, bias, mean, var)
            r = Relu(n)
            s1 = Add(r, a)
        }
    > (begin, x)
    p = GlobalAveragePool(h)
    f = Flatten(p)
    z = MatMul(f, w)
"""


def _loop(
    name: str, trips: str = "", go: str = "", goes: str = "c1 = Identity(c)", steps: bool = True, **fed: object
) -> Case:
    known = {"three": "trips = Constant <value = int64 {3}> ()\n"}.get(trips, "")
    body = (
        (LOOP if steps else LOOP.replace("N", "2"))
        .replace("TRIPS", "trips" if known else trips)
        .replace("GOES", goes)
        .replace("GO", go)
    )
    inputs = "".join(f", {'int64' if n == 'xm' else 'bool'} {n}" for n in fed)
    signature = f"{LOOP_SIGNATURE}{inputs} => double[N,8] z"
    return Case(f"loop: {name}", signature if steps else signature.replace("N", "2"), known + body, fed)


_EARLY = """
    two = Constant <value = int64 {1}> ()
    c1 = Less(i, two)
"""
_TWO_WAYS = "double[N,3] x, bool xc, double[3,4] w, double[4,4] v, double[4] bias => double[N,4] y"
_NESTED = "double[N,3] x, bool xc, bool xd, double[3,4] w, double[4,4] v => double[N,8] q"
CASES = [
    *(Case(f"if: {way}", _TWO_WAYS, TWO_WAYS, {"xc": way}) for way in (True, False)),
    *(
        Case(f"if: nested, {c}, {d}", _NESTED, NESTED, {"xc": c, "xd": d})
        for c, d in ((True, True), (True, False), (False, True))
    ),
    *(
        Case(f"if: a branch of constants, {way}", _TWO_WAYS.replace(" y", " q"), NOTHING, {"xc": way})
        for way in (True, False)
    ),
    Case("if: condition known", "double[N,3] x, double[3,4] w, double[4,4] v, double[4] bias => double[N,4] q", KNOWN),
    *(Case(f"scan: {steps} steps", SCAN_SIGNATURE, SCAN, lengths={"N": 2, "T": steps}) for steps in (4, 1)),
    Case("scan: no state", "double[T,N,3] x, double[N,4] xh, double[3,4] v => double[N,4] z", NO_STATE),
    Case(
        "scan: states unchanged and forgotten",
        "double[T,N,3] x, double[N,4] xh, double[3,4] v => double[N,12] q",
        PASSED,
    ),
    Case(
        "scan: convolution",
        "double[T,N,2,5,5] x, double[N,2,5,5] xh, double[2,2,3,3] k, double[2] scale, double[2] bias, double[2] mean, "
        "double[2] var, double[2,3] w => double[N,3] z",
        CONVOLUTION,
        in_runtime=False,
    ),
    _loop("known trips", "three"),
    _loop("trips fed", "xm", xm=4),
    _loop("one trip", "xm", xm=1),
    _loop("early exit", "xm", goes=_EARLY, xm=9),
    _loop("no trip count", "", "xg", goes=_EARLY, xg=True),
    _loop("no step, by the count", "xm", steps=False, xm=0),
    _loop("no step, by the condition", "three", "xg", steps=False, xg=False),
    Case("loop: an If inside", f"{LOOP_SIGNATURE} => double[N,4] z", INSIDE),
    Case(
        "scan: a Loop inside",
        "double[T,2,3] x, double[4,4] w, double[3,4] v => double[2,4] z",
        NESTED_LOOPS.replace("begin =", "shape = Constant <value = int64[2] {2, 4}> ()\n    begin ="),
    ),
]
