"""YAML without aliases. Errors name the file; keys keep their order."""

from __future__ import annotations

from typing import Any

import yaml

from fastuda.errors import UserError


class _Loader(yaml.SafeLoader):
    """Rejects aliases: with them a few lines can expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; use extends")
        return super().compose_node(parent, index)


def read_yaml(text: str, where: str) -> Any:
    """Parse a YAML text.

    Raises:
        UserError: the text is invalid, has aliases or impossible dates, or is nested too deeply.
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
    """YAML for :func:`read_yaml`, with keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
