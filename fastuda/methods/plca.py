"""Pixel-Level Cycle Association (Kang et al., NeurIPS 2020, arXiv 2011.00147).

Each source pixel is matched to its most similar target pixel, and that one back to a source pixel. If the
cycle ends in the class in which it began, both matches are contrasted with all other pixels of the other
image. This is done for features (cosine) and predictions (KL), after a spatial aggregation of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.methods.base import Method, Phase, SegPrediction
from fastuda.methods.cycles import Cycles
from fastuda.methods.losses import valid_mean_ce
from fastuda.methods.registry import register
from fastuda.methods.tensors import at_least_float32, channel_major, pixel_major
from fastuda.models.segmentor import SegOutput
from fastuda.system.distributed import joint_mean
from fastuda.system.settings import Bounds, Natural, Share

ALL = slice(None)


def adaptive_lsr(logits: Tensor, gamma: float) -> Tensor:
    """``mean_i delta_i l_i`` with ``l_i = -1/K sum_c log p_ic`` and ``delta_i = l_i / gamma - 1``, detached.

    A cross-entropy with the uniform distribution whose sign changes at ``l = gamma``: it smooths more
    confident pixels and sharpens the others. It is usually negative. Source: PLCA, eq. 13.

    Args:
        logits: [B, K, h, w] at any resolution; every pixel counts.
        gamma: the published 10.
    """
    uniform = -at_least_float32(logits).log_softmax(1).mean(1)
    return (uniform * (uniform.detach() / gamma - 1)).mean()


def _at_size_of(pixels: Tensor, labels: Tensor) -> Tensor:
    """Labels [B, H, W] sampled at the pixels of a map [B, C, h, w]: [B, h w]."""
    return nnf.interpolate(labels[:, None].float(), pixels.shape[2:])[:, 0].long().flatten(1)


@register("plca")
class PLCA(Method):
    """``CE + lovasz_weight Lovasz + association_weight (L_feature + L_prediction) + lsr_weight LSR``.

    The settings ``lovasz_weight``, ``feature_association``, ``prediction_association``, ``lsr_weight``,
    ``aggregation`` and ``contrast`` give the rows of the paper's ablation table (CE; + Lovasz; + feature
    association; + prediction association; + LSR; without aggregation; Sim-PLCA).
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        lovasz_weight: float = 0.75
        """Weight of Lovasz-Softmax (beta 1). The paper and the authors' configuration say 0.75; their code
        multiplies it by the world size and the accumulation steps: 3.0 in the published two-GPU run, 1.5
        on one GPU. The configurations of the published runs use 3.0."""
        association_weight: float = 0.1
        """Weight of each of the two associations (beta 2)."""
        association_start: Natural = 0
        """Step before which only the source is trained, by cross-entropy and Lovász-Softmax (published: 0). A
        network that has not learnt the source yet matches many pixels to other classes."""
        lsr_weight: float = 0.01
        """Weight of LSR (beta 3); 0 disables it."""
        lsr_gamma: float = 10.0
        """Uniform cross-entropy at which LSR changes its sign."""
        feature_association: bool = True
        """Whether to associate the backbone's features (cosine)."""
        prediction_association: bool = True
        """Whether to associate the predictions (KL)."""
        contrast: bool = True
        """Contrast normalisation of the similarities in the associations and in the feature aggregation.
        False is this project's reading of Sim-PLCA, which the paper does not define further: a softmax of
        the raw similarities."""
        aggregation: bool = True
        """Whether to aggregate the target spatially before the association in training."""
        aggregation_alpha: Share = 0.5
        """Share of the aggregated part, in training and at test time."""
        prediction_aggregation_contrast: bool = False
        """Contrast normalisation in the aggregation of predictions. The paper's text has it; the authors'
        code does not."""
        test_aggregation: bool = True
        """Whether to aggregate features and probabilities at test time, as for the published numbers."""
        pixel_share: Annotated[float, Bounds(0, 1, open_below=True)] = 1.0
        """Share of each side's pixels to associate, drawn at random per step. The authors use it to save
        memory (USE_CROP); it is not needed here. 1: all pixels."""

        def supervised(self) -> dict[str, Any]:
            return {"lovasz_weight": self.lovasz_weight}

    titles: ClassVar = {
        "ce": "Cross-entropy",
        "lovasz": "Lovasz-Softmax",
        "lsr": "Adaptive label smoothing (LSR)",
        "feature_matched": "Feature cycles that close in their class",
        "feature_covered": "Target pixels that feature cycles pass",
        "prediction_matched": "Prediction cycles that close in their class",
        "prediction_covered": "Target pixels that prediction cycles pass",
    }
    config: Config

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        if step < config.association_start:
            yield Phase("model", self._supervised(self.model(batch.source_image), batch.source_label))
            return
        # as published, the target is first: batch norm's running statistics then end with the source
        target = self.model(batch.target_image)
        source = self.model(batch.source_image)
        losses, metrics = self._supervised(source, batch.source_label), {}
        associations = self._associations(source, target, batch.source_label, self._pick)
        for level, loss, stats, target_pixels, _ in associations:
            losses[f"{level}_association"] = config.association_weight * joint_mean(loss, stats.matched)
            metrics[f"{level}_matched"] = stats.matched / stats.valid.clamp(min=1)
            metrics[f"{level}_covered"] = stats.covered / target_pixels
        if config.lsr_weight:
            lsr = adaptive_lsr(source.logits, config.lsr_gamma) + adaptive_lsr(
                target.logits, config.lsr_gamma
            )
            losses["lsr"] = config.lsr_weight * lsr
        yield Phase("model", losses, metrics)

    def _associations(
        self,
        source: SegOutput,
        target: SegOutput,
        source_label: Tensor,
        pick: Callable[[Tensor], Tensor | slice] = lambda pixels: ALL,
    ) -> Iterator[tuple[str, Tensor, F.CycleStats, int, Tensor]]:
        """Name, loss, cycles, number of target pixels, and labels [B, N] of each association, features
        first. Uses all pixels, or those that ``pick`` selects."""
        config = self.config
        levels = {}
        if config.feature_association:
            levels["feature"] = ("cosine", source.features, target.features, config.contrast)
        if config.prediction_association:
            probabilities = (
                at_least_float32(source.logits).softmax(1),
                at_least_float32(target.logits).softmax(1),
            )
            levels["prediction"] = ("kl", *probabilities, config.prediction_aggregation_contrast)
        picks: dict[torch.Size, tuple[Tensor | slice, Tensor | slice]] = {}
        for level, (similarity, source_map, target_map, aggregation_contrast) in levels.items():
            # the sizes differ only for HRDA and for heads with finer logits
            size = source_map.shape[2:]
            if size not in picks:
                picks[size] = pick(source_map), pick(target_map)
            pick_source, pick_target = picks[size]
            labels = _at_size_of(source_map, source_label)[:, pick_source]
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
                labels,
                similarity=similarity,
                contrast=config.contrast,
            )
            yield level, loss, stats, target_rows.shape[:2].numel(), labels

    def explain(self, batch: Batch) -> Cycles | None:
        """The cycles of the features between all pixels, or of the predictions if only those are
        associated."""
        source, target = self.model(batch.source_image), self.model(batch.target_image)
        for level, _, stats, _, labels in self._associations(source, target, batch.source_label):
            pixels = (labels, stats.forward_index, stats.end_index)
            maps = [x.features if level == "feature" else x.logits for x in (source, target)]
            grids = [(x.shape[2], x.shape[3]) for x in maps]
            return Cycles(grids[0], grids[1], *(x[0].cpu().numpy() for x in pixels))
        return None

    def _supervised(self, output: SegOutput, labels: Tensor) -> dict[str, Tensor]:
        losses = {"ce": valid_mean_ce(self.model, output, labels)}
        if self.config.lovasz_weight:
            align = self.model.align_corners
            lovasz = F.lovasz_softmax(output.logits, labels, from_logits=True, align_corners=align)
            losses["lovasz"] = self.config.lovasz_weight * lovasz
        return losses

    def _pick(self, pixels: Tensor) -> Tensor | slice:
        if self.config.pixel_share == 1:
            return ALL
        count = pixels.shape[2:].numel()
        keep = max(1, round(count * self.config.pixel_share))
        return torch.randperm(count, device=pixels.device)[:keep]

    def predict(self, images: Tensor) -> SegPrediction:
        """Predict with test-time aggregation of the features before the head and of the probabilities
        after it."""
        if not self.config.test_aggregation:
            return super().predict(images)
        alpha = self.config.aggregation_alpha

        def aggregated(features: Tensor) -> Tensor:
            rows = F.spatial_aggregate(pixel_major(features), alpha=alpha, contrast=self.config.contrast)
            return channel_major(rows, (features.shape[2], features.shape[3]))

        logits = self.model.refined(images, aggregated)
        probabilities = F.spatial_aggregate(
            pixel_major(at_least_float32(logits).softmax(1)),
            alpha=alpha,
            similarity="kl",
            contrast=self.config.prediction_aggregation_contrast,
        )
        return SegPrediction(channel_major(probabilities, (logits.shape[2], logits.shape[3])), True)
