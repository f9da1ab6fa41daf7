"""Reads the rows of bench.adaptation and writes the tables of docs/results.md from them."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from fastuda.system.files import written

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
ABOUT = ("method", "settings", "seed", "steps", "minutes", "precision", "machine", "torch", "commit", "date")
SCORE = "mIoU"
NONE = "Not measured.\n"
SHOWN = {"data.source=TARGET": "the target's own labels"}
"""Settings and their text in the table and the picture."""


def load(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV of this bench; none if it belongs to another bench or does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        names = tuple(reader.fieldnames or ())
        return list(reader) if names[: len(ABOUT) + 1] == (*ABOUT, SCORE) else []


def _mean(values: Sequence[float]) -> str:
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def gain(values: Sequence[float], base: Sequence[float]) -> str:
    """Mean difference, with its standard error if both have more than one seed."""
    text = f"{statistics.fmean(values) - statistics.fmean(base):+.1f}"
    if min(len(values), len(base)) < 2:
        return text
    error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (values, base)))
    return f"{text} ± {error:.1f}"


def table(rows: list[dict[str, str]]) -> str:
    """A table with a row per method and settings: mean and standard deviation over the seeds, and the gain
    over source_only with its standard error."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["settings"], row["steps"]), []).append(row)
    names = [name for name in rows[0] if name not in ABOUT]
    head = ("method", "settings", "steps", "seeds", SCORE, "over source_only", *names[1:], "minutes")
    text = f"| {' | '.join(head)} |\n{'|---' * len(head)}|\n"

    def scores(group: list[dict[str, str]], name: str) -> list[float]:
        return [float(row[name]) for row in group]

    order = sorted(groups, key=lambda key: statistics.fmean(scores(groups[key], SCORE)))
    for method, settings, steps in order:
        group = groups[method, settings, steps]
        base = groups.get(("source_only", "", steps), [])
        over = "" if not base or group is base else gain(scores(group, SCORE), scores(base, SCORE))
        seeds = ", ".join(sorted({row["seed"] for row in group}, key=int))
        name = [f"`{method}`", SHOWN.get(settings, settings)]
        cells = [*name, steps, seeds, f"**{_mean(scores(group, SCORE))}**", over]
        cells += [_mean(scores(group, column)) for column in names[1:]]
        text += f"| {' | '.join([*cells, _mean(scores(group, 'minutes'))])} |\n"
    places = {f"{row['machine']}, {row['precision']}, torch {row['torch']}" for row in rows}
    machines = "; ".join(sorted(places))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    return f"{text}\nMachines: {machines}. Commits: {commits}.\n"


def page(text: str) -> str:
    """The text with each table between ``<!-- rows NAME -->`` and ``<!-- end -->`` regenerated from
    ``bench/results/NAME.csv``."""

    def fill(mark: re.Match[str]) -> str:
        rows = load(HERE / "results" / f"{mark[2]}.csv")
        return f"{mark[1]}\n{table(rows) if rows else NONE}\n<!-- end -->"

    return re.sub(r"(<!-- rows ([\w.-]+) -->\n).*?<!-- end -->", fill, text, flags=re.DOTALL)


def write() -> None:
    """Write the tables of docs/results.md.

    Raises:
        UserError: it cannot be written.
    """
    text = page(PAGE.read_text(encoding="utf-8"))
    with written(PAGE) as draft:
        draft.write_text(text, encoding="utf-8")
