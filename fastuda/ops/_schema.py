"""Every registered operator: its schema, once, and its fake. Torch only; no kernel is imported here.

An operator ``X`` has one overload per implementation, ``fastuda::X.cpu``, ``.triton``, ``.library`` and
``.cuda``, with the same arguments. C++ fills ``.cpu`` through ``TORCH_LIBRARY_IMPL``; the Triton launchers
are attached by :mod:`fastuda.ops._backends` when they are first needed. What a forward saves for its backward
is part of the schema, so that any forward pairs with any backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

IMPLEMENTATIONS = ("cpu", "triton", "library", "cuda")

library = torch.library.Library("fastuda", "DEF")


def define(name: str, schema: str, fake: Callable) -> None:
    """Register ``fastuda::name`` with one overload per implementation and one fake for all."""
    for implementation in IMPLEMENTATIONS:
        library.define(f"{name}.{implementation}{schema}")
        torch.library.register_fake(f"fastuda::{name}.{implementation}", fake, lib=library)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _index(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.int64)


def _stat(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=statistics_dtype(x))


def _cycle_match_fwd(source: Tensor, target: Tensor, similarity: str):
    (b, n, _), m = source.shape, target.shape[1]
    return _index(source, b, n), _index(source, b, m), _stat(source, b, n), _stat(source, b, m)


def _association_fwd(source: Tensor, target: Tensor, similarity: str, contrast: bool):
    (b, n, _), m = source.shape, target.shape[1]
    rows = [_stat(source, b, size) for size in (n, m, n, m, n, m)]
    return (_index(source, b, n), _index(source, b, m), *rows)


def _association_bwd(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor,
    target_weight: Tensor,
    forward_index: Tensor,
    backward_index: Tensor,
    source_temperature: Tensor,
    target_temperature: Tensor,
    source_lse: Tensor,
    target_lse: Tensor,
    similarity: str,
):
    return source.new_empty(source.shape), target.new_empty(target.shape)


def _aggregate_fwd(x: Tensor, similarity: str, contrast: bool, alpha: float):
    b, n, _ = x.shape
    return x.new_empty(x.shape), _stat(x, b, n), _stat(x, b, n)


def _aggregate_bwd(
    grad: Tensor, x: Tensor, out: Tensor, temperature: Tensor, lse: Tensor, similarity: str, alpha: float
):
    return x.new_empty(x.shape)


def _contrast_softmax_fwd(x: Tensor, eps: float):
    return x.new_empty(x.shape), _stat(x, *x.shape[:-1])


def _contrast_softmax_bwd(grad: Tensor, y: Tensor, inv_std: Tensor):
    return y.new_empty(y.shape)


def _upsample_cross_entropy_fwd(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
    per_pixel: bool,
):
    size = (logits.shape[0], *labels.shape[-2:]) if per_pixel else (0,)
    grad = _stat(logits, *(logits.shape if gradient else (0,)))
    return _stat(logits), _stat(logits), grad, _stat(logits, *size)


def _domain_cross_entropy_fwd(
    domain_logits: Tensor,
    seg_logits: Tensor,
    offset: int,
    height: int,
    width: int,
    align_corners: bool,
    temperature: float,
    clip: float,
    hard_threshold: float | None,
    gradient: bool,
):
    return _stat(domain_logits), _stat(domain_logits, *(domain_logits.shape if gradient else (0,)))


def _upsample_confusion_fwd(scores: Tensor, labels: Tensor, align_corners: bool, ignore_index: int):
    classes = scores.shape[1]
    return _index(scores, classes, classes), labels.new_empty(labels.shape, dtype=torch.uint8)


def _local_affinity_fwd(p: Tensor, neighbours: int, distance: int, product: bool):
    b, k, h, w = p.shape
    return _stat(p, b, neighbours if product else neighbours * k, h, w)


def _local_affinity_bwd(grad: Tensor, p: Tensor, neighbours: int, distance: int, product: bool):
    return p.new_empty(p.shape)


def _affinity_cleaning_fwd(p: Tensor, neighbours: int, gradient: bool):
    return _stat(p), _stat(p, *(p.shape if gradient else (0,)))


def _class_statistics_fwd(features: Tensor, labels: Tensor, num_classes: int, ignore_index: int):
    shape = (num_classes, features.shape[1])
    return _stat(features, num_classes), _stat(features, *shape), _stat(features, *shape)


def _prototype_contrast_fwd(
    features: Tensor, labels: Tensor, mean: Tensor, variance: Tensor | None, tau: float, ignore_index: int
):
    return _stat(features), _stat(features, features.shape[0], mean.shape[0])


def _prototype_contrast_bwd(
    grad: Tensor,
    features: Tensor,
    labels: Tensor,
    share: Tensor,
    mean: Tensor,
    variance: Tensor | None,
    tau: float,
    ignore_index: int,
):
    return features.new_empty(features.shape)


def _bank_contrast_fwd(
    features: Tensor,
    labels: Tensor,
    vectors: Tensor,
    count: Tensor,
    tau: float,
    ignore_index: int,
    gradient: bool,
):
    return _stat(features), _stat(features, *(features.shape if gradient else (0,)))


def _smooth_max_pool_fwd(logits: Tensor, k: float):
    return _stat(logits, *logits.shape[:2]), _stat(logits, *logits.shape[:2])


def _smooth_max_pool_bwd(grad: Tensor, logits: Tensor, lse: Tensor, k: float):
    return logits.new_empty(logits.shape)


def _category_pool_fwd(features: Tensor, logits: Tensor):
    (b, _, c), k = features.shape, logits.shape[2]
    return _stat(features, b, k, c), _stat(features, b, k)


def _category_pool_bwd(
    grad: Tensor,
    features: Tensor,
    logits: Tensor,
    pooled: Tensor,
    lse: Tensor,
    for_features: bool,
    for_logits: bool,
):
    return (
        features.new_empty(features.shape if for_features else (0,)),
        logits.new_empty(logits.shape if for_logits else (0,)),
    )


def _aspp_fwd(features: Tensor, weight: Tensor, bias: Tensor | None, dilations: list[int]):
    b, _, h, w = features.shape
    layout = suggest_memory_format(features)
    shape = (b, weight.shape[3], h, w)
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=layout)


def _aspp_bwd(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    dilations: list[int],
    for_features: bool,
    for_weight: bool,
):
    b, c, h, w = features.shape
    by_features = (
        features.new_empty(b, h, w, c).permute(0, 3, 1, 2) if for_features else features.new_empty(0)
    )
    return by_features, weight.new_empty(weight.shape if for_weight else (0,))


def _depthwise_conv2d_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
):
    b, c, *size = x.shape
    h, w = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(size, weight.shape[2:], strict=True)
    )
    shape = (b, c, h, w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _depthwise_conv2d_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    for_x: bool,
    for_weight: bool,
):
    b, c, h, w = x.shape
    by_x = x.new_empty(b, h, w, c).permute(0, 3, 1, 2) if for_x else x.new_empty(0)
    return by_x, weight.new_empty(weight.shape if for_weight else (0,))


def _lovasz_softmax_fwd(
    x: Tensor, labels: Tensor, from_logits: bool, align_corners: bool, ignore_index: int, gradient: bool
):
    size = x.shape if gradient else (0,)
    return x.new_empty((), dtype=torch.float32), x.new_empty(size, dtype=torch.float32)


define(
    "cycle_match_fwd",
    "(Tensor source, Tensor target, str similarity) -> (Tensor, Tensor, Tensor, Tensor)",
    _cycle_match_fwd,
)
define(
    "association_fwd",
    "(Tensor source, Tensor target, str similarity, bool contrast)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _association_fwd,
)
define(
    "association_bwd",
    "(Tensor source, Tensor target, Tensor source_weight, Tensor target_weight,"
    " Tensor forward_index, Tensor backward_index, Tensor source_temperature, Tensor target_temperature,"
    " Tensor source_lse, Tensor target_lse, str similarity)"
    " -> (Tensor, Tensor)",
    _association_bwd,
)
define(
    "aggregate_fwd",
    "(Tensor x, str similarity, bool contrast, float alpha) -> (Tensor, Tensor, Tensor)",
    _aggregate_fwd,
)
define(
    "aggregate_bwd",
    "(Tensor grad, Tensor x, Tensor out, Tensor temperature, Tensor lse, str similarity, float alpha)"
    " -> Tensor",
    _aggregate_bwd,
)
define("contrast_softmax_fwd", "(Tensor x, float eps) -> (Tensor, Tensor)", _contrast_softmax_fwd)
define("contrast_softmax_bwd", "(Tensor grad, Tensor y, Tensor inv_std) -> Tensor", _contrast_softmax_bwd)
define(
    "upsample_cross_entropy_fwd",
    "(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, bool align_corners,"
    " float temperature, int ignore_index, float label_smoothing, bool gradient,"
    " bool per_pixel) -> (Tensor, Tensor, Tensor, Tensor)",
    _upsample_cross_entropy_fwd,
)
define(
    "domain_cross_entropy_fwd",
    "(Tensor domain_logits, Tensor seg_logits, int offset, int height, int width, bool align_corners,"
    " float temperature, float clip, float? hard_threshold, bool gradient) -> (Tensor, Tensor)",
    _domain_cross_entropy_fwd,
)
define(
    "upsample_confusion_fwd",
    "(Tensor scores, Tensor labels, bool align_corners, int ignore_index) -> (Tensor, Tensor)",
    _upsample_confusion_fwd,
)
define(
    "local_affinity_fwd",
    "(Tensor p, int neighbours, int distance, bool product) -> Tensor",
    _local_affinity_fwd,
)
define(
    "local_affinity_bwd",
    "(Tensor grad, Tensor p, int neighbours, int distance, bool product) -> Tensor",
    _local_affinity_bwd,
)
define(
    "affinity_cleaning_fwd",
    "(Tensor p, int neighbours, bool gradient) -> (Tensor, Tensor)",
    _affinity_cleaning_fwd,
)
define(
    "lovasz_softmax_fwd",
    "(Tensor x, Tensor labels, bool from_logits, bool align_corners, int ignore_index, bool gradient)"
    " -> (Tensor, Tensor)",
    _lovasz_softmax_fwd,
)
define(
    "class_statistics_fwd",
    "(Tensor features, Tensor labels, int num_classes, int ignore_index) -> (Tensor, Tensor, Tensor)",
    _class_statistics_fwd,
)
define(
    "prototype_contrast_fwd",
    "(Tensor features, Tensor labels, Tensor mean, Tensor? variance, float tau, int ignore_index)"
    " -> (Tensor, Tensor)",
    _prototype_contrast_fwd,
)
define(
    "prototype_contrast_bwd",
    "(Tensor grad, Tensor features, Tensor labels, Tensor share, Tensor mean, Tensor? variance, float tau,"
    " int ignore_index) -> Tensor",
    _prototype_contrast_bwd,
)
define(
    "bank_contrast_fwd",
    "(Tensor features, Tensor labels, Tensor vectors, Tensor count, float tau, int ignore_index,"
    " bool gradient) -> (Tensor, Tensor)",
    _bank_contrast_fwd,
)
define("smooth_max_pool_fwd", "(Tensor logits, float k) -> (Tensor, Tensor)", _smooth_max_pool_fwd)
define(
    "smooth_max_pool_bwd",
    "(Tensor grad, Tensor logits, Tensor lse, float k) -> Tensor",
    _smooth_max_pool_bwd,
)
define("category_pool_fwd", "(Tensor features, Tensor logits) -> (Tensor, Tensor)", _category_pool_fwd)
define(
    "category_pool_bwd",
    "(Tensor grad, Tensor features, Tensor logits, Tensor pooled, Tensor lse, bool for_features,"
    " bool for_logits) -> (Tensor, Tensor)",
    _category_pool_bwd,
)
define(
    "aspp_fwd",
    "(Tensor features, Tensor weight, Tensor? bias, int[] dilations) -> Tensor",
    _aspp_fwd,
)
define(
    "aspp_bwd",
    "(Tensor grad, Tensor features, Tensor weight, int[] dilations, bool for_features, bool for_weight)"
    " -> (Tensor, Tensor)",
    _aspp_bwd,
)
define(
    "depthwise_conv2d_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, int dilation) -> Tensor",
    _depthwise_conv2d_fwd,
)
define(
    "depthwise_conv2d_bwd",
    "(Tensor grad, Tensor x, Tensor weight, int stride, int padding, int dilation, bool for_x,"
    " bool for_weight) -> (Tensor, Tensor)",
    _depthwise_conv2d_bwd,
)
