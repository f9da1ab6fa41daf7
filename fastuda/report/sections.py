"""The parts of a report as plain values; the templates draw them."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from fastuda.config.schema import RunConfig
from fastuda.data.labels import IGNORE, ClassSet
from fastuda.inference.scores import PROTOCOLS
from fastuda.report.charts import Curve, chart
from fastuda.report.cycles import COUNT, covered_picture, drawing
from fastuda.report.facts import BASELINE_LABEL, Measured, Record
from fastuda.report.pictures import data_uri
from fastuda.report.tables import Cell, Row, Table, difference, number

PROTOCOL_NOTES = {
    "ignore": "pixels of classes that the run lacks left out",
    "confusion19": "predictions on pixels of classes that the run lacks count as errors",
}
"""A note on each protocol, see :class:`fastuda.inference.scores.Scores`."""


class Runs(NamedTuple):
    """The run and, if it was trained, its baseline."""

    method: str
    record: Record
    baseline: Record | None

    @property
    def by_label(self) -> dict[str, Record]:
        """Label to run; the method's run comes first."""
        return {self.method: self.record} | ({BASELINE_LABEL: self.baseline} if self.baseline else {})


def tiles(runs: Runs, config: RunConfig) -> list[tuple[str, str, str]]:
    """Name, number and note of each tile at the top."""
    name, value = runs.record.headline
    where = "no held-out labels" if math.isnan(value) else "on the target's held-out images"
    out = [(name, number(value, ".1f"), where)]
    if runs.baseline is not None:
        base = runs.baseline.headline[1]
        out.append((f"{name}, {BASELINE_LABEL}", number(base, ".1f"), "same network, steps and seed"))
        out.append(("Gain", number(value - base, "+.1f"), f"over {BASELINE_LABEL}"))
    for other in PROTOCOLS:
        if f"{name}_{other}" in runs.record.result:
            out[0] = (name, out[0][1], f"{where}, by {runs.record.result['protocol']}")
            also = number(runs.record.result[f"{name}_{other}"], ".1f")
            out.append((name, also, f"by {other}: {PROTOCOL_NOTES[other]}"))
    precision = "float32" if config.train.amp == "off" else config.train.amp.removeprefix("force-")
    return [*out, ("Steps", str(runs.record.result["step"]), f"seed {config.train.seed}, {precision}")]


def charts(runs: Runs, titles: dict[str, str]) -> list[Markup]:
    """Charts of mIoU, the loss and each of its terms, the other means, and the learning rates."""
    name, curves = runs.record.headline[0], runs.record.curves

    def of_all(key: str) -> list[Curve]:
        return [Curve(label, run.curves.get(key, [])) for label, run in runs.by_label.items()]

    drawn = [chart(f"{name} on held-out images", of_all(f"val/{name}"))]
    if "train/loss" in curves:  # without the baseline, whose loss has other terms
        drawn.append(chart("Loss", [Curve(runs.method, curves["train/loss"])]))
    for key in sorted(key for key in curves if key.startswith("train/") and key != "train/loss"):
        own = key.removeprefix("train/")
        drawn.append(chart(titles.get(own, own.replace("_", " ")), of_all(key)))
    rates = [Curve(key[3:], points) for key, points in curves.items() if key.startswith("lr/")]
    return [figure for figure in (*drawn, chart("Learning rate", rates)) if figure]


def class_table(runs: Runs, classes: ClassSet | None) -> Table:
    """IoU of every class and its mean, compared with the baseline if there is one."""
    names = list(runs.record.result["iou"])
    values = [[run.iou(name) for name in names] + [run.headline[1]] for run in runs.by_label.values()]
    return _class_table("IoU in percent", runs, [*names, runs.record.headline[0]], values, classes, 1, 1)


def distance_table(runs: Runs, measured: Measured) -> Table | None:
    """Class-centre distances in the same form; None if they were not measured."""
    if not measured.distances or measured.classes is None:
        return None
    values = [[*column, _mean(column)] for column in measured.distances]
    names = [*measured.classes.names, "mean"]
    return _class_table("Distance", runs, names, values, measured.classes, 2, -1)


def _class_table(
    label: str,
    runs: Runs,
    names: list[str],
    values: list[list[float]],
    classes: ClassSet | None,
    digits: int,
    sign: int,
) -> Table:
    """A row per name, the last one in the foot, with bars and numbers of the run and then of the baseline.
    ``sign`` says whether more is better (1) or worse (-1)."""
    colours = dict(zip(classes.names, classes.palette, strict=True)) if classes else {}
    longest = max((v for column in values for v in column if not math.isnan(v)), default=1.0) or 1.0
    full = 100.0 if sign > 0 else longest
    rows = []
    for name, *row in zip(names, *values, strict=True):
        cells = [Cell(number(value, f".{digits}f")) for value in row]
        if len(row) == 2:
            cells.append(difference(row[0] - row[1], digits, sign))
        bars = tuple(0.0 if math.isnan(value) else 100 * value / full for value in row)
        rows.append(Row(name, cells, colours.get(name), bars))
    keys = [Cell(key, f"c{i}") for i, key in enumerate(list(runs.by_label)[: len(values)])]
    heads = [Cell(label), *keys, *([Cell("difference")] if len(values) == 2 else [])]
    return Table(label, heads, rows[:-1], rows[-1])


def _mean(values: list[float]) -> float:
    present = [value for value in values if not math.isnan(value)]
    return statistics.fmean(present) if present else math.nan


def cycles(measured: Measured) -> dict[str, Any] | None:
    """The cycles between two images, and the target pixels that they cover; None if there are none."""
    found, classes, pair = measured.cycles, measured.classes, measured.pair
    if found is None or classes is None or pair is None:
        return None
    covered = int((found.covered != IGNORE).sum())
    return {
        "drawing": drawing(found, classes, *pair),
        "picture": data_uri(covered_picture(found, pair[1], classes), photo=True),
        "most": COUNT,
        "valid": int(found.valid.sum()),
        "closed": int(found.closed.sum()),
        "covered": covered,
        "pixels": len(found.covered),
        "share": 100 * covered / len(found.covered),
    }


def speed(runs: Runs, config: RunConfig) -> Table:
    """Medians of time and memory over the run."""
    columns = []
    for run in runs.by_label.values():
        step, wait, peak = (run.median(f"perf/{key}") for key in ("step_s", "data_s", "peak_mib"))
        processes = int(run.result["processes"])
        pairs = config.data.batch_size * config.train.accumulate * processes
        share = 100 * wait / step if step and wait is not None else None
        columns.append(
            {
                "Step (median)": _with_unit(step, ".3g", "s"),
                "Image pairs per second": number(pairs / step if step else None, ".3g"),
                "Share of a step that waits for data": _with_unit(share, ".0f", "%"),
                "Peak memory of a process": _with_unit(peak, ".0f", "MiB"),
                "Processes": str(processes),
            }
        )
    rows = [Row(name, [Cell(column[name]) for column in columns]) for name in columns[0]]
    return Table("Speed and memory", [Cell(""), *map(Cell, runs.by_label)], rows)


def _with_unit(value: float | None, spec: str, unit: str) -> str:
    return number(value, spec) if value is None else f"{value:{spec}} {unit}"


def files(folder: Path) -> list[tuple[str, str]]:
    """Title and text of the run's own files: versions, hardware, ops, configuration."""
    texts = {}
    for name in ("env.txt", "config.yaml"):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            texts[name] = ""
    environment, _, ops = texts["env.txt"].partition("ops:\n")
    parts = {
        "Versions, hardware, and what can run": environment,
        "Ops and their implementations": ops,
        "Configuration": texts["config.yaml"],
    }
    return [(title, text) for title, text in parts.items() if text]
