"""The command ``fastuda``: every command line of the package under one name."""

from __future__ import annotations

import importlib.util
import sys

from fastuda import __version__
from fastuda.cli import run
from fastuda.errors import UserError, nearest

COMMANDS = {
    "train": "train a method; --stages, --seeds and --method a,b train several runs",
    "evaluate": "score a finished run",
    "predict": "label images with a finished run",
    "export": "write a finished run as ONNX, torch.export or safetensors",
    "report": "write report.html of a finished run again",
    "compare": "mean and spread of runs over seeds, as tables and a plot",
    "profile": "time of a training step by part",
    "data": "check, index, copy and draw data sets",
    "env": "versions, devices and usable backends",
    "completion": "a script that completes this command in bash, zsh, fish or tcsh",
}

HELP = """usage: fastuda COMMAND [...]

{commands}

fastuda COMMAND --help shows the options of a command. python -m fastuda.COMMAND is the same command.
fastuda --version prints the version."""


def module(command: str) -> str:
    """Where a command's ``build_parser`` and ``main`` are."""
    path = f"fastuda.{command}"
    spec = importlib.util.find_spec(path)
    return f"{path}.__main__" if spec is not None and spec.submodule_search_locations else path


def main() -> int:
    """Run the module of the command with the arguments that follow it."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:12}{what}" for name, what in COMMANDS.items())))
        return 0 if len(sys.argv) > 1 else 2
    command = sys.argv[1]
    if command == "--version":
        print(f"fastuda {__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    command_module = importlib.import_module(module(command))
    del sys.argv[1]
    return int(command_module.main())


def console() -> None:
    """The console script."""
    run(main)


if __name__ == "__main__":
    console()
