"""Whatever is given to the command: one line that says what and how to mend it, an exit code, no half-written file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lrp.cli import main
from onnx_lrp.explainer import Explainer
from tests.small_models import conv, normal

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A folder with a good model and a good input, and nothing more."""
    monkeypatch.chdir(tmp_path)
    onnx.save(conv(), "model.onnx")
    np.save("x.npy", normal(2, 3, 8, 8))


def snapshot():
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


@pytest.fixture
def refused(capsys):
    """Run the command; it must refuse in one line with these words, and leave everything as it was."""

    def run(words, *argv, code=2, lines=1):
        before = snapshot()
        capsys.readouterr()
        assert main([str(a) for a in argv]) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert "internal error" not in printed.err
        assert len(printed.err.splitlines()) == lines, printed.err
        assert all(line.startswith("onnx-lrp: ") for line in printed.err.splitlines())
        assert words in printed.err
        assert snapshot() == before, "no file is written or changed"
        return printed

    return run


def changed(change, name="bad.onnx", **options):
    model = conv(**options)
    change(model)
    Path(name).write_bytes(model.SerializeToString())
    return name


# ---- models --------------------------------------------------------------------------------------------------------

DATA = conv().SerializeToString()
FILES = {
    "half": (DATA[: len(DATA) // 2], "cut short"),
    "less a byte": (DATA[:-1], "cut short"),
    "empty": (b"", "no ONNX model"),
    "text": (b"this is no model\n" * 9, "not an ONNX file"),
    "page": (b"<!DOCTYPE html><html>404</html>", "not an ONNX file"),
    "zeros": (bytes(4096), "not an ONNX file"),
    "noise": (np.random.default_rng(0).bytes(4096), "not an ONNX file"),
}


@pytest.mark.parametrize("command", ["explain", "rewrite", "check", "verify"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_models(refused, command, name):
    content, words = FILES[name]
    Path("bad.onnx").write_bytes(content)
    refused(words, command, "bad.onnx", *(["x.npy"] if command == "explain" else []))


def test_models_that_cannot_be_read(refused):
    os.mkdir("folder.onnx")
    refused("folder.onnx: cannot be read (Is a directory)", "rewrite", "folder.onnx")
    refused("missing.onnx: cannot be read (No such file", "rewrite", "missing.onnx")
    if os.geteuid():  # root reads everything
        Path("model.onnx").chmod(0)
        assert main(["check", "model.onnx"]) == 2
        Path("model.onnx").chmod(0o644)


def version(number):
    return lambda m: setattr(m.opset_import[0], "version", number)


def domain(name):
    return lambda m: setattr(m.opset_import[0], "domain", name)


def unknown(own_domain, imported=True):
    def change(model):
        model.graph.node[1].op_type, model.graph.node[1].domain = "Frobnicate", own_domain
        if own_domain and imported:
            model.opset_import.add(domain=own_domain, version=3)

    return change


def cut_weight(model):
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:40]


MODELS = {
    "opset too new": (version(27), 2, "opset 27 is newer than 26"),
    "opset of the future": (version(99), 2, "opset 99"),
    "opset 0": (version(0), 2, "opset"),
    "domain nobody knows": (domain("com.nobody"), 2, "no ai.onnx opset"),
    "operator nobody knows": (unknown(""), 2, "No Op registered for Frobnicate"),
    "operator of a domain that is not imported": (unknown("com.nobody", imported=False), 2, "com.nobody"),
    "operator of an own domain": (unknown("com.nobody"), 1, "relu (com.nobody.Frobnicate, opset 3)"),
    "IR too new": (lambda m: setattr(m, "ir_version", 99), 2, "ir_version 99"),
    "input of a node missing": (lambda m: m.graph.node[0].input.__setitem__(1, "nope"), 2, "nope"),
    "no output": (lambda m: m.graph.output.__delitem__(0), 2, "no output"),
    "no input": (lambda m: m.graph.input.__delitem__(0), 2, "not a valid ONNX model"),
    "weights cut": (cut_weight, 2, "'w'"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_are_wrong_inside(refused, name):
    change, code, words = MODELS[name]
    changed(change)
    for argv in (("rewrite", "bad.onnx"), ("check", "bad.onnx"), ("explain", "bad.onnx", "x.npy")):
        refused(words, *argv, code=code, lines=2 if code == 1 else 1)


def external(**entries):
    """A model whose weights lie in weights.bin, its references changed."""
    Path("bad.onnx").unlink(missing_ok=True)
    onnx.save_model(conv(), "bad.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load("bad.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)
    Path("bad.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "gone.bin"}, "'gone.bin' is missing"),
        ({"location": "../weights.bin"}, "points outside the model's folder"),
        ({"location": "/etc/passwd"}, "points outside the model's folder"),
        ({"location": "sub/../../weights.bin"}, "points outside the model's folder"),
        ({"offset": "-4"}, "malformed"),
        ({"offset": "abc"}, "malformed"),
        ({"length": "99999999"}, "cut short"),
        ({"length": "4"}, "bad.onnx"),
        ({"offset": "700"}, "cut short"),
    ],
)
def test_external_data(refused, entries, words):
    external(**entries)
    refused(words, "rewrite", "bad.onnx")
    refused(words, "explain", "bad.onnx", "x.npy")


def test_external_data_that_is_cut_short_or_a_folder(refused):
    external()
    data = Path("weights.bin").read_bytes()
    Path("weights.bin").write_bytes(data[:100])
    refused("cut short (100 bytes)", "rewrite", "bad.onnx")
    Path("weights.bin").unlink()
    os.mkdir("weights.bin")
    refused("is missing", "rewrite", "bad.onnx")


def test_external_data_inside_of_branches(refused):
    external(location="../weights.bin")
    tensor = onnx.load("bad.onnx", load_external_data=False).graph.initializer[0]
    helper = onnx.helper
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)], [tensor]
    )

    def change(model):
        model.graph.node.insert(
            0, helper.make_node("If", ["c"], ["unused"], "branches", then_branch=branch, else_branch=branch)
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "c"))

    changed(change)
    refused("points outside the model's folder", "rewrite", "bad.onnx")


# ---- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (normal(8, 8), "wants shape (N, 3, 8, 8), got (8, 8)"),
        (normal(2, 2, 8, 8), "got (2, 2, 8, 8)"),
        (normal(8, 8, 3), "got (1, 8, 8, 3)"),
        (normal(0, 3, 8, 8), "holds nothing"),
        (np.full((1, 3, 8, 8), np.nan), "holds NaN"),
        (np.full((1, 3, 8, 8), np.inf), "infinite"),
        (normal(1, 3, 8, 8).astype(complex), "complex128"),
        (np.full((1, 3, 8, 8), "a"), "numeric array"),
        (np.zeros((1, 3, 8, 8), "datetime64[s]"), "numeric array"),
    ],
)
def test_arrays(refused, array, words):
    np.save("bad.npy", array)
    printed = refused(words, "explain", "model.onnx", "bad.npy")
    assert "bad.npy: input 'x'" in printed.err
    refused(words, "verify", "model.onnx", "bad.npy")


def test_input_files(refused):
    np.savez("name.npz", y=normal(1, 3, 8, 8))
    np.savez("none.npz")
    np.save("objects.npy", np.array([{}, 1], object))
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:300])
    Path("huge.npy").write_bytes(Path("x.npy").read_bytes().replace(b"(2, 3, 8, 8)", b"(9<<20,9999)"))
    for name, content in {
        "no.png": "no picture",
        "a.json": "{",
        "b.json": '["a"]',
        "c.json": "[[1], [1, 2]]",
        "x.xyz": "",
    }.items():
        Path(name).write_text(content)
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:60])
    os.mkdir("empty")
    cases = {
        "name.npz": "no input 'y'; inputs are x",
        "none.npz": "'x' is missing",
        "objects.npy": "not a usable .npy file",
        "cut.npy": "not a usable .npy file",
        "huge.npy": "not a usable .npy file",
        "no.png": "not an image that Pillow can read (unknown format)",
        "cut.png": "not an image",
        "a.json": "not a usable .json file",
        "b.json": "numbers expected",
        "c.json": "unequal length",
        "x.xyz": "unknown kind of input",
        "empty": "no images in this folder",
        "missing.png": "No such file",
        "nul\0.png": "cannot be read",
    }
    for name, words in cases.items():
        refused(words, "explain", "model.onnx", name)
        refused(words, "explain", "model.onnx", "x.npy", name, "-q")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-t", "5"], "0 to 4"),
        (["-t", "-7"], "out of range"),
        (["-t", "99999999999999999999"], "no number"),
        (["-t", "cat"], "no class names"),
        (["-t", ""], "no number"),
        (["-m", "nothing"], "there is no method 'nothing'"),
        (["-m", "epsilon", "-m", "nothing"], "there is no method"),
        (["--output", "nope"], "no tensor named 'nope'"),
        (["--layer", "nope"], "no tensor named 'nope'"),
        (["--input", "nope"], "nope"),
        (["--start", "input"], "'start' is missing"),
        (["--start", "nope"], "invalid choice"),
        (["--device", "cuda"], "CUDA"),
        (["--colormap", "nope"], "diverging"),
        (["--labels", "nope"], "labels cannot be read"),
        (["--threads", "0"], "below 1"),
        (["--threads", "many"], "invalid"),
        (["--batch-size", "-3"], "below 1"),
        (["--frob"], "unrecognized arguments: --frob"),
        (["-o", "out.gif"], ".png, .html, .npz"),
        (["-o", "gone/out.png"], "folder gone is missing"),
        (["-o", "gone/out.npz"], "folder gone is missing"),
        (["-o", "gone/out/"], "folder gone is missing"),
        (["-o", "/proc/out.png"], "cannot be written to"),
        (["-o", "x.npy/out.png"], "is missing"),
    ],
)
def test_options(refused, argv, words):
    refused(words, "explain", "model.onnx", "x.npy", *argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--size", "big"], "pixels, such as 224"),
        (["--size", "99"], "does not fit the model's input"),
        (["--layout", "nhwc"], "give NCHW"),
        (["--color", "gray"], "3 channel"),
        (["--mean", "1,2"], "give 1 or 3"),
        (["--mean", "a"], "give 1 or 3"),
        (["--std", "0"], "above zero"),
        (["--scale", "-1"], "above zero"),
        (["--preprocess", "nope"], "invalid choice"),
        (["-o", "photo.png"], "is an input, which stays as it is"),
    ],
)
def test_options_of_pictures(refused, argv, words):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("photo.png")
    refused(words, "explain", "model.onnx", "photo.png", *argv)


def test_a_model_that_is_explained_already(refused):
    assert main(["rewrite", "model.onnx", "-q"]) == 0
    refused("already explains itself", "rewrite", "model.lrp.onnx")


def test_usage(refused):
    refused("COMMAND", *[])
    refused("invalid choice", "frob")
    refused("INPUT", "explain", "model.onnx")
    refused("the model itself", "rewrite", "model.onnx", "model.onnx")
    refused("a folder; name a file", "rewrite", "model.onnx", ".")
    refused("cannot be written", "rewrite", "model.onnx", "gone/out.onnx")
    refused("cannot be written", "rewrite", "model.onnx", "/proc/out.onnx")
    refused("--target is input, argmax or", "rewrite", "model.onnx", "--target", "x")
    refused("out of range", "rewrite", "model.onnx", "--target", "5")
    refused("no tensor named", "check", "model.onnx", "--layer", "nope", "--json")
    refused("there is no rule book", "rules", "nope")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[assign\n", "bad.toml:1"),
        ('[[assign]]\nrule = "frob"\n', "bad.toml:2: key 'rule'"),
        ('[[assign]]\nwhere = { opp = "Conv" }\nrule = "zplus"\n', "key 'opp'"),
        ('[[assign]]\nrule = "gamma"\ngamma = -1\n', "key 'gamma'"),
        ('[[assign]]\nrule = "gamma"\nepsillon = 1\n', "no parameter 'epsillon'"),
        ('base = "nope"\n', "no rule book 'nope'"),
        ('base = "bad.toml"\n', "its own base"),
        ('title = "x"\nrules = 3\n', "key 'rules'"),
        ("\0", "bad.toml"),
    ],
)
def test_rule_books(refused, text, words):
    Path("bad.toml").write_text(text)
    for argv in (("explain", "model.onnx", "x.npy"), ("check", "model.onnx"), ("rewrite", "model.onnx")):
        refused(words, *argv, "-m", "bad.toml")
    refused(words, "rules", "bad.toml")


def test_rule_books_that_cannot_be_read(refused):
    Path("binary.toml").write_bytes(b"\xff\xfe\x00")
    refused("not a text file", "check", "model.onnx", "-m", "binary.toml")
    refused("No such file", "check", "model.onnx", "-m", "missing.toml")


# ---- writing -------------------------------------------------------------------------------------------------------

OUTPUTS = (
    ("rewrite", "model.onnx", "out.onnx"),
    ("explain", "model.onnx", "x.npy", "-q", "-o", "out.npz"),
    ("explain", "model.onnx", "x.npy", "-q", "-o", "out.png"),
    ("explain", "model.onnx", "x.npy", "-q", "-o", "out/"),
)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("argv", OUTPUTS)
def test_a_folder_that_is_read_only(refused, argv):
    Path().chmod(0o555)
    try:
        refused("ermission denied", *argv)
    finally:
        Path().chmod(0o755)


@pytest.mark.parametrize("argv", OUTPUTS)
def test_a_disk_that_fills_up(argv, tmp_path):
    """The largest file that the process may write is 1000 bytes: the write itself fails, as on a full disk."""
    before = snapshot()
    program = (
        "import resource, sys; from onnx_lrp.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "cannot be written (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert snapshot() == before


@pytest.mark.parametrize("argv", OUTPUTS)
def test_no_space_left(refused, monkeypatch, argv):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    refused("No space left on device", *argv)


def test_an_old_output_survives_a_failure(refused, monkeypatch):
    Path("out.png").write_text("old")
    np.save("bad.npy", np.full((1, 3, 8, 8), np.nan))
    refused("NaN", "explain", "model.onnx", "bad.npy", "-o", "out.png")
    assert Path("out.png").read_text() == "old"


@pytest.mark.parametrize("out", ["out.png", "out.npz", "out/"])
@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupt_in_the_middle(capsys, monkeypatch, out, after):
    for i in range(5):
        np.save(f"{i}.npy", normal(1, 3, 8, 8, seed=i))
    before, runs, run = snapshot(), [], Explainer.__call__

    def interrupted(self, *args, **options):
        if len(runs) == after:
            raise KeyboardInterrupt
        runs.append(1)
        return run(self, *args, **options)

    monkeypatch.setattr(Explainer, "__call__", interrupted)
    assert main(["explain", "model.onnx", *(f"{i}.npy" for i in range(5)), "-o", out, "-q"]) == 130
    err = capsys.readouterr().err
    kept = "in out" if out == "out/" and after else "nothing written"
    assert err == f"onnx-lrp: interrupted: {after} of 5 inputs done, {kept}\n"
    written = sorted(p for p in snapshot() if p not in before)
    if out == "out/" and after:
        assert [p.name for p in written] == ["out", "0.epsilon_plus_flat.png", "1.epsilon_plus_flat.png"]
        for path in written[1:]:
            Image.open(path).verify()
    else:
        assert written == [], "nor a folder made for nothing"


def test_an_interrupt_while_writing(capsys, monkeypatch):
    before = snapshot()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    for argv in OUTPUTS:
        assert main(list(argv)) == 130
        assert capsys.readouterr().err.startswith("onnx-lrp: interrupted")
        assert snapshot() == before
