"""Resolves a run's configuration from its layers.

Order: dataclass defaults < the method's own defaults < ``--config`` < flags < ``key=value``.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fastuda.config.schema import RunConfig
from fastuda.data.domains.open import only_scenes
from fastuda.errors import UserError, nearest
from fastuda.methods import DEFAULT, get_method
from fastuda.system.settings import build, merge, nest, without
from fastuda.system.yaml import read_yaml


def shipped() -> list[str]:
    """Names of the shipped configurations."""
    folder = resources.files("fastuda.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_yaml(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Load a configuration file, or a shipped one by name, on top of the one that it ``extends``.

    Raises:
        UserError: the file or name does not exist, or is not a YAML dictionary.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"no configuration file {name}")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} cannot be read as a configuration: {error}") from error
    elif name in shipped():
        text = resources.files("fastuda.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"there is no configuration named {name!r}{nearest(name, shipped())}")
    values = read_yaml(text, name) or {}
    if not isinstance(values, dict):
        raise UserError(f"{name} must be a dictionary of sections, got a {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise UserError(f"{name}: extends must be a file or the name of a configuration, got {parent!r}")
    beside = path.parent / parent
    base = str(beside) if beside.is_file() else str(parent)
    if base in above or base == name:
        raise UserError(f"{name} extends {base}, which extends it")
    return merge(load_yaml(base, (*above, name)), values)


def resolve(config: str | None, flags: dict[str, Any], overrides: dict[str, Any]) -> RunConfig:
    """Resolve the configuration of a run.

    Without ``--config``, the shipped configuration ``scenes`` is used if the source is the built-in scenes.

    Raises:
        UserError: an unknown setting, a value of the wrong type, an unknown method.
    """
    user = merge(nest(flags), overrides)
    source = _section(user, "data").get("source", "scenes")
    if config is None and only_scenes(str(source)):
        config = "scenes"
    file = {} if config is None else load_yaml(config)
    of_file, asked = dict(_section(file, "method")), dict(_section(user, "method"))
    for_file = str(of_file.pop("name", DEFAULT))
    name = str(asked.pop("name", for_file))
    methods = _section(file, "methods")
    per_method = _section(methods, name)
    if "+" in name:
        per_method = {part: methods[part] for part in name.split("+") if part in methods}
    file.pop("methods", None)
    if name != for_file:
        of_file = {}  # settings of another method do not apply
    stages = _section(file, "stages")
    if stages:
        # flags and key=value override the stages of the file
        file["stages"] = {
            stage: without(nest(of_stage), user) if isinstance(of_stage, dict) else of_stage
            for stage, of_stage in stages.items()
        }
    over = merge(file, user)
    over["method"] = {**merge(merge(per_method, of_file), asked), "name": name}
    over = merge(nest(dict(get_method(name).optim_defaults)), over)
    run = build(RunConfig, over, "")
    run.method_config()
    return run


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{name} must be a section of settings, got {section!r}")
    return section
