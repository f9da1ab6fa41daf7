"""Finished runs side by side: mean and spread over seeds, by method and class, as tables and a plot."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastuda.data.domains.open import NO_SPLIT, short_name, source_title
from fastuda.errors import UserError
from fastuda.inference.saved import load_config, read_result
from fastuda.inference.scores import PROTOCOLS
from fastuda.report.charts import Bar, plot
from fastuda.report.rendering import render
from fastuda.report.side_by_side import curves, pictures
from fastuda.report.tables import Cell, Row, Table
from fastuda.system.files import clean, written


@dataclass(frozen=True)
class Group:
    """Runs of one method on one pair of domains."""

    method: str
    domains: str
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    """mIoU and class to the values of the runs, in the order of the seeds; NaN for an absent class."""
    folders: tuple[Path, ...]
    """The runs' folders, in the same order."""
    labelled: bool
    """Whether the held-out images have labels."""

    def mean(self, name: str) -> float:
        """Mean of a score over the runs that have it."""
        values = self._present(name)
        return statistics.fmean(values) if values else math.nan

    def spread(self, name: str) -> float:
        """Standard deviation over the runs; NaN for a single one."""
        values = self._present(name)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def _present(self, name: str) -> list[float]:
        return [value for value in self.scores.get(name, ()) if not math.isnan(value)]

    @property
    def headline(self) -> str:
        """The name of the score over all classes."""
        return next(name for name in self.scores if name.startswith("mIoU"))

    def cell(self, name: str) -> str:
        """``mean`` or ``mean ± spread``; empty if no run has the score."""
        mean, spread = self.mean(name), self.spread(name)
        if math.isnan(mean):
            return ""
        return f"{mean:.1f}" if math.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def read_groups(folders: list[Path], protocol: str | None = None) -> list[Group]:
    """The finished runs under the given folders, grouped by domains and method.

    Args:
        folders: searched for runs at any depth.
        protocol: of the scores, if the target has classes that the runs lack; None: see ``EXAMPLES``.

    Raises:
        UserError: there is none, or one is damaged.
    """
    by_key: dict[tuple[str, str], list[tuple[int, dict[str, Any], Path]]] = {}
    every = [path for folder in folders for path in sorted(folder.rglob("result.json"))]
    # a run counts once, even if a folder and another one inside it are given
    for path in {path.resolve(): path for path in every}.values():
        result = read_result(path)
        config = load_config(path.parent)
        source, target = source_title(config.data.source), short_name(config.data.target)
        key = (f"{source} -> {target} ({result['split']})", config.method["name"])
        by_key.setdefault(key, []).append((config.train.seed, result, path.parent))
    if not by_key:
        raise UserError(f"no finished run under {', '.join(map(str, folders))}: none holds a result.json")
    groups = []
    for (domains, method), runs in by_key.items():
        runs.sort(key=lambda item: item[0])
        beside = [result for key, some in by_key.items() if key[0] == domains for _, result, _ in some]
        own = {result["protocol"] for result in beside}
        chosen = protocol or (own.pop() if len(own) == 1 else PROTOCOLS[0])
        rows = [_scores(result, chosen) for _, result, _ in runs]
        names = list(dict.fromkeys(name for row in rows for name in row))
        values = {name: tuple(row.get(name, math.nan) for row in rows) for name in names}
        differ = any(f"iou_{name}" in result for result in beside for name in PROTOCOLS)
        title = f"{domains}, {chosen}" if differ else domains
        seeds, results, places = zip(*runs, strict=True)
        groups.append(Group(method, title, seeds, values, places, results[0]["split"] != NO_SPLIT))
    return sorted(groups, key=lambda g: (g.domains, g.mean(g.headline)))


def _scores(result: dict[str, Any], protocol: str) -> dict[str, float]:
    """The means and the per-class IoU of one run by one protocol."""
    behind = f"_{protocol}" if f"iou_{protocol}" in result else ""
    means = [name for name in result if name.startswith("mIoU") and "_" not in name]
    return {name: result[name + behind] for name in means} | result["iou" + behind]


def by_domains(groups: list[Group]) -> dict[str, tuple[list[Group], list[str]]]:
    """The groups of every pair of domains, and the names of all their scores."""
    out = {}
    for domains in dict.fromkeys(group.domains for group in groups):
        chosen = [group for group in groups if group.domains == domains]
        out[domains] = chosen, list(dict.fromkeys(name for group in chosen for name in group.scores))
    return out


def markdown(groups: list[Group]) -> str:
    """A table per pair of domains, with methods as rows, and protocols and classes as columns."""
    text = ""
    for domains, (chosen, names) in by_domains(groups).items():
        text += f"## {domains}\n\n| method | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}\n"
        for group in chosen:
            seeds = ", ".join(map(str, group.seeds))
            text += f"| {group.method} | {seeds} | {' | '.join(group.cell(name) for name in names)} |\n"
        text += "\n"
    return text


def page(groups: list[Group]) -> tuple[str, str]:
    """The page and its plot. For every pair of domains the page shows the scores of the methods, also class
    by class, the curves of the score, and predictions of the same images by the first run of each method."""
    sections = []
    for domains, (chosen, names) in by_domains(groups).items():
        protocols = [name for name in names if name.startswith("mIoU")]
        methods = [
            Row(g.method, [Cell(", ".join(map(str, g.seeds))), *(Cell(g.cell(name)) for name in protocols)])
            for g in chosen
        ]
        classes = [Row(name, [Cell(g.cell(name)) for g in chosen]) for name in names if name not in protocols]
        sections.append(
            (
                domains,
                Table(f"Methods, {domains}", [*map(Cell, ("method", "seeds", *protocols))], methods),
                Table(f"Classes, {domains}", [*map(Cell, ("class", *(g.method for g in chosen)))], classes),
                curves({g.method: g.folders for g in chosen}, chosen[0].headline),
                pictures({g.method: g.folders[0] for g in chosen}, chosen[0].labelled),
            )
        )
    bars = [
        Bar(g.domains, g.method, g.mean(g.headline), g.scores[g.headline], g.cell(g.headline)) for g in groups
    ]
    svg = plot(bars)
    return render("comparison.html", title="Comparison", sections=sections, plot=svg), svg


def write(groups: list[Group], out: Path) -> None:
    """Write comparison.csv, .md, .svg and .html into a folder.

    Raises:
        UserError: they cannot be written.
    """
    clean(out)
    path = out / "comparison.csv"
    with written(path, fsync=True) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("domains", "method", "seed", "score", "value"))
        for group in groups:
            for name, values in group.scores.items():
                for seed, value in zip(group.seeds, values, strict=True):
                    writer.writerow((group.domains, group.method, seed, name, value))
    html, svg = page(groups)
    for name, text in (("md", markdown(groups)), ("svg", svg), ("html", html)):
        with written(out / f"comparison.{name}", fsync=True) as draft:
            draft.write_text(text, encoding="utf-8")
