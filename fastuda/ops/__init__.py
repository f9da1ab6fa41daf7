"""The public ops. One call in any trainer replaces a step that needed an N x N matrix.

Every op takes ``backend="auto"``; :func:`backends` says which implementations can run given tensors, and why
the others cannot.
"""

from fastuda.ops._backends import BackendStatus, backends, release_memory
from fastuda.ops.aspp import aspp
from fastuda.ops.batch_norm_act import batch_norm_act
from fastuda.ops.category_pool import category_pool
from fastuda.ops.class_statistics import ClassStatistics, class_statistics
from fastuda.ops.contrast_softmax import contrast_softmax
from fastuda.ops.cycle_association_loss import CycleStats, cycle_association_loss
from fastuda.ops.cycle_match import CycleMatch, cycle_match
from fastuda.ops.depthwise_conv2d import depthwise_conv2d
from fastuda.ops.domain_cross_entropy import domain_cross_entropy
from fastuda.ops.local_affinity import affinity_cleaning_loss, local_affinity
from fastuda.ops.lovasz_softmax import lovasz_softmax
from fastuda.ops.prototype_contrast import PrototypeBank, prototype_contrast
from fastuda.ops.smooth_max_pool import smooth_max_pool
from fastuda.ops.spatial_aggregate import spatial_aggregate
from fastuda.ops.upsample_confusion import upsample_confusion
from fastuda.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "BackendStatus",
    "ClassStatistics",
    "CycleMatch",
    "CycleStats",
    "PrototypeBank",
    "affinity_cleaning_loss",
    "aspp",
    "backends",
    "batch_norm_act",
    "category_pool",
    "class_statistics",
    "contrast_softmax",
    "cycle_association_loss",
    "cycle_match",
    "depthwise_conv2d",
    "domain_cross_entropy",
    "local_affinity",
    "lovasz_softmax",
    "prototype_contrast",
    "release_memory",
    "smooth_max_pool",
    "spatial_aggregate",
    "upsample_confusion",
    "upsample_cross_entropy",
]
