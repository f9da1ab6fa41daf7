"""Print a script that completes the command fastuda in a shell: bash, zsh or fish.

The script is made from the command lines' own parsers, so that it offers what this version takes."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastuda.cli import parser, run

EXAMPLES = """\
  eval "$(fastuda completion bash)"                       # in ~/.bashrc
  eval "$(fastuda completion zsh)"                        # in ~/.zshrc
  fastuda completion fish > ~/.config/fish/completions/fastuda.fish"""


@dataclass(frozen=True)
class Option:
    """One flag of a command."""

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...]
    """What it takes, where that is a known list."""
    takes: bool
    """Whether a value follows at all."""


@dataclass(frozen=True)
class Command:
    """``fastuda NAME``, or ``fastuda data NAME`` with the name ``data NAME``."""

    name: str
    help: str
    options: tuple[Option, ...]


def known_values() -> dict[str, Sequence[str]]:
    """Values of flags whose parsers do not list them: they are checked later, with better messages."""
    from fastuda.config.resolve import shipped
    from fastuda.data.domains.catalogue import DOMAINS
    from fastuda.methods import METHODS
    from fastuda.models.backbones import BACKBONES

    domains = ("scenes", "folder:", *(f"{name}:" for name in DOMAINS))
    return {
        "--method": tuple(METHODS),
        "--config": tuple(shipped()),
        "--backbone": tuple(BACKBONES),
        "--model": ("auto", "deeplabv2", "daformer"),
        "--source": domains,
        "--target": domains,
        "--device": ("auto", "cpu", "cuda"),
        "--loader": ("auto", "torch", "dali"),
        "--resume": ("auto",),
    }


def commands() -> list[Command]:
    """Every command of :data:`fastuda.__main__.COMMANDS` with its flags."""
    from fastuda.__main__ import COMMANDS, module

    known = known_values()
    out = []
    for name, about in COMMANDS.items():
        p = importlib.import_module(module(name)).build_parser()
        out.append(Command(name, about, tuple(_options(p, known))))
        for action in p._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
                for sub, child in action.choices.items():
                    options = tuple(_options(child, known))
                    out.append(Command(f"{name} {sub}", helps.get(sub, ""), options))
    return out


def _options(p: argparse.ArgumentParser, known: dict[str, Sequence[str]]) -> Iterator[Option]:
    for action in p._actions:
        if action.option_strings:
            names = tuple(action.option_strings)
            values = tuple(map(str, action.choices or ())) or tuple(known.get(names[-1], ()))
            yield Option(names, (action.help or "").split(";")[0], values, action.nargs != 0)


def bash(found: list[Command]) -> str:
    """A completion function, and its registration; zsh runs it through bashcompinit."""
    tops = [command.name for command in found if " " not in command.name]
    nested: dict[str, list[str]] = {}
    for command in found:
        top, _, sub = command.name.partition(" ")
        if sub:
            nested.setdefault(top, []).append(sub)
    values, flags = [], []
    for command in found:
        flags.append(
            f"    '{command.name}') words='{' '.join(n for o in command.options for n in o.names)}' ;;"
        )
        for option in command.options:
            for name in option.names if option.values else ():
                values.append(f"    '{command.name} {name}') words='{' '.join(option.values)}' ;;")
    subs = [f"    '{top}') words='{' '.join(names)}' ;;" for top, names in nested.items()]
    new = "\n"
    return f"""\
_fastuda() {{
  local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{" ".join(tops)}' -- "$cur"))
    return
  fi
  if [ "$COMP_CWORD" -eq 2 ]; then
    case "$command" in
{new.join(subs)}
    esac
  fi
  case "$command" in
    {"|".join(nested)}) [ "$COMP_CWORD" -gt 2 ] && command="$command ${{COMP_WORDS[2]}}" ;;
  esac
  case "$command $prev" in
{new.join(values)}
  esac
  if [ -z "$words" ] && [ "${{cur#-}}" != "$cur" ]; then
    case "$command" in
{new.join(flags)}
    esac
  fi
  if [ -n "$words" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  else
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -o filenames -F _fastuda fastuda
"""


def zsh(found: list[Command]) -> str:
    """The same through zsh's emulation of bash."""
    return "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + bash(found)


def fish(found: list[Command]) -> str:
    """A line per command and flag."""
    tops = [command for command in found if " " not in command.name]
    begin = "complete -c fastuda"
    lines = [f"{begin} -e"]
    for command in tops:
        what = f"-a {command.name} -d {_quoted(command.help)}"
        lines.append(f"{begin} -f -n __fish_use_subcommand {what}")
    for command in found:
        top, _, sub = command.name.partition(" ")
        when = f"__fish_seen_subcommand_from {top}"
        if sub:
            others = " ".join(c.name.partition(" ")[2] for c in found if c.name.startswith(f"{top} "))
            none_yet = _quoted(f"{when}; and not __fish_seen_subcommand_from {others}")
            lines.append(f"{begin} -f -n {none_yet} -a {sub} -d {_quoted(command.help)}")
            when += f"; and __fish_seen_subcommand_from {sub}"
        for option in command.options:
            kinds = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            takes = " -r" if option.takes else ""
            if option.values:
                takes = f" -x -a {_quoted(' '.join(option.values))}"
            lines.append(f"{begin} -n {_quoted(when)}{kinds}{takes} -d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("fastuda.completion", __doc__ or "", EXAMPLES)
    p.add_argument("shell", choices=list(SHELLS), help="the shell")
    return p


def main() -> int:
    """Print the script."""
    args = build_parser().parse_args()
    print(SHELLS[args.shell](commands()), end="")
    return 0


if __name__ == "__main__":
    run(main)
