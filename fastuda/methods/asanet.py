"""ASANet: adaptation in the affinity space (Zhou et al., IEEE TIP 2020, arXiv 2009.12559).

The method adapts the relation of neighbouring pixels' predictions: by cleaning (ASC), or with a
discriminator of the two domains' affinities (ASA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.methods.adversarial import SOURCE, TARGET, domain_loss
from fastuda.methods.base import Method, Phase, frozen
from fastuda.methods.losses import valid_mean_ce
from fastuda.methods.registry import register
from fastuda.methods.tensors import upsampled
from fastuda.models.discriminators import affinity_discriminator
from fastuda.models.segmentor import Segmentor
from fastuda.system.settings import Count


@register("asanet")
class ASANet(Method):
    """``asa``: ``CE + w (1 - t / T) BCE(D(a(p_t)), source)`` with ``a`` the Bernoulli-KL affinities, and for
    the discriminator ``1/2 BCE(D(a(p_s)), source) + 1/2 BCE(D(a(p_t)), target)``.
    ``asc``: ``CE + w_c mean(1 - sum_c p_i p_j)`` on the target, without a discriminator.

    As published, predictions are upsampled to the image size before the affinities are computed.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        strategy: Literal["asa", "asc"] = "asa"
        """The strategy; the paper reports the two separately."""
        neighbours: Literal[4, 8] = 8
        """Neighbours of a pixel; published 8."""
        adversarial_weight: float = 1e-3
        """Weight of ASA's loss, decreasing linearly to 0 over the schedule."""
        damping: bool = True
        """Whether the adversarial weight decreases linearly."""
        cleaning_weight: float = 0.1
        """Weight of ASC's loss. Not published: the authors' code defines the loss but never calls it."""
        width: Count = 64
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
        if config.strategy == "asa":
            self.discriminator = affinity_discriminator(num_classes, config.neighbours, config.width)

    def networks(self) -> dict[str, nn.Module]:
        if self.config.strategy == "asc":
            return {"model": self.model}
        return {"model": self.model, "discriminator": self.discriminator}

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        output = self.model(batch.source_image)
        ce = valid_mean_ce(self.model, output, batch.source_label)
        source = output.logits.detach()
        del output  # the backward frees its maps one after another
        yield Phase("model", {"ce": ce})
        del ce

        target = self._upsample(self.model(batch.target_image).logits, batch.target_image)
        if config.strategy == "asc":
            cleaning = F.affinity_cleaning_loss(target, neighbours=config.neighbours)
            yield Phase("model", {"cleaning": config.cleaning_weight * cleaning})
            return
        affinity = F.local_affinity(target.softmax(1), neighbours=config.neighbours)
        with frozen(self.discriminator):
            fooled = domain_loss(self.discriminator(affinity), SOURCE)
        damping = 1 - step / self.horizon if config.damping and self.horizon else 1.0
        yield Phase("model", {"adversarial": config.adversarial_weight * max(damping, 0.0) * fooled})
        affinity = affinity.detach()
        del target, fooled

        with torch.no_grad():
            probabilities = self._upsample(source, batch.source_image).softmax(1)
            source_affinity = F.local_affinity(probabilities, neighbours=config.neighbours)
        losses = {
            "discriminator_source": 0.5 * domain_loss(self.discriminator(source_affinity), SOURCE),
            "discriminator_target": 0.5 * domain_loss(self.discriminator(affinity), TARGET),
        }
        yield Phase("discriminator", losses)

    def _upsample(self, logits: Tensor, images: Tensor) -> Tensor:
        return upsampled(logits, images, self.model.align_corners)
