"""YAML without aliases: read with the file's name in every message, and written in the order of the keys."""

from __future__ import annotations

from typing import Any

import yaml

from fastuda.errors import UserError


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: with them a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; use extends")
        return super().compose_node(parent, index)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        UserError: it is not valid (a date that there is not, say), has aliases, or is nested too deep.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is not valid YAML: {reason}") from error


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(values: dict[str, Any]) -> str:
    """YAML that :func:`read_yaml` reads, in the order of the keys."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
