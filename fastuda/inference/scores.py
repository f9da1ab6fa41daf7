"""Scores from a confusion matrix, and the tables that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastuda.data.labels import CITYSCAPES, SYNTHIA_13, SYNTHIA_16
from fastuda.errors import UserError, nearest
from fastuda.ops import ClassStatistics


def iou_per_class(confusion: Tensor) -> Tensor:
    """``tp / (tp + fp + fn)`` per class, float64 [K]; NaN for a class that is neither there nor predicted."""
    matrix = confusion.double()
    hit = matrix.diagonal()
    return hit / (matrix.sum(0) + matrix.sum(1) - hit)


def class_centre_distance(statistics: ClassStatistics) -> Tensor:
    """Class-centre distance of every class, float64 [K]; the lower, the tighter its features lie.

    ``CCD_i = mean over j != i of (1 / |S_i|) sum_{x in S_i} |x - mu_i|^2 / |mu_i - mu_j|^2``: the variance
    within the class over the squared distance between centres, j over the classes that occur. NaN for a
    class without features, and where there is no other. Source: Wang et al. (FADA), ECCV 2020; there the
    centres are those of source and target together, here of the given features.

    Args:
        statistics: of the features of K classes.
    """
    present = statistics.count > 0
    mean = statistics.mean.double()
    within = statistics.variance.double().sum(1)
    between = (mean[:, None] - mean).square().sum(2)
    others = (present & present[:, None]).fill_diagonal_(False)
    ratio = torch.where(others, within[:, None] / between, 0.0)
    return torch.where(present, ratio.sum(1) / others.sum(1), torch.nan)


@dataclass(frozen=True)
class Scores:
    """Per-class IoU in percent, and its means."""

    classes: tuple[str, ...]
    iou: tuple[float, ...]
    """NaN where a class neither occurs nor is predicted."""
    ccd: tuple[float, ...] | None = None
    """Class-centre distances, where they were asked for; NaN where a class has no feature."""

    @staticmethod
    def of(confusion: Tensor, classes: Sequence[str]) -> Scores:
        return Scores(tuple(classes), tuple((100 * iou_per_class(confusion)).tolist()))

    def only(self, names: Sequence[str]) -> Scores:
        """The scores of these classes alone, in their order.

        Raises:
            UserError: one that is not there.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise UserError(f"no score of a class {unknown[0]!r}{nearest(unknown[0], self.classes)}")
        kept = [self.classes.index(name) for name in names]
        ccd = None if self.ccd is None else tuple(self.ccd[i] for i in kept)
        return Scores(tuple(names), tuple(self.iou[i] for i in kept), ccd)

    def mean(self, over: Sequence[int] | None = None) -> float:
        """Mean IoU over the classes that occur (all, or the given ones)."""
        chosen = self.iou if over is None else [self.iou[i] for i in over]
        return torch.tensor(chosen, dtype=torch.float64).nanmean().item()

    @property
    def miou(self) -> float:
        return self.mean()

    def protocols(self) -> dict[str, float]:
        """mIoU by name of the protocol; where they are among the classes also over SYNTHIA's 16 and 13."""
        out = {f"mIoU{len(self.classes)}": self.miou}
        for chosen in (SYNTHIA_16, SYNTHIA_13):
            names = [CITYSCAPES.names[i] for i in chosen]
            if set(names) < set(self.classes):
                out[f"mIoU{len(names)}"] = self.mean([self.classes.index(name) for name in names])
        return out

    def as_dict(self) -> dict[str, object]:
        """For JSON: protocols and per-class IoU, absent classes as null."""
        per_class = {n: None if v != v else round(v, 3) for n, v in zip(self.classes, self.iou, strict=True)}
        means = {k: None if v != v else round(v, 3) for k, v in self.protocols().items()}
        out: dict[str, object] = {**means, "iou": per_class}
        if self.ccd is None:
            return out
        distances = [None if v != v else float(f"{v:.6g}") for v in (self.mean_ccd, *self.ccd)]
        return out | {"mean_ccd": distances[0], "ccd": dict(zip(self.classes, distances[1:], strict=True))}

    @property
    def mean_ccd(self) -> float:
        """Mean class-centre distance over the classes that occur."""
        return torch.tensor(self.ccd or (torch.nan,), dtype=torch.float64).nanmean().item()


def ccd_table(scores: Scores) -> str:
    """Class-centre distance per class, and its mean."""
    names = ["class", *scores.classes, "mean CCD"]
    rows = list(zip(names, ["CCD", *_distances([*(scores.ccd or ()), scores.mean_ccd])], strict=True))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [_line(list(row), widths) for row in rows]
    rule = _line(["-" * width for width in widths], widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _distances(values: Sequence[float]) -> list[str]:
    return ["-" if value != value else f"{value:.3g}" for value in values]


def table(columns: dict[str, Scores]) -> str:
    """Per-class IoU of several runs side by side; with two, their difference as well."""
    runs = list(columns.values())
    heads = ["class", *columns] + (["gain"] if len(runs) == 2 else [])
    rows = [[name, *_cells([run.iou[i] for run in runs])] for i, name in enumerate(runs[0].classes)]
    means = [[key, *_cells([run.protocols()[key] for run in runs])] for key in runs[0].protocols()]
    widths = [max(len(row[i]) for row in [heads, *rows, *means]) for i in range(len(heads))]
    lines = [_line(heads, widths), _line(["-" * width for width in widths], widths)]
    lines += [_line(row, widths) for row in rows]
    lines += [_line(["-" * width for width in widths], widths)] + [_line(row, widths) for row in means]
    return "\n".join(lines)


def _cells(values: list[float]) -> list[str]:
    cells = ["-" if value != value else f"{value:.1f}" for value in values]
    if len(values) == 2:
        gain = values[1] - values[0]
        cells.append("-" if gain != gain else f"{gain:+.1f}")
    return cells


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = cells
    return "  ".join([first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)])
