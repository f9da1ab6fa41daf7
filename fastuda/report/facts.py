"""What a report shows: read from the run folder, and measured with its network on a few images."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastuda.ops as F
from fastuda.config.schema import RunConfig
from fastuda.data.domains.decode import open_rgb
from fastuda.data.domains.domain import Domain
from fastuda.data.domains.open import open_domain, share_classes
from fastuda.data.labels import ClassSet
from fastuda.data.loading.evaluation import eval_loader
from fastuda.errors import UserError
from fastuda.inference.evaluation import feature_statistics
from fastuda.inference.saved import load_run, read_result
from fastuda.inference.scores import class_centre_distance
from fastuda.methods import Method
from fastuda.report.cycles import Cycles, cycles, find_plca
from fastuda.system import distributed

WIDTH = 512
"""Largest width of an embedded picture."""
IMAGES = 24
"""Images whose features the class-centre distances are of."""
BASELINE = "source-only"


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
        """Of a class; NaN where it neither occurs nor is predicted."""
        return self.result["iou"].get(name, math.nan)

    def median(self, name: str) -> float | None:
        """Of a curve, less its first value, which has the warming up in it."""
        values = [value for _, value in self.curves.get(name, ())]
        return statistics.median(values[1:] or values) if values else None


@dataclass
class Measured:
    """What the network was asked. Where it or the data is not there, ``missing`` says why."""

    classes: ClassSet | None = None
    distances: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Run or source-only to the class-centre distance of every class."""
    images: int = 0
    """How many images they are of."""
    cycles: Cycles | None = None
    missing: str = ""


def measure(folder: Path, config: RunConfig, baseline: Path | None, device: str) -> Measured:
    """Class-centre distances of the run and its source-only baseline, and PLCA's cycles.

    Raises:
        UserError: no such device.
    """
    found = Measured()
    place = distributed.start(device).device
    try:
        _, method, found.classes = load_run(folder, place)
        source, target, held_out = _domains(config, found.classes)
        chosen = np.linspace(0, len(held_out) - 1, min(IMAGES, len(held_out)), dtype=int).tolist()
        few = dataclasses.replace(held_out, items=[held_out.items[i] for i in chosen])
        found.images = len(few)
        if few.items:
            found.distances["run"] = _distances(method, few, config, place)
        if few.items and baseline is not None:
            found.distances[BASELINE] = _distances(load_run(baseline, place)[1], few, config, place)
        plca = find_plca(method)
        if plca is not None and (plca.config.feature_association or plca.config.prediction_association):
            found.cycles = cycles(plca, source, target, place)
    except (UserError, torch.OutOfMemoryError) as error:
        found.missing = str(error).splitlines()[0]
    return found


def _domains(config: RunConfig, classes: ClassSet) -> tuple[Domain, ...]:
    """Source, target and held-out images in the run's classes.

    Raises:
        UserError: one is not there any more, or has other classes.
    """
    data = config.data
    opened = (
        open_domain(data.source, role="source", data_root=data.data_root),
        open_domain(data.target, role="target", data_root=data.data_root),
        open_domain(data.target, role="evaluation", data_root=data.data_root, split=data.eval_split),
    )
    shared = share_classes(*opened, classes=data.classes, aliases=data.class_alias)
    if shared[0].classes.names != classes.names:
        raise UserError(f"{data.source} and {data.target} have other classes than the run now")
    return shared


def _distances(method: Method, domain: Domain, config: RunConfig, device: torch.device) -> list[float]:
    statistics_: F.ClassStatistics | None = None
    data = dataclasses.replace(config.data, workers=0)
    with torch.no_grad():
        for image, label, _ in eval_loader(domain, data, method.model.input):
            found = feature_statistics(method, image.to(device), label.to(device), None)
            statistics_ = found if statistics_ is None else statistics_.merge(found)
    assert statistics_ is not None
    return class_centre_distance(statistics_).tolist()


def read_pictures(folder: Path, baseline: Path | None, labelled: bool) -> list[dict[str, str]]:
    """The pictures in ``preds/`` taken apart: name, and image, prediction, label where there is one (and the
    baseline's prediction) as data URIs."""
    parts = 3 if labelled else 2
    out = []
    for path in sorted((folder / "preds").glob("*.png")):
        image, prediction, *label = _panels(path, parts)
        layers = {"image": image, "prediction": prediction}
        other = baseline / "preds" / path.name if baseline else None
        if other is not None and other.is_file():
            layers[BASELINE] = _panels(other, parts)[1]
        if label:
            layers["label"] = label[0]
        said = {name: data_uri(part, photo=name == "image") for name, part in layers.items()}
        out.append({"name": path.stem, **said})
    return out


def _panels(path: Path, parts: int) -> list[np.ndarray]:
    """The parts of a picture that a run left, which have four white columns between them.

    Raises:
        UserError: it is none.
    """
    row = np.asarray(open_rgb(path))
    width, rest = divmod(row.shape[1] - 4 * (parts - 1), parts)
    if rest or width < 1:
        raise UserError(f"{path} is no picture that a run left; remove it")
    return [row[:, i * (width + 4) : i * (width + 4) + width] for i in range(parts)]


def data_uri(picture: np.ndarray, photo: bool) -> str:
    """An RGB picture at :data:`WIDTH` or less: JPEG for a photograph, palette PNG for flat colours."""
    image = Image.fromarray(picture)
    if image.width > WIDTH:
        how = Image.Resampling.BILINEAR if photo else Image.Resampling.NEAREST
        image = image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), how)
    buffer = io.BytesIO()
    if photo:
        image.save(buffer, "JPEG", quality=82)
    else:
        image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    kind = "jpeg" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
