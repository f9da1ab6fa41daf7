"""Runs of several methods and seeds, one after another, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastuda.config.resolve import resolve
from fastuda.config.schema import RunConfig
from fastuda.engine.run import train
from fastuda.engine.trainer import Interrupted
from fastuda.report.comparison import Group, read_groups, write
from fastuda.system.settings import merge

Runs = list[tuple[RunConfig, Path]]
"""Configurations and their run folders."""


def one_of_many(
    source: str | None, flags: dict[str, Any], overrides: dict[str, Any], method: str | None, seed: int | None
) -> RunConfig:
    """Configuration of a run that is compared with others: without its own baseline, unless requested.
    Arguments as of :func:`plan`.

    Raises:
        UserError: a setting is unknown or not allowed.
    """
    chosen = {"method.name": method, "train.seed": seed}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    return resolve(source, flags | chosen, merge({"train": {"baseline": "off"}}, overrides))


def plan(
    methods: Sequence[str | None],
    seeds: Sequence[int | None],
    out: Path,
    source: str | None,
    flags: dict[str, Any],
    overrides: dict[str, Any],
) -> Runs:
    """Configurations of every method with every seed, each with its folder ``out/<method>_<seed>``.

    Args:
        methods: their names; None: the configuration's.
        seeds: None: the configuration's.
        out: the folder of all runs.
        source: a configuration file or the name of a shipped one.
        flags: dotted settings, as for :func:`~fastuda.config.resolve.resolve`.
        overrides: the same, nested; they are applied last.

    Raises:
        UserError: a setting is unknown or not allowed.
    """
    runs = []
    for method in methods:
        for seed in seeds:
            config = one_of_many(source, flags, overrides, method, seed)
            name = str(config.method["name"]).replace(":", ".")
            runs.append((config, out / f"{name}_{config.train.seed}"))
    return runs


def train_grid(runs: Runs, out: Path, *, quiet: bool = False) -> list[Group]:
    """Train all runs, then write their comparison into ``out``. Finished runs are not trained again, and
    interrupted ones are resumed.

    Raises:
        UserError: see :func:`fastuda.engine.run.train`.
        Interrupted: the run was asked to stop; the message names its folder.
    """
    for config, folder in runs:
        try:
            train(config, folder, resume="auto", quiet=quiet)
        except Interrupted as stop:
            raise Interrupted(f"{stop} of {folder}") from stop
    groups = read_groups([out])
    write(groups, out)
    return groups
