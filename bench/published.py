"""The ops as in the authors' code, so that the methods can train on them. Every matrix, plane and product is
stored.

They are written from the descriptions of the methods, in float32 without autocast, which the authors' code
does not use. Ops that are not here run as their reference: Lovasz-Softmax class by class, ASANet's affinities
as a stack of planes, WeakSegDA's poolings. Values that the authors compute twice or discard (ASANet's target
affinities, FADA's unused gradients, SePiCo's unused teacher logits) are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fastuda.ops as F
from fastuda.models.discriminators import CategoryDiscriminators
from fastuda.ops import _backends
from fastuda.ops.batch_norm_act import reference as batch_norm_act
from fastuda.ops.cycle_association_loss import CycleStats

AS_IT_IS = F.prototype_contrast


def pairs(query: Tensor, key: Tensor, similarity: str) -> Tensor:
    """The stored similarity [B, N, M]."""
    if similarity == "cosine":
        return nnf.normalize(query, dim=-1) @ nnf.normalize(key, dim=-1).transpose(1, 2)
    entropy = (query * (query + 1e-10).log()).sum(-1, keepdim=True)
    return query @ (key + 1e-10).log().transpose(1, 2) - entropy


def hop_weights(sim: Tensor, contrast: bool) -> Tensor:
    """The softmax of rows; with ``contrast``, rows are first centred and scaled by constants."""
    if not contrast:
        return sim.softmax(-1)
    mean = sim.mean(-1, keepdim=True).detach()
    std = sim.std(-1, keepdim=True).detach()
    return ((sim - mean) / (std + 1e-10)).softmax(-1)


def spatial_aggregate(
    x: Tensor, *, alpha: float = 0.5, similarity: str = "cosine", contrast: bool = True
) -> Tensor:
    """``(1 - alpha) x + alpha softmax(sim(x, x)) x``."""
    weights = hop_weights(pairs(x, x, similarity), contrast)
    return (1 - alpha) * x + alpha * weights @ x


def cycle_association_loss(
    source: Tensor,
    target: Tensor,
    labels: Tensor,
    *,
    similarity: str = "cosine",
    contrast: bool = True,
    ignore_index: int = 255,
) -> tuple[Tensor, CycleStats]:
    """Two similarities with their softmaxes, top-1 of each, and the logarithm of the product."""
    forward = pairs(source, target, similarity)
    backward = pairs(target, source, "kl") if similarity == "kl" else forward.transpose(1, 2)
    hop_one, hop_two = hop_weights(forward, contrast), hop_weights(backward, contrast)
    index, first = forward.topk(1, -1)[1][..., 0], hop_one.topk(1, -1)[0][..., 0]
    last, second = backward.topk(1, -1)[1][..., 0], hop_two.topk(1, -1)[0][..., 0]
    end = last.gather(1, index)
    valid = labels != ignore_index
    matched = valid & (labels.gather(1, end) == labels)
    probability = first * second.gather(1, index)
    loss = -probability[matched].float().log().sum() / matched.sum().clamp(min=1)
    hit = labels.new_zeros(target.shape[:2]).scatter_(1, index, 1)
    return loss, CycleStats(matched.sum(), valid.sum(), hit.sum(), index, end)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    align_corners: bool = False,
    temperature: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Logits at full resolution, then torch's cross-entropy."""
    size = tuple(labels.shape[-2:])
    full = nnf.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    plain = {"weight": class_weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if pixel_weight is None:
        return nnf.cross_entropy(full / temperature, labels, reduction=reduction, **plain)
    each = nnf.cross_entropy(full / temperature, labels, reduction="none", **plain) * pixel_weight
    if reduction == "mean":
        return each.sum() / (labels != ignore_index).sum()
    return each.sum() if reduction == "sum" else each


def domain_cross_entropy(
    domain_logits: Tensor,
    seg_logits: Tensor,
    *,
    encode: str,
    size: tuple[int, int],
    temperature: float = 1.8,
    clip: float = 0.9,
    hard_threshold: float | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Both logits at full resolution, the soft labels with a half of zeros, and the product of all."""
    if hard_threshold is not None:
        raise ValueError("the authors' code has no hard encodings")
    how: dict[str, Any] = {"size": size, "mode": "bilinear", "align_corners": align_corners}
    domain = nnf.interpolate(domain_logits, **how)
    soft = (nnf.interpolate(seg_logits.detach(), **how) / temperature).softmax(1)
    soft[soft > clip] = clip
    halves = [soft, torch.zeros_like(soft)] if encode == "source" else [torch.zeros_like(soft), soft]
    return (-torch.cat(halves, 1) * domain.log_softmax(1)).sum(1).mean()


def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255
) -> F.ClassStatistics:
    """Mean and variance by N x K x A products."""
    x, y = features.detach()[labels != ignore_index], labels[labels != ignore_index]
    member = nnf.one_hot(y, num_classes).to(x.dtype)
    count = member.sum(0)
    share = 1 / count.clamp(min=1)[:, None]
    mean = (x[:, None] * member[..., None]).sum(0) * share
    variance = (((x[:, None] - mean) * member[..., None]) ** 2).sum(0) * share
    return F.ClassStatistics(count, mean, variance)


def prototype_contrast(
    features: Tensor,
    labels: Tensor,
    prototypes: F.ClassStatistics | F.PrototypeBank,
    *,
    kind: str = "dist",
    tau: float = 100.0,
    ignore_index: int = 255,
) -> Tensor:
    """Inner products and variance terms as N x K x A products (DistCL, ProtoCL)."""
    if isinstance(prototypes, F.PrototypeBank):  # class by class, as in the reference
        return AS_IT_IS(features, labels, prototypes, kind=kind, tau=tau, ignore_index=ignore_index)
    q, y = features[labels != ignore_index], labels[labels != ignore_index]
    if not len(y):
        return q.sum() * 0
    logits = (q[:, None] * prototypes.mean).sum(-1) / tau
    if kind == "proto":
        return nnf.cross_entropy(logits, y)
    spread = (q[:, None] ** 2 * prototypes.variance).sum(-1) / (2 * tau**2)
    own = spread.gather(1, y[:, None])[:, 0]
    return (nnf.cross_entropy(logits + spread, y, reduction="none") + own).mean()


def one_by_one(self: CategoryDiscriminators, pooled: Tensor, classes: Tensor | None = None) -> Tensor:
    """WeakSegDA's discriminators as K networks in a loop, including those of absent classes."""
    columns = []
    for k in range(self.num_classes):
        x = pooled[..., k]
        for number, layer in enumerate(self.layers):
            x = torch.addmm(layer.bias[k], x if number == 0 else x.relu(), layer.weight[k])
        columns.append(x)
    logits = torch.cat(columns, 1)
    return logits if classes is None else logits[:, classes]


def aspp(
    features: Tensor,
    weights: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """The sum of one convolution per branch."""
    added = biases or [None] * len(weights)
    branches = zip(weights, dilations, added, strict=True)
    outputs = [nnf.conv2d(features, w, b, padding=d, dilation=d) for w, d, b in branches]
    return sum(outputs[1:], outputs[0])


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """torch's convolution. Dilated ones are float32 on a CPU, where their gradient in bfloat16 is wrong."""
    wide = x.device.type == "cpu" and dilation > 1
    with torch.autocast(x.device.type, enabled=False) if wide else nullcontext():
        return nnf.conv2d(x.float() if wide else x, weight, bias, stride, padding, dilation, x.shape[1])


LAYERS: dict[str, Callable[..., Any]] = {
    "aspp": aspp,
    "batch_norm_act": batch_norm_act,
    "depthwise_conv2d": depthwise_conv2d,
}
"""torch's own versions of the network layers."""

OPS: dict[str, Callable[..., Any]] = {
    "spatial_aggregate": spatial_aggregate,
    "cycle_association_loss": cycle_association_loss,
    "upsample_cross_entropy": upsample_cross_entropy,
    "domain_cross_entropy": domain_cross_entropy,
    "class_statistics": class_statistics,
    "prototype_contrast": prototype_contrast,
}


def widened(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` without autocast, with half-precision tensors converted to float32."""

    def wide(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if half else value

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return op(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

    return run


def plain(replace: Callable[[Any, str, Any], None]) -> None:
    """Let the networks of this process use torch's own layers from here on; the losses stay."""
    for name, layer in LAYERS.items():
        replace(F, name, layer)


def use(replace: Callable[[Any, str, Any], None]) -> None:
    """Let this process train on the published formulations."""
    replace(_backends, "DEFAULT_BACKEND", "reference")
    for name, op in OPS.items():
        replace(F, name, widened(op))
    plain(replace)
    replace(CategoryDiscriminators, "forward", widened(one_by_one))


SIDES: dict[str, Callable[[Callable[[Any, str, Any], None]], None]] = {
    "fused": lambda replace: None,
    "published": use,
    "plain": plain,
}
"""What bench.end_to_end compares: the ops, the published formulations, and the losses of ``fastuda.ops`` on
networks of torch's own layers."""
