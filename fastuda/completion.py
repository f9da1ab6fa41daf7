"""Print a script that completes the command fastuda in a shell.

The script is generated from the parsers of the commands, so that it fits this version.
It needs the package shtab: pip install "fastuda[completion]"."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from fastuda.cli import parser, run
from fastuda.errors import UserError

EXAMPLES = """\
  eval "$(fastuda completion bash)"                       # in ~/.bashrc
  fastuda completion zsh > ~/.zfunc/_fastuda              # if ~/.zfunc is in fpath
  fastuda completion fish > ~/.config/fish/completions/fastuda.fish"""


def known_values() -> dict[str, Sequence[str]]:
    """Values of flags whose parsers do not list them: they are checked later, with better messages."""
    from fastuda.config.resolve import shipped
    from fastuda.data.domains.catalogue import DOMAINS
    from fastuda.methods import METHODS
    from fastuda.models.backbones import BACKBONES

    domains = ("scenes", "folder", *DOMAINS)
    return {
        "--method": tuple(METHODS),
        "--config": tuple(shipped()),
        "--backbone": tuple(BACKBONES),
        "--source": domains,
        "--target": domains,
        "--device": ("auto", "cpu", "cuda"),
    }


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands, for reading; it is never asked to parse."""
    from fastuda.__main__ import COMMANDS, module

    values = known_values()
    whole = argparse.ArgumentParser("fastuda")
    commands = whole.add_subparsers()
    for name, about in COMMANDS.items():
        own = importlib.import_module(module(name)).build_parser()
        for action in own._actions:
            for flag in action.option_strings:
                action.choices = values.get(flag, action.choices)
        commands.add_parser(name, help=about, parents=[own], add_help=False)
    return whole


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.completion", __doc__ or "", EXAMPLES)
    p.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"], help="the shell")
    return p


def main() -> int:
    """Print the script."""
    args = build_parser().parse_args()
    try:
        import shtab
    except ImportError as error:
        raise UserError('completion needs the package shtab: pip install "fastuda[completion]"') from error
    print(shtab.complete(whole_parser(), shell=args.shell))
    return 0


if __name__ == "__main__":
    run(main)
