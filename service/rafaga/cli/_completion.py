"""`rafaga completion`: a script for the shell, written by shtab from the parsers of all commands."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from rafaga.cli import _parser, _serve
from rafaga.cli._errors import ExitCode, NotInstalled, needed_by
from rafaga.options import Parser

SHELLS = ("bash", "zsh", "fish")

# What an argument's metavar says if it is a path.
_PATHS = ("FILE", "IMAGE", "DIR", "PATH")


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    shell = _own_parser().parse_args(arguments).shell
    with needed_by("rafaga completion", "shtab"):
        import shtab
    parser = _parser.parser(environ, _separate(environ))
    for action in _actions(parser):
        if action.choices is None and any(word in str(action.metavar) for word in _PATHS):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
    print(shtab.complete(parser, shell))
    return ExitCode.OK


def _own_parser() -> Parser:
    parser = Parser(
        prog="rafaga completion",
        usage="rafaga completion bash|zsh|fish",
        description="Prints a script that lets the shell complete commands, options and files.",
        examples=(
            "rafaga completion bash > ~/.local/share/bash-completion/completions/rafaga",
            'rafaga completion zsh > "${fpath[1]}/_rafaga"',
            "rafaga completion fish > ~/.config/fish/completions/rafaga.fish",
        ),
    )
    parser.add_argument_group("input").add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return parser


def _separate(environ: Mapping[str, str]) -> dict[str, Parser]:
    """The parsers of the commands whose extras are installed."""
    found = {"completion": _own_parser()}
    with suppress(NotInstalled):
        found |= {command: _serve.parser(command) for command in ("demo", "serve")}
    with suppress(NotInstalled), needed_by("load", ""):
        from rafaga.load.options import load_parser
        from rafaga.plan.options import plan_parser

        found |= {"load": load_parser(environ), "plan": plan_parser()}
    return found


def _actions(parser: ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
