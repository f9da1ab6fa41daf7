"""Scores computed from a confusion matrix, and their tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastuda.data.labels import CITYSCAPES, SYNTHIA_13, SYNTHIA_16
from fastuda.errors import UserError, nearest
from fastuda.ops import ClassStatistics
from fastuda.system.files import written

PROTOCOLS = ("ignore", "confusion19")
"""Protocols for target classes that the run does not have, see :class:`Scores`."""


def iou_per_class(confusion: Tensor, others: Tensor | None = None) -> Tensor:
    """``tp / (tp + fp + fn)`` per class, float64 [K]; NaN for a class that neither occurs nor is predicted.

    Args:
        confusion: [K, K], rows = truth, columns = prediction.
        others: [K], predictions of each class at pixels of other classes, which are false positives.
    """
    matrix = confusion.double()
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    return hit / (union if others is None else union + others.double())


def class_centre_distance(statistics: ClassStatistics) -> Tensor:
    """Class-centre distance of every class, float64 [K]; lower is more compact.

    ``CCD_i = mean over j != i of (1 / |S_i|) sum_{x in S_i} |x - mu_i|^2 / |mu_i - mu_j|^2``: the variance
    within the class over the squared distance between centres, for all classes j that occur. NaN for a class
    without features, and if there is no other. Source: Wang et al. (FADA), ECCV 2020, who use the centres of
    source and target together; this uses the centres of the given features.

    Args:
        statistics: of the features, for K classes.
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
    """Per-class IoU in percent, and its means.

    Two protocols differ if the target has classes that the run does not have (after SYNTHIA: terrain,
    truck and train of Cityscapes). ``ignore`` leaves their pixels out (PLCA, FADA). ``confusion19`` counts
    predictions there as false positives, like the 16 IoUs taken from Cityscapes' 19 x 19 confusion matrix
    (ASANet, WeakSegDA, SePiCo). Otherwise the two are equal.
    """

    classes: tuple[str, ...]
    iou: tuple[float, ...]
    """IoU by ``protocol``; NaN if a class neither occurs nor is predicted."""
    ccd: tuple[float, ...] | None = None
    """Class-centre distances if computed; NaN for a class without features."""
    protocol: str = "ignore"
    """One of ``PROTOCOLS``."""
    other_iou: tuple[float, ...] | None = None
    """IoU by the other protocol; None if the two are equal."""

    @staticmethod
    def of(
        confusion: Tensor, classes: Sequence[str], others: Tensor | None = None, protocol: str = "ignore"
    ) -> Scores:
        """Compute the scores of a confusion matrix.

        Args:
            confusion: [K, K], rows = truth, columns = prediction.
            others: [K], predictions of each class at pixels of other classes; None if the target has no
                other classes.
        """
        ignoring = tuple((100 * iou_per_class(confusion)).tolist())
        if others is None:
            return Scores(tuple(classes), ignoring, protocol=protocol)
        iou = [ignoring, tuple((100 * iou_per_class(confusion, others)).tolist())]
        chosen = PROTOCOLS.index(protocol)
        return Scores(tuple(classes), iou[chosen], protocol=protocol, other_iou=iou[1 - chosen])

    @property
    def other_protocol(self) -> str:
        """The protocol of ``other_iou``."""
        return PROTOCOLS[1 - PROTOCOLS.index(self.protocol)]

    def only(self, names: Sequence[str]) -> Scores:
        """The scores of the named classes, in that order.

        Raises:
            UserError: there is no such class.
        """
        unknown = [name for name in names if name not in self.classes]
        if unknown:
            raise UserError(
                f"there is no score for a class {unknown[0]!r}{nearest(unknown[0], self.classes)}"
            )
        kept = [self.classes.index(name) for name in names]
        ccd = None if self.ccd is None else tuple(self.ccd[i] for i in kept)
        other = None if self.other_iou is None else tuple(self.other_iou[i] for i in kept)
        return Scores(tuple(names), tuple(self.iou[i] for i in kept), ccd, self.protocol, other)

    def mean(self, over: Sequence[int] | None = None) -> float:
        """Mean IoU over the classes that occur, among all or the given ones."""
        chosen = self.iou if over is None else [self.iou[i] for i in over]
        return torch.tensor(chosen, dtype=torch.float64).nanmean().item()

    @property
    def miou(self) -> float:
        return self.mean()

    def protocols(self) -> dict[str, float]:
        """mIoU by name, also over SYNTHIA's 16 and 13 classes if they are among the run's. Names of the
        other protocol's means end with it: ``mIoU16_ignore``."""
        out = {f"mIoU{len(self.classes)}": self.miou}
        for chosen in (SYNTHIA_16, SYNTHIA_13):
            names = [CITYSCAPES.names[i] for i in chosen]
            if set(names) < set(self.classes):
                out[f"mIoU{len(names)}"] = self.mean([self.classes.index(name) for name in names])
        if self.other_iou is None:
            return out
        others = replace(self, iou=self.other_iou, other_iou=None).protocols()
        return out | {f"{name}_{self.other_protocol}": value for name, value in others.items()}

    def as_dict(self) -> dict[str, object]:
        """Means and per-class IoU for JSON, with null for absent classes. If the protocols differ, the
        result names the protocol and includes the other one's IoU."""

        def rounded(values: Mapping[str, float]) -> dict[str, float | None]:
            return {name: None if v != v else round(v, 3) for name, v in values.items()}

        per_class = rounded(dict(zip(self.classes, self.iou, strict=True)))
        out: dict[str, object] = {**rounded(self.protocols()), "iou": per_class}
        if self.other_iou is not None:
            others = rounded(dict(zip(self.classes, self.other_iou, strict=True)))
            out |= {f"iou_{self.other_protocol}": others, "protocol": self.protocol}
        if self.ccd is None:
            return out
        distances = [None if v != v else float(f"{v:.6g}") for v in (self.mean_ccd, *self.ccd)]
        return out | {"mean_ccd": distances[0], "ccd": dict(zip(self.classes, distances[1:], strict=True))}

    @property
    def mean_ccd(self) -> float:
        """Mean class-centre distance over the classes that occur."""
        return torch.tensor(self.ccd or (torch.nan,), dtype=torch.float64).nanmean().item()


def protocol_line(scores: Scores, others: Sequence[str]) -> str:
    """A line that names the protocol, for a target with ``others``, classes that the run does not have."""
    named = ", ".join(others[:5]) + (f" and {len(others) - 5} more classes" if len(others) > 5 else "")
    how = {"ignore": "are left out", "confusion19": "count what is predicted there as false positives"}
    return f"by {scores.protocol}: pixels of {named} {how[scores.protocol]}"


def ccd_table(scores: Scores) -> str:
    """A table of the class-centre distances and their mean."""
    names = ["class", *scores.classes, "mean CCD"]
    rows = list(zip(names, ["CCD", *_distances([*(scores.ccd or ()), scores.mean_ccd])], strict=True))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [_line(list(row), widths) for row in rows]
    rule = _line(["-" * width for width in widths], widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _distances(values: Sequence[float]) -> list[str]:
    return ["-" if value != value else f"{value:.3g}" for value in values]


def write_csv(path: Path, scores: Scores) -> None:
    """Write a CSV with the columns class and iou, and columns for the other protocol and for class-centre
    distances if there are any.

    Raises:
        UserError: the file cannot be written.
    """
    columns: dict[str, Sequence[object]] = {"class": scores.classes, "iou": scores.iou}
    if scores.other_iou is not None:
        columns[f"iou_{scores.other_protocol}"] = scores.other_iou
    if scores.ccd is not None:
        columns["ccd"] = scores.ccd
    with written(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])


def table(columns: dict[str, Scores]) -> str:
    """A table of the per-class IoU of several runs, with the difference if there are two."""
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
