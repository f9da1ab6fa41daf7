"""Compared runs side by side: curves of their score, and predictions of the same images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fastuda.methods import BASELINE
from fastuda.report.charts import Curve, chart
from fastuda.report.facts import Record
from fastuda.report.pictures import names_of, read_pictures

PICTURES = 6
"""Largest number of images to show."""


def curves(runs: Mapping[str, Sequence[Path]], score: str) -> list[Markup]:
    """A chart per method: its score and that of source_only on held-out images during training, as means over
    the runs at the steps that all of them have. A method with fewer than two such steps has no chart.

    Args:
        runs: run folders by method.
        score: for example ``mIoU19``.

    Raises:
        UserError: a run's curves cannot be read.
    """
    lines = {method: _mean(folders, f"val/{score}") for method, folders in runs.items()}
    shown = {method: points for method, points in lines.items() if len(points) > 1}
    base = [Curve(BASELINE, shown[BASELINE])] if BASELINE in shown else []
    return [
        chart(f"{score} of {method}", [Curve(method, points), *base])
        for method, points in shown.items()
        if method != BASELINE or len(shown) == 1
    ]


def _mean(folders: Sequence[Path], name: str) -> list[tuple[float, float]]:
    runs = [dict(Record.read(folder).curves.get(name, ())) for folder in folders]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    return [(step, statistics.fmean(run[step] for run in runs)) for step in steps]


def pictures(runs: Mapping[str, Path], labelled: bool) -> list[dict[str, str]]:
    """Up to :data:`PICTURES` evenly spread images of which every run has a picture, as
    :func:`~fastuda.report.pictures.read_pictures` returns them.

    Args:
        runs: a run folder by method.
        labelled: whether the runs' pictures include the label.

    Raises:
        UserError: a picture cannot be read, or no run wrote it.
    """
    names = sorted(set.intersection(*(set(names_of(folder)) for folder in runs.values())))
    chosen = np.linspace(0, len(names) - 1, min(PICTURES, len(names)), dtype=int)
    return read_pictures(runs, [names[index] for index in chosen], labelled)
