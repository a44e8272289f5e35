"""Commands that say what there is: methods, rules, doctor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from onnx_lrp.cli.console import say
from onnx_lrp.cli.options import Commands, command
from onnx_lrp.composite import book_names, read_book
from onnx_lrp.doctor import examine
from onnx_lrp.errors import OnnxLrpError
from onnx_lrp.methods import find_method, method_names, parameters


def register(commands: Commands) -> list[argparse.ArgumentParser]:
    """Add the commands."""
    methods = command(commands, "methods", run_methods, "list the methods")
    rules = command(commands, "rules", run_rules, "list the rule books, or print one as a table")
    rules.add_argument("name", metavar="NAME", nargs="?", help="a rule book by name, or the path of a .toml file")
    doctor = command(commands, "doctor", run_doctor, "look at versions, providers that really load, and conflicts")
    return [methods, rules, doctor]


def run_methods(args: argparse.Namespace) -> int:
    """List the methods."""
    _table([("method", "starts with", "what it is"), *(_method(name) for name in method_names())])
    return 0


def _method(name: str) -> tuple[str, str, str]:
    try:
        method = find_method(name)
    except OnnxLrpError as error:  # one that wants to know more, such as a layer
        return name, "", str(error)
    composite = getattr(method, "composite", None)
    about = composite.title if composite is not None else (type(method).__doc__ or "").strip().splitlines()[0]
    takes = ", ".join(f"{key}={value}" for key, value in parameters(method).items())
    return name, method.start, f"{about} [{takes}]" if takes else about


def run_rules(args: argparse.Namespace) -> int:
    """List the rule books, or print one."""
    if args.name is None:
        _table([("rule book", "what it is"), *((name, read_book(name).title) for name in book_names())])
        return 0
    from onnx_lrp.composite import book_table

    say(str(book_table(read_book(args.name))))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings; the exit code is 1 if something is broken."""
    findings = examine()
    if not args.quiet:
        say(*(str(finding) for finding in findings))
    broken = [finding for finding in findings if finding.broken]
    if not args.quiet:
        say("", f"{len(broken)} problem(s)" if broken else "no problems")
    return 1 if broken else 0


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    say(*("  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows))
