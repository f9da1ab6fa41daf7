"""FADA: class-wise adversarial adaptation (Wang et al., Classes Matter, ECCV 2020, arXiv 2007.09222).

A discriminator with 2 K channels models class and domain of a feature jointly; its soft labels are the
segmenter's predictions. This is the adversarial stage; ``fastuda.engine.stages`` runs all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.methods.base import Method, Phase, frozen
from fastuda.methods.losses import valid_mean_ce
from fastuda.methods.registry import register
from fastuda.models.discriminators import ClassDomainDiscriminator
from fastuda.models.segmentor import Segmentor
from fastuda.system.settings import Bounds, Count, Positive, Share


@register("fada")
class FADA(Method):
    """``L_seg + adversarial_weight SCE(D(F(x_t)), [a_t; 0])`` for the segmenter, and
    ``1/2 SCE(D(F(x_s)), [a_s; 0]) + 1/2 SCE(D(F(x_t)), [0; a_t])`` for the discriminator.

    ``a = min(softmax(logits / temperature), clip)``, detached; see :func:`fastuda.ops.domain_cross_entropy`.
    As published, the discriminator gets the features from before the segmenter's step.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        adversarial_weight: float = 1e-3
        """Weight of the segmenter's domain loss; published 0.001."""
        temperature: Positive = 1.8
        """Temperature of the segmentation logits in the encodings and, as in the authors' code, in the
        segmentation loss."""
        clip: Annotated[float, Bounds(0, 1, open_below=True)] = 0.9
        """Largest entry of an encoding; the others are not renormalised."""
        hard_threshold: Share | None = None
        """Threshold of the paper's hard variant (not in the authors' code): one-hot encodings of
        probabilities that reach it, no encoding otherwise. None: soft encodings."""
        width: Count = 256
        """Width of the discriminator's first layer."""

    config: Config
    target_second = True
    optim_defaults: ClassVar[dict[str, Any]] = {
        "optim.networks.discriminator.name": "adam",
        "optim.networks.discriminator.lr": 1e-4,
        "optim.networks.discriminator.betas": [0.9, 0.99],
        "optim.networks.discriminator.weight_decay": 0.0,
    }

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        self.discriminator = ClassDomainDiscriminator(model.feature_channels, num_classes, config.width)

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.model, "discriminator": self.discriminator}

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        encoding: dict[str, Any] = {
            "temperature": config.temperature,
            "clip": config.clip,
            "hard_threshold": config.hard_threshold,
            "align_corners": self.model.align_corners,
        }
        source = self.model(batch.source_image)
        ce = valid_mean_ce(self.model, source, batch.source_label, config.temperature)
        yield Phase("model", {"ce": ce})
        source_features, source_logits = source.features.detach(), source.logits.detach()
        del source, ce

        target = self.model(batch.target_image)
        target_size = (batch.target_image.shape[2], batch.target_image.shape[3])
        with frozen(self.discriminator):
            fooled = self.discriminator(target.features)
        adversarial = F.domain_cross_entropy(
            fooled, target.logits, encode="source", size=target_size, **encoding
        )
        yield Phase("model", {"adversarial": config.adversarial_weight * adversarial})
        target_features, target_logits = target.features.detach(), target.logits.detach()
        del target, fooled, adversarial

        source_size = (batch.source_image.shape[2], batch.source_image.shape[3])
        on_source = F.domain_cross_entropy(
            self.discriminator(source_features), source_logits, encode="source", size=source_size, **encoding
        )
        on_target = F.domain_cross_entropy(
            self.discriminator(target_features), target_logits, encode="target", size=target_size, **encoding
        )
        yield Phase(
            "discriminator",
            {"discriminator_source": 0.5 * on_source, "discriminator_target": 0.5 * on_target},
        )
