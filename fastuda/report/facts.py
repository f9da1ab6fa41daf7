"""The contents of a report: read from the run folder, and measured with its network on a few images."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastuda.ops as F
from fastuda.config.schema import RunConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.run import RunDomains, open_run
from fastuda.data.labels import ClassSet
from fastuda.data.loading.evaluation import eval_loader
from fastuda.errors import UserError
from fastuda.inference.evaluation import feature_statistics
from fastuda.inference.saved import load_run, read_result
from fastuda.inference.scores import class_centre_distance
from fastuda.methods import BASELINE, Method
from fastuda.methods.cycles import Cycles
from fastuda.report.cycles import middle_pair
from fastuda.system.distributed import pick_device

IMAGES = 24
"""Number of images for the class-centre distances."""
BASELINE_LABEL = BASELINE.replace("_", "-")


@dataclass(frozen=True)
class Record:
    """A run folder without its network: the scores and the curves."""

    result: dict[str, Any]
    curves: dict[str, list[tuple[float, float]]]
    """Name to (step, value)."""

    @staticmethod
    def read(folder: Path) -> Record:
        """Raises:
        UserError: the run has not ended, or a file of it cannot be read.
        """
        path = folder / "result.json"
        try:
            result = read_result(path)
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no finished run: it has no result.json") from error
        curves: dict[str, list[tuple[float, float]]] = {}
        path = folder / "metrics.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    curves.setdefault(row["name"], []).append((float(row["step"]), float(row["value"])))
        except FileNotFoundError:
            return Record(result, {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as curves: {error!r}") from error
        return Record(result, curves)

    @property
    def headline(self) -> tuple[str, float]:
        """Name and value of the mIoU over all classes; NaN for a run without held-out labels."""
        name = next(key for key in self.result if key.startswith("mIoU"))
        return name, self.result[name]

    def iou(self, name: str) -> float:
        """IoU of a class; NaN if it neither occurs nor is predicted."""
        return self.result["iou"].get(name, math.nan)

    def median(self, name: str) -> float | None:
        """Median of a curve without its first value, which includes the warm-up."""
        values = [value for _, value in self.curves.get(name, ())]
        return statistics.median(values[1:] or values) if values else None


@dataclass
class Measured:
    """Results that need the network. If the network or the data is not available, ``missing`` says why."""

    classes: ClassSet | None = None
    titles: dict[str, str] = dataclasses.field(default_factory=dict)
    """The titles that the method gives its curves."""
    distances: list[list[float]] = dataclasses.field(default_factory=list)
    """Class-centre distance of every class: the list of the run, then that of its baseline."""
    images: int = 0
    """Number of images that they were measured on."""
    cycles: Cycles | None = None
    pair: tuple[np.ndarray, np.ndarray] | None = None
    """The source and the target image of the cycles, uint8 [H, W, 3]."""
    missing: str = ""


def measure(folder: Path, config: RunConfig, baseline: Path | None, device: str) -> Measured:
    """Class-centre distances of the run and its baseline, and the cycles that the method finds.

    Raises:
        UserError: there is no such device.
    """
    measured = Measured()
    place = pick_device(device)
    try:
        _, method, measured.classes = load_run(folder, place)
        measured.titles = method.titles
        sources, target, held_out = _domains(config, measured.classes)
        chosen = np.linspace(0, len(held_out) - 1, min(IMAGES, len(held_out)), dtype=int).tolist()
        few = dataclasses.replace(held_out, items=[held_out.items[i] for i in chosen])
        measured.images = len(few)
        if few.items:
            measured.distances.append(_distances(method, few, config, place))
        if few.items and baseline is not None:
            measured.distances.append(_distances(load_run(baseline, place)[1], few, config, place))
        *pair, batch = middle_pair(sources[0], target, method.model.input)
        with torch.no_grad():
            measured.cycles = method.explain(batch.to(place))
        measured.pair = pair[0], pair[1]
    except (UserError, torch.OutOfMemoryError) as error:
        measured.missing = str(error).splitlines()[0]
    return measured


def _domains(config: RunConfig, classes: ClassSet) -> RunDomains:
    """Sources, target and held-out images in the run's classes.

    Raises:
        UserError: one does not exist any more, or has other classes.
    """
    domains = open_run(config.data)
    if domains.classes.names != classes.names:
        raise UserError(f"{config.data.source} and {config.data.target} have other classes than the run now")
    return domains


def _distances(method: Method, domain: Domain, config: RunConfig, device: torch.device) -> list[float]:
    total: F.ClassStatistics | None = None
    data = dataclasses.replace(config.data, workers=0)
    with torch.no_grad():
        for image, label, _ in eval_loader(domain, data, method.model.input):
            own = feature_statistics(method, image.to(device), label.to(device), None)
            total = own if total is None else total.merge(own)
    assert total is not None
    return class_centre_distance(total).tolist()
