"""Pixel-Level Cycle Association (Kang et al., NeurIPS 2020, arXiv 2011.00147).

A source pixel is matched to its most similar target pixel, and that one back to a source pixel; where the
cycle ends in the class it began in, both hops are pulled together against all other pixels of the other
image. This is done on features (cosine) and on predictions (KL), the target having been spatially aggregated
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fastuda.ops as F
from fastuda.data.batch import Batch
from fastuda.distributed import joint_mean
from fastuda.errors import UserError
from fastuda.methods.base import (
    Method,
    Phase,
    SegPrediction,
    at_least_float32,
    channel_major,
    pixel_major,
    register,
)
from fastuda.models.segmentor import Segmentor


def adaptive_lsr(logits: Tensor, gamma: float) -> Tensor:
    """``mean_i delta_i l_i`` with ``l_i = -1/K sum_c log p_ic`` and ``delta_i = l_i / gamma - 1``, detached.

    A cross-entropy to the uniform distribution whose sign turns at ``l = gamma``: it smooths pixels that are
    surer than that and sharpens the others. Negative in normal operation. Source: PLCA, eq. 13.

    Args:
        logits: [B, K, h, w] at any resolution; no pixel is left out.
        gamma: the published 10.
    """
    uniform = -at_least_float32(logits).log_softmax(1).mean(1)
    return (uniform * (uniform.detach() / gamma - 1)).mean()


@register("plca")
class PLCA(Method):
    """``CE + lovasz_weight Lovasz + association_weight (L_feature + L_prediction) + lsr_weight LSR``.

    The rows of the paper's ablation table (CE; + Lovasz; + feature association; + prediction association; +
    LSR; without aggregation; Sim-PLCA) are reached by setting ``lovasz_weight``, ``feature_association``,
    ``prediction_association``, ``lsr_weight``, ``aggregation`` and ``contrast``.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        RANGES: ClassVar = {"aggregation_alpha": (0, 1), "association_start": (0, math.inf)}

        lovasz_weight: float = 0.75
        """beta 1. The paper and the authors' config say 0.75; their code multiplies by world size and
        accumulation steps, which makes 3.0 in the published two-GPU run and 1.5 on one GPU. The published
        runs' configs here say 3.0."""
        association_weight: float = 0.1
        """beta 2, of each of the two associations."""
        association_start: int = 0
        """Step before which the source alone is trained, by cross-entropy and Lovász-Softmax. Published: 0. A
        network that has not learnt the source yet matches many pixels to other classes."""
        lsr_weight: float = 0.01
        """beta 3. 0 leaves LSR out."""
        lsr_gamma: float = 10.0
        """The uniform cross-entropy where LSR turns its sign."""
        feature_association: bool = True
        """Cosine association of the backbone's features."""
        prediction_association: bool = True
        """KL association of the predictions."""
        contrast: bool = True
        """Contrast normalisation of the similarities in the associations and in the feature aggregation.
        False is this project's reading of Sim-PLCA: raw similarities under the softmax. The paper does not
        define it further."""
        aggregation: bool = True
        """Aggregate the target spatially before it is associated (training)."""
        aggregation_alpha: float = 0.5
        """Share of the aggregated part, in training and at test time."""
        prediction_aggregation_contrast: bool = False
        """Contrast normalisation when predictions are aggregated. The paper's text has it, the authors'
        code has not."""
        test_aggregation: bool = True
        """Aggregate features and probabilities at test time, as the published numbers were measured."""
        pixel_share: float = 1.0
        """Share of the pixels of each side that are associated, drawn at random per step: the authors' way
        out of memory (USE_CROP), not needed here. 1 is all of them."""

    config: Config

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        if not 0 < config.pixel_share <= 1:
            raise UserError(f"method.pixel_share is {config.pixel_share}: choose a share in (0, 1]")
        super().__init__(config, model, num_classes)

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        if step < config.association_start:
            logits = self.model(batch.source_image).logits
            yield Phase("model", self._supervised(logits, batch.source_label))
            return
        # the target goes first, as published: the running statistics of batch norm end on the source
        target = self.model(batch.target_image)
        source = self.model(batch.source_image)
        losses, metrics = self._supervised(source.logits, batch.source_label), {}

        source_labels = nnf.interpolate(batch.source_label[:, None].float(), source.logits.shape[-2:])
        labels = source_labels[:, 0].long().flatten(1)
        pick_source = self._pick(labels.shape[1], labels.device)
        pick_target = self._pick(target.logits.shape[2] * target.logits.shape[3], labels.device)
        levels = {}
        if config.feature_association:
            levels["feature"] = ("cosine", source.features, target.features, config.contrast)
        if config.prediction_association:
            probabilities = (
                at_least_float32(source.logits).softmax(1),
                at_least_float32(target.logits).softmax(1),
            )
            levels["prediction"] = ("kl", *probabilities, config.prediction_aggregation_contrast)
        for level, (similarity, source_map, target_map, aggregation_contrast) in levels.items():
            source_rows = pixel_major(source_map)[:, pick_source]
            target_rows = pixel_major(target_map)[:, pick_target]
            if config.aggregation:
                target_rows = F.spatial_aggregate(
                    target_rows,
                    alpha=config.aggregation_alpha,
                    similarity=similarity,
                    contrast=aggregation_contrast,
                )
            loss, stats = F.cycle_association_loss(
                source_rows,
                target_rows,
                labels[:, pick_source],
                similarity=similarity,
                contrast=config.contrast,
            )
            losses[f"{level}_association"] = config.association_weight * joint_mean(loss, stats.matched)
            metrics[f"{level}_matched"] = stats.matched / stats.valid.clamp(min=1)
            metrics[f"{level}_covered"] = stats.covered / target_rows.shape[:2].numel()
        if config.lsr_weight:
            lsr = adaptive_lsr(source.logits, config.lsr_gamma) + adaptive_lsr(
                target.logits, config.lsr_gamma
            )
            losses["lsr"] = config.lsr_weight * lsr
        yield Phase("model", losses, metrics)

    def _supervised(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        align = self.model.align_corners
        ce = F.upsample_cross_entropy(logits, labels, align_corners=align)
        losses = {"ce": joint_mean(ce, (labels != 255).sum())}
        if self.config.lovasz_weight:
            lovasz = F.lovasz_softmax(logits, labels, from_logits=True, align_corners=align)
            losses["lovasz"] = self.config.lovasz_weight * lovasz
        return losses

    def _pick(self, count: int, device: torch.device) -> Tensor | slice:
        if self.config.pixel_share == 1:
            return slice(None)
        keep = max(1, round(count * self.config.pixel_share))
        return torch.randperm(count, device=device)[:keep]

    def predict(self, images: Tensor) -> SegPrediction:
        """Test-time aggregation: of the features before the head, and of the probabilities after it."""
        if not self.config.test_aggregation:
            return super().predict(images)
        alpha = self.config.aggregation_alpha
        features = self.model(images).features
        size = (features.shape[2], features.shape[3])
        rows = F.spatial_aggregate(pixel_major(features), alpha=alpha, contrast=self.config.contrast)
        logits = self.model.classify(channel_major(rows, size))
        probabilities = F.spatial_aggregate(
            pixel_major(at_least_float32(logits).softmax(1)),
            alpha=alpha,
            similarity="kl",
            contrast=self.config.prediction_aggregation_contrast,
        )
        return SegPrediction(channel_major(probabilities, size), True)
