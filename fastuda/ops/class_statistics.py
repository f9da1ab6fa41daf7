"""Mergeable per-class statistics of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor

from fastuda.ops import _backends
from fastuda.ops._checks import check_float, check_integer, check_labels, check_rank, without_autocast
from fastuda.ops._reference import full
from fastuda.ops._schema import operator, statistic


def reference(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, ...]:
    """``(count [K], mean [K, A], biased variance [K, A])`` of every class."""
    x = full(features)
    keep = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    index = torch.where(keep, labels, num_classes)
    member = nnf.one_hot(index, num_classes + 1)[:, :num_classes].to(x.dtype).T
    count = member.sum(1)
    share = 1 / count.clamp(min=1)[:, None]
    mean = (member @ x) * share
    centred = x - mean[index.clamp(max=num_classes - 1)]
    return count, mean, (member @ centred.square()) * share


@operator
def class_statistics_fwd(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (num_classes, features.shape[1])
    return statistic(features, num_classes), statistic(features, *shape), statistic(features, *shape)


_backends.register(
    "class_statistics", triton=True, cuda="16 loads in flight, where triton loads tile after tile"
)


@dataclass(frozen=True)
class ClassStatistics:
    """The number of features of each class, their mean and their biased variance per channel."""

    count: Tensor
    """[K], in the dtype of the mean."""
    mean: Tensor
    """[K, A]; 0 for a class without features."""
    variance: Tensor
    """[K, A]."""

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """The exact statistics of both sets of features together (Chan et al., 1983).

        Raises:
            ValueError, TypeError: ``other`` has other classes or channels, or is no :class:`ClassStatistics`.
        """
        if not isinstance(other, ClassStatistics):
            raise TypeError(f"other must be ClassStatistics, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"other has statistics of shape {tuple(other.mean.shape)}, these {tuple(self.mean.shape)}:"
                " both must be [K, A] of the same classes and channels"
            )
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[:, None]
        gap = other.mean - self.mean
        variance = self.variance + share * (other.variance - self.variance) + share * (1 - share) * gap**2
        return ClassStatistics(count, self.mean + share * gap, variance)

    def all_reduce(self) -> ClassStatistics:
        """The statistics of the features of all processes together; itself without a process group."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        packed = torch.cat([self.count[:, None], self.mean, self.variance], 1)
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, packed)
        width = self.mean.shape[1]
        total: ClassStatistics | None = None
        for part in parts:
            one = ClassStatistics(part[:, 0], part[:, 1 : 1 + width], part[:, 1 + width :])
            total = one if total is None else total.merge(one)
        assert total is not None
        return total


def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255, backend: str = "auto"
) -> ClassStatistics:
    """Count, mean and biased variance of the features of every class, without gradient.

    Results are float32 for every input dtype (float64 for float64). The variance is computed about the
    class's own mean, so that a large common mean costs no precision. Source: Xie et al., SePiCo, TPAMI 2022,
    section 3.3.

    Args:
        features: [N, A].
        labels: [N] integer classes; features with a label outside 0..num_classes - 1 are left out.
        num_classes: K.
        ignore_index: the label to leave out.
        backend: ``auto``, or a name from ``fastuda.ops.backends("class_statistics")``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit, or the named backend cannot run.
    """
    check_float("features", features)
    check_rank("features", features, "N, A")
    check_labels("labels", labels, (features.shape[0],), "features", features)
    check_integer("num_classes", num_classes, 1)
    check_integer("ignore_index", ignore_index)
    name = _backends.select("class_statistics", features, backend=backend)
    labels = labels.long()
    with torch.no_grad(), without_autocast(features):
        if name != "reference":
            forward = _backends.overload("class_statistics_fwd", name)
            return ClassStatistics(*forward(features.detach(), labels, num_classes, ignore_index))
        statistics = reference(features.detach(), labels, num_classes, ignore_index)
        return ClassStatistics(*statistics)
