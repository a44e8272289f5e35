"""The command ``onnx-lrp``: arguments, exit codes, and errors as one line.

Exit codes: 0 done; 1 the answer is no; 2 wrong usage or bad input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from onnx_lrp.cli import benchmark, concepts, evaluate, explain, listings, live, models
from onnx_lrp.cli.console import close_stdout, complain, logs_to_stderr, tolerant_stdout
from onnx_lrp.errors import InputError, OnnxLrpError, UnsupportedOps
from onnx_lrp.rewrite import VERSION

_COMMANDS = (explain, live, concepts, evaluate, benchmark, models, listings)
_NUMERIC = ("--low", "--high", "--mean", "--std", "--against", "--position", "--target", "-t")
# Arguments of the library that its messages speak of, which here are options.
_KEYWORDS = (
    "against|allow_gradient|batch_size|device|inputs|layers|ledger|masks|output|position|shapes|start|target|tokenizer"
)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, too."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code.
    """
    verbose = False
    try:
        tolerant_stdout()
        args = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
        verbose = args.verbose
        with warnings.catch_warnings(), logs_to_stderr(verbose=verbose, quiet=args.quiet):
            warnings.simplefilter("default" if verbose else "ignore")
            code = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        complain("interrupted" + (f": {stop}" if stop.args else ""))
        code = 130
    except UnsupportedOps as error:
        complain(f"{len(error.nodes)} node(s) cannot be explained:", *(f"  {_in_options(str(n))}" for n in error.nodes))
        code = 1
    except OnnxLrpError as error:
        complain(_in_options(str(error)))
        code = 2
    except MemoryError:
        complain("not enough memory; give a smaller --batch-size, fewer inputs, or smaller ones")
        code = 2
    except BrokenPipeError:  # whoever read our output has seen enough
        close_stdout()
        code = 0
    except OSError as error:
        close_stdout()
        complain(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        code = 2
    except Exception as error:
        if verbose:
            traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        complain(f"internal error: {what}; please report it" + ("" if verbose else ", with what -v prints"))
        code = 2
    return code


def _parser() -> argparse.ArgumentParser:
    about = "Explain the predictions of any ONNX model by layer-wise relevance propagation and related methods."
    parser = _Parser(prog="onnx-lrp", description=about)
    parser.add_argument("--version", action="version", version=f"onnx-lrp {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for module in _COMMANDS:
        for command in module.register(commands):
            loud = command.add_mutually_exclusive_group()
            loud.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks")
            loud.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """Arguments with negative numbers tied to their option: argparse takes -2.1,-2.0 for an option of its own."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in _NUMERIC and re.match(r"-[\d.]", word):
            words[-1] += f"={word}" if words[-1].startswith("--") else word
        else:
            words.append(word)
    return words


def _in_options(message: str) -> str:
    """The message with the library's arguments spelled as options: output= becomes --output."""

    def option(match: re.Match[str]) -> str:
        name = {"inputs": "input", "layers": "layer", "masks": "mask", "shapes": "shape"}.get(
            match[1], match[1]
        ).replace("_", "-")
        value = match[2].strip("'")
        return f"--{name}" + (f" {value}" if value not in ("", "True") else "")

    return re.sub(rf"\b({_KEYWORDS})=('[^']*'|True|)", option, message)
