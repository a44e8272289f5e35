"""Rule books: the bundled ones are complete, conditions mean what they say, mistakes are found where they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lrp import LRP, rewrite
from onnx_lrp.adjoints import OPERATORS
from onnx_lrp.composite import RULES, book_names, book_table, read_book, rules_folder, rules_of
from onnx_lrp.errors import InputError, RuleError, UnsupportedOps
from onnx_lrp.places import kind_of
from tests.layers import Net

NAMES = {"lrp_0", "epsilon", "zplus", "epsilon_plus", "epsilon_plus_flat", "epsilon_gamma_box", "excitation_backprop"}
# No published rule says how their relevance is shared: an error lists such nodes, the gradient methods go through.
WITHOUT_RULE = {"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd"}
WITHOUT_RULE |= {"LpPool", "GlobalLpPool", "CumProd", "Det"}
NAMES |= {
    "zplus_wplus",
    "zplus_wplus_average",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "attnlrp",
    "cp_lrp",
    "captioning",
}


# ---- the bundled books -----------------------------------------------------------------------------------------------


def test_the_published_books_are_there() -> None:
    assert set(book_names()) >= NAMES


@pytest.mark.parametrize("name", book_names())
def test_a_bundled_book_is_complete(name: str) -> None:
    """It has a title and a note, and every operator with an adjoint gets a rule wherever it stands, but for a few."""
    book = read_book(name)
    assert book.name == name
    assert book.title
    assert book.note
    uncovered = {
        op
        for op, operator in OPERATORS.items()
        for live in (1, 2)
        if operator.adjoint is not None and rules_of(book, op, live)[-1][0].startswith("none")
    }
    assert uncovered == WITHOUT_RULE


@pytest.mark.parametrize("name", book_names())
def test_a_bundled_book_prints(name: str) -> None:
    """Title, note, one row per family of operators; no row is wider than a wide terminal."""
    book = read_book(name)
    lines = book_table(book).splitlines()
    assert lines[0] == f"{name}: {book.title}"
    assert lines[1] == book.note
    assert lines[3].split() == ["operator", "rule", "where"]
    assert len(lines) < 44
    assert max(map(len, lines)) < 160
    assert str(book) == book_table(book)
    everything = "\n".join(lines)
    for op in ("Conv", "Gemm", "BatchNormalization", "Mul (two live inputs)", "Add", "MaxPool", "Relu", "Reshape"):
        assert op in everything


@pytest.mark.parametrize("op", ["ReduceL2", "ReduceProd"])
def test_what_has_no_rule_is_listed_and_has_a_gradient(op: str) -> None:
    net = Net()
    x = net("Gemm", net.input("x", "N", 4), net.weight(4, 3))
    model = net.model(net("Tanh", net(op, x, net.const([1], np.int64))))
    with pytest.raises(UnsupportedOps, match=op):
        rewrite(model, "epsilon")
    assert rewrite(model, "gradient").relevance
    assert {row.rule for row in rewrite(model, "gradient").table} == {"gradient"}


def test_every_file_beside_the_books_is_a_book() -> None:
    for path in rules_folder().iterdir():
        assert path.name.endswith(".toml")
        assert read_book(str(path)).assignments


def test_table_of_one_book(tmp_path: Path) -> None:
    """The printed table, whole."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'title = "Mine"\n'
        '[[assign]]\nwhere = { op = "Conv", position = ["first", "preprocessing"] }\nrule = "flat"\n'
        '[[assign]]\nwhere = { op = ["Conv", "Gemm"], live = 1 }\nrule = "gamma"\ngamma = 0.1\n'
        '[[assign]]\nwhere = { op = "Add", producer = ["Relu", "Tanh", "Conv"], name = "x/*" }\nrule = "uniform"\n'
    )
    none = "none: an error lists such nodes"
    assert [re.split(r"  +", line) for line in book_table(read_book(path)).splitlines()] == [
        ["mine: Mine"],
        [""],
        ["operator", "rule", "where"],
        ["Conv (one live input)", "flat", "the first layer"],
        ["", "gamma(gamma=0.1)", "otherwise"],
        ["Conv (two live inputs)", "flat", "before the first layer"],
        ["", none, "otherwise"],
        ["Gemm (one live input)", "gamma(gamma=0.1)"],
        ["Add", "uniform", "fed by Relu, Tanh or Conv, named x/*"],
        ["", none, "otherwise"],
        ["everything else", none],
    ]


def test_every_rule_can_be_named_and_says_what_it_is() -> None:
    for name, make in RULES.items():
        assert make.__doc__, name
        make()


# ---- conditions ------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, *entries: str, head: str = "", name: str = "mine.toml") -> Path:
    """Write a rule book of these entries, and what the nets need besides."""
    path = tmp_path / name
    path.write_text(head + "".join(f"[[assign]]\n{entry}\n" for entry in entries))
    return path


def rules(model: onnx.ModelProto, method: Any) -> dict[str, str]:
    """Return which rule each node takes."""
    return {row.node: row.rule for row in rewrite(model, method).table}


def net_of_five() -> onnx.ModelProto:
    """Preprocessing, three weighted layers, a shortcut around the second, a sum at the end."""
    net = Net()
    x = net("Sub", net.input("x", "N", 4), net.weight(4), name="mean")
    x = net("Mul", x, net.weight(4), name="scale")
    a = net("Relu", net("Gemm", x, net.weight(4, 4), name="stem/1"), name="relu/1")
    b = net("Tanh", net("Gemm", a, net.weight(4, 4), name="body/2"), name="tanh/2")
    x = net("Add", a, b, name="shortcut")
    x = net("Gemm", x, net.weight(4, 3), name="head/3")
    return net.model(net("ReduceSum", x, net.const([1], np.int64), name="sum", keepdims=1))


POSITIONS = {
    'position = "first"': {"stem/1"},
    'position = "last"': {"head/3"},
    'position = "inner"': {"relu/1", "body/2", "tanh/2", "shortcut"},
    'position = "preprocessing"': {"mean", "scale"},
    'position = ["first", "last"]': {"stem/1", "head/3"},
    "depth = 0": {"mean", "scale", "stem/1"},
    "depth = [1, 2]": {"relu/1", "body/2", "tanh/2", "shortcut", "head/3"},
    "depth = 3": {"sum"},
    'name = "body/*"': {"body/2"},
    'name = ["*/1", "s?m"]': {"stem/1", "relu/1", "sum"},
    'op = "Gemm", position = "inner"': {"body/2"},
    'op = ["Add", "Sub"]': {"mean", "shortcut"},
    'kind = "pointwise"': {"relu/1", "tanh/2"},
    'kind = "bilinear"': {"scale", "stem/1", "body/2", "head/3"},
    'kind = ["linear"]': {"mean", "shortcut", "sum"},
    'kind = ["nonlinear", "movement"]': set(),
    'producer = "Relu"': {"body/2", "shortcut"},
    'producer = ["Tanh", "Sub"]': {"shortcut", "scale"},
    'consumer = "Add"': {"relu/1", "tanh/2"},
    'consumer = ["ReduceSum", "Mul"]': {"head/3", "mean"},
    "live = 2": {"shortcut"},
    'live = 1, op = "Add"': set(),
    "": {"mean", "scale", "stem/1", "relu/1", "body/2", "tanh/2", "shortcut", "head/3", "sum"},
}


@pytest.mark.parametrize("where", POSITIONS)
def test_conditions(where: str, tmp_path: Path) -> None:
    """A condition picks the nodes that it describes, and all conditions of an entry must hold."""
    path = write(tmp_path, f'where = {{ {where} }}\nrule = "stop"', 'where = {}\nrule = "gradient"')
    found = rules(net_of_five(), path)
    assert {node for node, rule in found.items() if rule == "stop"} == POSITIONS[where]


def test_without_weighted_layers_nothing_is_preprocessing(tmp_path: Path) -> None:
    net = Net()
    model = net.model(net("Tanh", net("Mul", net.input("x", "N", 4), net.weight(4), name="scale"), name="tanh"))
    entries = [f'where = {{ position = "{p}" }}\nrule = "stop"' for p in ("first", "last", "inner", "preprocessing")]
    path = write(tmp_path, *entries, 'rule = "gradient"')
    assert set(rules(model, path).values()) == {"gradient"}


def test_producers_and_consumers_are_seen_through_what_moves(tmp_path: Path) -> None:
    """A gate may be reshaped on its way."""
    net = Net()
    x = net.input("x", "N", 4)
    gate = net("Reshape", net("Unsqueeze", net("Sigmoid", x), net.const([1], np.int64)), net.const([0, 4], np.int64))
    model = net.model(net("Tanh", net("Flatten", net("Mul", x, gate, name="gated")), name="tanh"))
    entries = ['where = { producer = "Sigmoid", op = "Mul", consumer = "Tanh" }\nrule = "gate"']
    path = write(tmp_path, *entries, head='base = "epsilon"\n')
    assert rules(model, path)["gated"] == "gate"


def test_a_product_of_two_live_tensors_is_no_weighted_layer(tmp_path: Path) -> None:
    net = Net()
    a, b = net.input("a", "N", 3, 4), net.input("b", "N", 4, 2)
    z = net("MatMul", net("MatMul", a, b, name="product"), net.weight(2, 2), name="layer")
    path = write(tmp_path, 'where = { position = "first" }\nrule = "flat"', 'rule = "share"')
    assert rules(net.model(z), path) == {"product": "share", "layer": "flat"}


def test_the_first_match_wins_and_a_base_comes_last(tmp_path: Path) -> None:
    path = write(tmp_path, 'where = { name = "stem/1" }\nrule = "zplus"\nepsilon = 0.5', head='base = "epsilon"\n')
    found = rules(net_of_five(), path)
    assert found["stem/1"] == "zplus(epsilon=0.5)"
    assert found["head/3"] == "epsilon(epsilon=1e-06)"
    assert found["shortcut"] == "norm(epsilon=1e-06)"


def test_a_base_can_lie_beside_the_file(tmp_path: Path) -> None:
    write(tmp_path, 'where = { op = "Gemm" }\nrule = "gamma"\ngamma = 0.5', head='base = "_base"\n', name="house.toml")
    path = write(tmp_path, 'where = { name = "stem/1" }\nrule = "flat"', head='base = "house.toml"\n')
    found = rules(net_of_five(), path)
    assert found["stem/1"] == "flat"
    assert found["body/2"] == "gamma(gamma=0.5)"
    assert found["tanh/2"] == "pass"


def test_nodes_without_a_rule_are_all_listed(tmp_path: Path) -> None:
    path = write(tmp_path, 'where = { op = "Gemm" }\nrule = "epsilon"')
    with pytest.raises(UnsupportedOps, match=r"no entry of 'mine' matches it") as caught:
        rewrite(net_of_five(), path)
    assert {n.name for n in caught.value.nodes} == {"mean", "scale", "relu/1", "tanh/2", "shortcut", "sum"}


def test_parameters_reach_the_rule(tmp_path: Path) -> None:
    entries = ['rule = "zbox"\nlow = [-1.0, -2]\nhigh = 3\nepsilon = 0.25', 'rule = "gate"\ngate = "second"']
    book = read_book(write(tmp_path, *entries))
    assert str(book.assignments[0]) == "zbox(low=(-1.0, -2), high=3, epsilon=0.25)"
    assert "epsilon=0.25" in repr(book.assignments[0].step())
    assert "gate='second'" in repr(book.assignments[1].step())


def test_a_book_is_a_method_by_name_by_path_and_as_an_object(tmp_path: Path) -> None:
    path = write(tmp_path, head='base = "zplus"\n')
    model = net_of_five()
    assert rules(model, "zplus") == rules(model, path) == rules(model, str(path)) == rules(model, LRP(path))
    assert rules(model, LRP(read_book(path))) == rules(model, "zplus")
    with pytest.raises(InputError, match="there is no method 'nope'"):
        rewrite(model, "nope")


# ---- mistakes --------------------------------------------------------------------------------------------------------

HEAD = 'title = "T" # rule = "x"\nnote = """\nrule = 1\n[[assign]]\n"""\n'  # five rows that must not mislead
GOOD = 'where = { op = "Conv" }\nrule = "zplus"\n'
MISTAKES: list[tuple[str, str, int | None, str | None, str]] = [
    ("unknown key", 'titel = "x"\n', 1, "titel", "unknown key; a rule book has title, note, base"),
    ("unknown key at the end", f"[[assign]]\n{GOOD}[extra]\nx = 1\n", 4, "extra", "unknown key"),
    ("title is no text", "title = 3\n", 1, "title", "is text, got 3"),
    ("note is no text", 'title = "t"\nnote = ["a"]\n', 2, "note", "is text"),
    ("folding is no switch", '\nfold_batchnorm = "no"\n', 2, "fold_batchnorm", "is true or false, got 'no'"),
    ("bias is a number", '[[assign]]\nrule = "alpha_beta"\nbias = 0\n', 3, "bias", "is true or false, got 0"),
    ("equal is text", '[[assign]]\nrule = "norm"\nequal_at_zero = ""\n', 3, "equal_at_zero", "is true or false"),
    ("single brackets", '[assign]\nrule = "zplus"\n', 1, "assign", "double brackets"),
    ("entries are no tables", "\nassign = [1, 2]\n", 2, "assign", "double brackets"),
    ("bad TOML", f"[[assign]]\n{GOOD}x = = 1\n", 4, None, "is no valid TOML: Invalid value"),
    ("TOML cut short", f"[[assign]]\n{GOOD}x = [1,\n\n", 4, None, "is no valid TOML"),
    ("key twice", f'[[assign]]\n{GOOD}rule = "flat"\n', 4, None, "is no valid TOML: Cannot overwrite"),
    ("too deep", "x = " + "[" * 9999, 1, None, "is no valid TOML"),
    (
        "unknown rule",
        f'{HEAD}[[assign]]\n{GOOD}[[assign]]\nwhere = {{}}\nrule = "zplusplus"\n',
        11,
        "rule",
        "no rule is called 'zplusplus'; rules are epsilon, lrp_0",
    ),
    ("rule is no text", "[[assign]]\nrule = 7\n", 2, "rule", "no rule is called 7"),
    ("no rule", f'[[assign]]\nwhere = {{ op = "Relu" }}\n[[assign]]\n{GOOD}', 1, "rule", "every entry names its rule"),
    (
        "unknown parameter",
        f"[[assign]]\n{GOOD}[[assign]]  # two\n{GOOD}\n\ngamma = 1\n",
        9,
        "gamma",
        "rule zplus has no parameter 'gamma'; it takes epsilon",
    ),
    ("parameter of a rule without", '[[assign]]\nrule = "stop"\nepsilon = 1\n', 3, "epsilon", "it takes no parameters"),
    (
        "negative number",
        f"[[assign]]\n{GOOD}[[assign]]\n{GOOD}epsilon = -1\n[[assign]]\n{GOOD}epsilon = 1\n",
        7,
        "epsilon",
        "is a number that is not negative, got -1",
    ),
    ("exact is a number", '[[assign]]\nrule = "pass"\nexact = 1\n', 3, "exact", "is true or false, got 1"),
    ("number as text", f'[[assign]]\n{GOOD}epsilon = "1"\n', 4, "epsilon", "got '1'"),
    ("number is true", f"[[assign]]\n{GOOD}epsilon = true\n", 4, "epsilon", "got True"),
    ("number is not a number", f"[[assign]]\n{GOOD}epsilon = nan\n", 4, "epsilon", "got nan"),
    ("number is infinite", f"[[assign]]\n{GOOD}epsilon = inf\n", 4, "epsilon", "got inf"),
    ("number is a list", f"[[assign]]\n{GOOD}epsilon = [1]\n", 4, "epsilon", "is a number"),
    ("alpha and beta", '[[assign]]\nrule = "alpha_beta"\nalpha = 2\nbeta = 0.5\n', 3, "alpha", "alpha - beta = 1"),
    ("beta alone", '[[assign]]\nrule = "alpha_beta"\nbeta = 3\n', 1, "alpha", "got alpha=2.0, beta=3"),
    (
        "bound is text",
        '[[assign]]\nrule = "zbox"\nlow = "inputs"\nhigh = 1\n',
        3,
        "low",
        'a list of numbers or "input"',
    ),
    ("bound is empty", '[[assign]]\nrule = "zbox"\nhigh = []\n', 3, "high", "is a number"),
    ("bound has text", '[[assign]]\nrule = "zbox"\nhigh = [1, "2"]\n', 3, "high", "is a number"),
    ("bounds the wrong way", '[[assign]]\nrule = "zbox"\nlow = 2\nhigh = 1\n', 3, "low", "has to be below high"),
    ("gate", '[[assign]]\nrule = "gate"\ngate = "third"\n', 3, "gate", "is auto, first or second, not 'third'"),
    ("gate is a number", '[[assign]]\nrule = "gate"\ngate = 1\n', 3, "gate", "is auto, first or second"),
    ("constant", '[[assign]]\nrule = "factor"\nconstant = "both"\n', 3, "constant", "is first or second"),
    (
        "unknown condition",
        f'{HEAD}[[assign]]\n\nwhere = {{ opp = "Conv" }}\nrule = "zplus"\n',
        8,
        "opp",
        "unknown condition; there are op, kind",
    ),
    ("where is text", '[[assign]]\nwhere = "Conv"\nrule = "zplus"\n', 2, "where", "is a table such as"),
    ("where in a table", '[[assign]]\nrule = "zplus"\n[assign.where]\nopp = 1\n', 4, "opp", "unknown condition"),
    (
        "unknown operator",
        '[[assign]]\nrule = "zplus"\nwhere = { op = ["Conv", "Conf"] }\n',
        3,
        "op",
        "no operator is called 'Conf'",
    ),
    ("unknown producer", '[[assign]]\nrule = "zplus"\nwhere.producer = "Sigmoyd"\n', 3, "producer", "'Sigmoyd'"),
    (
        "unknown kind",
        '[[assign]]\nwhere = { kind = "lineal" }\nrule = "zplus"\n',
        2,
        "kind",
        "kinds are linear, bilinear",
    ),
    (
        "unknown position",
        '[[assign]]\nwhere = { position = "1st" }\nrule = "zplus"\n',
        2,
        "position",
        "positions are first",
    ),
    (
        "depth is text",
        '[[assign]]\nwhere = { depth = "1" }\nrule = "zplus"\n',
        2,
        "depth",
        "wants whole numbers, got '1'",
    ),
    (
        "live is true",
        '[[assign]]\nwhere = { live = true }\nrule = "zplus"\n',
        2,
        "live",
        "wants whole numbers, got True",
    ),
    ("op is a number", '[[assign]]\nwhere = { op = 1 }\nrule = "zplus"\n', 2, "op", "wants text, got 1"),
    ("op is empty", '[[assign]]\nwhere = { op = [] }\nrule = "zplus"\n', 2, "op", "is an empty list"),
    (
        "entries as a list",
        '\n\nassign = [{ rule = "zplus" }, { rule = "flap" }]\n',
        3,
        "rule",
        "no rule is called 'flap'",
    ),
    ("base is a number", "# base\nbase = 1\n", 2, "base", "is the name of a bundled rule book"),
    ("base is missing", '\nbase = "epsilom"\n', 2, "base", "there is no rule book 'epsilom' beside this file"),
    ("base is missing beside", 'base = "epsilom.toml"\n', 1, "base", "there is no rule book 'epsilom.toml'"),
    ("its own base", 'title = "T"\nbase = "mine.toml"\n', 2, "base", "is its own base"),
]


@pytest.mark.parametrize(("text", "line", "key", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named(text: str, line: int | None, key: str | None, message: str, tmp_path: Path) -> None:
    """File, line and key of the first mistake, on one line, and the error a method gives is the same."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RuleError) as caught:
        read_book(path)
    error = caught.value
    assert message in str(error)
    assert (error.line, error.key) == (line, key)
    assert Path(str(error.file)) == path
    assert str(error).startswith(f"{path}:{line}: ")
    assert "\n" not in str(error)
    with pytest.raises(RuleError, match=r"mine\.toml"):
        rewrite(net_of_five(), path)


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    """However the paths are spelled."""
    a, b, c = (tmp_path / name for name in ("a.toml", "b.toml", "c.toml"))
    a.write_text('base = "b.toml"\n')
    b.write_text('title = "B"\nbase = "./c.toml"\n')
    c.write_text('base = "../' + tmp_path.name + '/a.toml"\n')
    with pytest.raises(
        RuleError, match=r"is its own base \(.*a\.toml -> .*b\.toml -> .*c\.toml -> .*a\.toml\)"
    ) as caught:
        read_book(a)
    assert (Path(str(caught.value.file)).name, caught.value.line, caught.value.key) == ("c.toml", 1, "base")


def test_a_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, 'rule = "nope"', name="house.toml")
    with pytest.raises(RuleError, match=r"house\.toml:2: key 'rule'"):
        read_book(write(tmp_path, head='base = "house.toml"\n'))


def test_files_that_are_no_books(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\x80\x81\xff\x00" * 9)
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    for path, message in (
        (binary, "is not a text file"),
        (folder, r"cannot be read \(Is a directory\)"),
        (tmp_path / "missing.toml", r"cannot be read \(No such file or directory\)"),
        (tmp_path / "missing", r"cannot be read \(No such file or directory\)"),
    ):
        with pytest.raises(RuleError, match=message) as caught:
            read_book(path)
        assert Path(str(caught.value.file)) == path
    assert read_book(empty).assignments == ()
    with pytest.raises(RuleError, match=r"there is no rule book 'nope'; there are attnlrp, .* or give the path of"):
        read_book("nope")


def test_kinds_divide_the_operators() -> None:
    assert kind_of("Reshape") == "movement"
    assert kind_of("MaxPool") == "nonlinear"
    assert kind_of("Nope") == "unknown"
