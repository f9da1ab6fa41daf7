"""Every op in plain torch with native autograd: the text to learn the library from, and the yardstick of
every fused implementation.

Shapes: features are pixel-major, ``[B, N, C]``. Half-precision inputs are computed in float32; float64 stays
float64. These functions store every matrix: they are for reading, testing and for machines where nothing
faster runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

EPS_KL = 1e-10
EPS_STD = 1e-10
EPS_NORM = 1e-12


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """Rows of length one. A row of zeros has no direction: it stays zero and gets no gradient.

    (``torch.nn.functional.normalize`` divides its gradient by 1e-12, which no optimiser survives.)
    """
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm <= EPS_NORM, 0, x / norm.clamp(min=EPS_NORM))


def pair_similarity(query: Tensor, key: Tensor, similarity: str) -> Tensor:
    """``[B, N, M]`` similarity of every query to every key: the cosine, or ``-KL(query || key)`` of
    probabilities."""
    query, key = full(query), full(key)
    if similarity == "cosine":
        return unit(query) @ unit(key).transpose(1, 2)
    entropy = (query * (query + EPS_KL).log()).sum(-1, keepdim=True)
    return query @ (key + EPS_KL).log().transpose(1, 2) - entropy


def row_temperature(sim: Tensor, contrast: bool = True) -> Tensor:
    """``[..., 1]`` per-row temperature: the detached unbiased standard deviation + 1e-10, or one: without
    ``contrast``, and where the deviation is rounding, which would leave the softmax of equal values to
    chance."""
    # an exported graph has one form for every size: there a single value has the deviation NaN
    single = not torch.compiler.is_exporting() and (sim.shape[-1] < 2 or not sim.numel())
    if not contrast or single:
        return torch.ones_like(sim[..., :1])
    deviation, mean = torch.std_mean(sim.detach(), -1, keepdim=True)
    rounding = 8 * torch.finfo(sim.dtype).eps * mean.abs().clamp(min=1)
    return torch.where(deviation > rounding, deviation + EPS_STD, 1)


def first_argmax(sim: Tensor) -> Tensor:
    """Row argmax with ties to the lowest index (torch's own argmax leaves ties open)."""
    index = torch.arange(sim.shape[-1], device=sim.device)
    best = sim.detach() == sim.detach().amax(-1, keepdim=True)
    # a row of NaN has no best: any valid index will do, the loss will show the NaN
    return torch.where(best, index, sim.shape[-1] - 1).amin(-1)


def cycle_match(source: Tensor, target: Tensor, similarity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both hops: ``(forward_index [B, N], backward_index [B, M], forward_similarity,
    backward_similarity)``."""
    forward = pair_similarity(source, target, similarity)
    backward = pair_similarity(target, source, similarity)
    forward_index, backward_index = first_argmax(forward), first_argmax(backward)
    return (
        forward_index,
        backward_index,
        forward.gather(-1, forward_index[..., None])[..., 0],
        backward.gather(-1, backward_index[..., None])[..., 0],
    )


def cycle_association_loss(
    source: Tensor, target: Tensor, labels: Tensor, similarity: str, contrast: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, matched [B, N] bool, forward_index, end_index)``: minus the mean log-probability of the
    consistent cycles."""
    forward = pair_similarity(source, target, similarity)
    backward = pair_similarity(target, source, similarity)
    forward_index, backward_index = first_argmax(forward), first_argmax(backward)
    end_index = backward_index.gather(1, forward_index)
    matched = (labels != ignore_index) & (labels.gather(1, end_index) == labels)

    forward_log = (forward / row_temperature(forward, contrast)).log_softmax(-1)
    backward_log = (backward / row_temperature(backward, contrast)).log_softmax(-1)
    hop_one = forward_log.gather(-1, forward_index[..., None])[..., 0]
    hop_two = backward_log.gather(-1, backward_index[..., None])[..., 0].gather(1, forward_index)
    loss = -((hop_one + hop_two) * matched).sum() / matched.sum().clamp(min=1)
    return loss, matched, forward_index, end_index


def spatial_aggregate(x: Tensor, alpha: float, similarity: str, contrast: bool) -> Tensor:
    """``(1 - alpha) x + alpha softmax(sim(x, x) / t) x`` with raw values and the pixel itself included."""
    sim = pair_similarity(x, x, similarity)
    weights = (sim / row_temperature(sim, contrast)).softmax(-1)
    return ((1 - alpha) * full(x) + alpha * (weights @ full(x))).to(x.dtype)


def contrast_softmax(x: Tensor, eps: float) -> Tensor:
    """``softmax((x - mean) / (std + eps))`` along the last axis, mean and unbiased std detached."""
    rows = full(x)
    several = rows.shape[-1] > 1 and rows.numel()
    std = rows.detach().std(-1, keepdim=True) if several else torch.zeros_like(rows[..., :1])
    return ((rows - rows.detach().mean(-1, keepdim=True)) / (std + eps)).softmax(-1).to(x.dtype)


def upsample(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear upsampling to ``size``, at least in float32."""
    x = full(x)
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    x = x.clamp(min=-1.5e38)  # -inf, a masked class, times a weight of 0 would be NaN
    return nnf.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    align_corners: bool,
    temperature: float,
    ignore_index: int,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """Cross-entropy of upsampled logits against hard ``[B, H, W]`` or soft ``[B, K, H, W]`` labels."""
    soft = target.is_floating_point()
    log_p = (upsample(logits, target.shape[-2:], align_corners) / temperature).log_softmax(1)
    classes = log_p.shape[1]
    weight = log_p.new_ones(classes) if class_weight is None else class_weight.to(log_p)
    if soft:
        q = target.to(log_p.dtype)
        valid = log_p.new_ones(log_p.shape[0], *log_p.shape[2:])
        norm = valid
    else:
        keep = (target != ignore_index) & (target >= 0) & (target < classes)
        q = nnf.one_hot(torch.where(keep, target, 0), classes).permute(0, 3, 1, 2).to(log_p.dtype)
        valid = keep.to(log_p.dtype)
        norm = valid * (q * weight[None, :, None, None]).sum(1)
    q = q * (1 - label_smoothing) + label_smoothing / classes
    q = q * weight[None, :, None, None]
    loss = -torch.where(q == 0, 0, q * log_p).sum(1) * valid  # a class of no weight may be masked
    if pixel_weight is not None:
        loss = loss * pixel_weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = norm.sum()
    return loss.sum() / torch.where(total > 0, total, 1)


def upsample_confusion(
    x: Tensor, labels: Tensor, align_corners: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """``([K, K] int64 confusion, rows = truth; [B, H, W] uint8 predicted labels)``, ties to the lowest
    class."""
    classes = x.shape[1]
    predicted = first_argmax(upsample(x, labels.shape[-2:], align_corners).movedim(1, -1))
    keep = labels != ignore_index
    index = labels[keep].long() * classes + predicted[keep]
    matrix = torch.bincount(index, minlength=classes * classes).reshape(classes, classes)
    return matrix, predicted.to(torch.uint8)


def lovasz_gradient(sorted_truth: Tensor) -> Tensor:
    """Gradient of the Lovasz extension of the Jaccard loss, of errors sorted downwards (Berman et al.
    2018, alg. 1)."""
    total = sorted_truth.sum()
    intersection = total - sorted_truth.cumsum(0)
    union = total + (1 - sorted_truth).cumsum(0)
    jaccard = 1 - intersection / union
    return torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])


def lovasz_softmax(probabilities: Tensor, labels: Tensor, ignore_index: int, per_image: bool) -> Tensor:
    """Lovasz-Softmax, averaged over the classes that are present (and over the images, per image)."""
    if per_image:
        losses = [
            lovasz_softmax(p[None], y[None], ignore_index, False)
            for p, y in zip(probabilities, labels, strict=True)
        ]
        return torch.stack(losses).mean()
    keep = (labels != ignore_index) & (labels >= 0) & (labels < probabilities.shape[1])
    p, y = full(probabilities).movedim(1, -1)[keep], labels[keep]
    losses = []
    for c in range(p.shape[1]):
        truth = (y == c).to(p.dtype)
        if not truth.any():
            continue
        error, order = (truth - p[:, c]).abs().sort(descending=True)
        losses.append(error @ lovasz_gradient(truth[order]))
    return torch.stack(losses).mean() if losses else p.sum() * 0


def aspp(
    features: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], biases: Sequence[Tensor] | None
) -> Tensor:
    """DeepLab's head: a dilated 3x3 convolution for each branch, summed."""
    dtype = features.dtype
    branches = zip(weights, dilations, strict=True)
    outputs = [nnf.conv2d(features, w.to(dtype), padding=d, dilation=d) for w, d in branches]
    outputs += [b.to(dtype)[:, None, None] for b in biases or ()]
    return sum(outputs[1:], outputs[0])


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    """A convolution of every channel with its own kernel.

    On a CPU in float32: torch's weight gradient of a dilated one in bfloat16, channels last, is wrong (2.13).
    """
    dtype = full(x).dtype if x.device.type == "cpu" else x.dtype
    added = bias if bias is None else bias.to(dtype)
    y = nnf.conv2d(x.to(dtype), weight.to(dtype), added, stride, padding, dilation, x.shape[1])
    return y.to(x.dtype)
