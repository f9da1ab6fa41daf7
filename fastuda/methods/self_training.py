"""Self-training with a mean teacher and ClassMix (DACS, Tranheden et al., WACV 2021, arXiv 2007.08702).

The constants are those of its successors (DAFormer, SePiCo), whose base it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

import fastuda.ops as F
from fastuda import augment
from fastuda.data.batch import Batch
from fastuda.distributed import joint_share
from fastuda.methods.base import Method, Phase, register
from fastuda.models.ema import EMATeacher
from fastuda.models.segmentor import Segmentor
from fastuda.parallel import bare


class PseudoLabel(NamedTuple):
    """The teacher's opinion of target images."""

    label: Tensor
    """[B, H, W] int64."""
    weight: Tensor
    """[B, H, W]: one share for the whole batch, 0 in the rows that are not trusted."""
    confident: Tensor
    """Share of the batch's pixels whose probability reaches the threshold."""


def pixel_mean_ce(logits: Tensor, labels: Tensor, align: bool, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over the labelled pixels and divided by all pixels (mmsegmentation's mean)."""
    total = F.upsample_cross_entropy(
        logits, labels, align_corners=align, pixel_weight=weight, reduction="sum"
    )
    return total / labels.numel()


@register("self_training")
class SelfTraining(Method):
    """``CE(source) + ssl_weight CE(mixed)``: half of a source image's classes are pasted onto a target image,
    whose other pixels carry the teacher's label, weighted by the share of confident pixels in the batch.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        ema_decay: float = 0.999
        """Cap of the teacher's ``min(1 - 1 / (t + 1), decay)``; parameters only, as published."""
        threshold: float = 0.968
        """Probability from which a pixel counts as confident."""
        ssl_weight: float = 1.0
        """Of the loss on the mixed image."""
        ignore_top: int = 0
        """Rows at the top whose pseudo-labels get weight 0 (published: 15 of a 640 crop of Cityscapes)."""
        ignore_bottom: int = 0
        """Rows at the bottom (published: 120)."""
        mix_share: float = 0.5
        """Share of a source image's classes that is pasted onto the target, rounded up."""
        jitter_share: float = 0.8
        """Share of images whose colours are jittered."""
        jitter_strength: float = 0.2
        blur_share: float = 0.5
        """Share of images that are blurred."""

    config: Config

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        self.teacher = EMATeacher(model, config.ema_decay)

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        self.teacher.update(bare(self.model))
        align = self.model.align_corners
        pseudo = self._pseudo_label(self.teacher(batch.target_image).logits, batch.target_image)
        source = pixel_mean_ce(self.model(batch.source_image).logits, batch.source_label, align)
        yield Phase("model", {"ce": source}, {"confident": pseudo.confident})
        del source
        yield self._mixed(batch, pseudo)

    def _pseudo_label(self, logits: Tensor, images: Tensor) -> PseudoLabel:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = nnf.interpolate(
            wide, images.shape[2:], mode="bilinear", align_corners=self.model.align_corners
        )
        probability, label = scores.softmax(1).max(1)
        return self._weighted(probability, label)

    def _weighted(self, probability: Tensor, label: Tensor) -> PseudoLabel:
        confident = joint_share((probability >= self.config.threshold).to(probability.dtype).mean())
        weight = confident.expand(label.shape).clone()
        weight[:, : self.config.ignore_top] = 0
        if self.config.ignore_bottom:
            weight[:, -self.config.ignore_bottom :] = 0
        return PseudoLabel(label, weight, confident)

    def _mixed(self, batch: Batch, pseudo: PseudoLabel) -> Phase:
        mask = augment.class_mask(batch.source_label, self.config.mix_share)
        image = augment.paste(mask, batch.source_image, batch.target_image)
        label = augment.paste(mask, batch.source_label, pseudo.label)
        weight = torch.where(mask, 1.0, pseudo.weight)
        logits = self.model(self._strong(image)).logits
        loss = pixel_mean_ce(logits, label, self.model.align_corners, weight)
        return Phase("model", {"mixed": self.config.ssl_weight * loss})

    def _strong(self, images: Tensor) -> Tensor:
        config = self.config
        if config.jitter_share:
            images = augment.colour_jitter(
                images, self.model.input, config.jitter_strength, config.jitter_share
            )
        return augment.gaussian_blur(images, share=config.blur_share) if config.blur_share else images
