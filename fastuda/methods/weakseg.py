"""WeakSegDA: adaptation with weak labels (Paul et al., ECCV 2020, arXiv 2007.15176).

The target's weak labels are the classes that an image shows: predicted by the network itself (UDA),
annotated as tags, or as single labelled points (WDA).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.methods.adversarial import SOURCE, TARGET, domain_loss
from fastuda.methods.base import Method, Phase, frozen
from fastuda.methods.losses import valid_mean_ce
from fastuda.methods.registry import register
from fastuda.methods.tensors import at_least_float32, pixel_major, upsampled
from fastuda.models.discriminators import CategoryDiscriminators, FCDiscriminator
from fastuda.models.segmentor import Segmentor
from fastuda.system.distributed import joint_mean, joint_sum
from fastuda.system.settings import Count, Positive, Share

EPS_PROBABILITY = 1e-7


def present_class_loss(logits: Tensor, present: Tensor, domain: float) -> Tensor:
    """Binary cross-entropy with one domain label, averaged over an image's present classes and then over the
    images that have any; 0 if no image has.

    Args:
        logits: [B, K] of the category discriminators.
        present: [B, K] bool.
        domain: 0 source, 1 target.
    """
    wide = at_least_float32(logits)
    each = nnf.binary_cross_entropy_with_logits(wide, torch.full_like(wide, domain), reduction="none")
    count = present.sum(1)
    mean = (each * present).sum(1) / count.clamp(min=1)
    images = (count > 0).sum()
    return joint_mean(mean.sum() / images.clamp(min=1), images)


@register("weakseg")
class WeakSeg(Method):
    """``CE + w_a BCE(D(p_t), source) + w_c L_c + w_p L_point + w_k L_adv^C``.

    ``L_c`` is the binary cross-entropy of the smooth maximum of each class's logits with the weak label.
    ``L_adv^C`` pools features by each class's attention and uses one discriminator per present class. As
    published, the attention has no gradient, so that ``L_adv^C`` trains the backbone alone.

    Source images get tags from their labels: a class is present if it fills more than ``tag_share`` of its
    mean share in the images that show it. The authors compare pixel counts of different resolutions (which
    changes their thresholds by factors of 2.2 and 0.25); shares avoid this.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        weak_labels: Literal["pseudo", "tags", "points"] = "pseudo"
        """pseudo (UDA), or tags or points (WDA), which need ``data.weak_labels``."""
        pseudo_threshold: Share = 0.2
        """Probability from which a class counts as present (pseudo)."""
        classification_weight: float = 0.01
        """Weight of L_c. For tags and points the authors' text says 0.2; their scripts use 0.01."""
        category_weight: float = 1e-3
        """Weight of L_adv^C; 0 disables the category discriminators."""
        adversarial_weight: float = 1e-3
        """Weight of the output-space alignment; 0 disables it."""
        point_weight: float = 1.0
        """Weight of the cross-entropy at the points (weak_labels: points)."""
        dropout: Share = 0.1
        """Dropout of the logits in L_c."""
        tag_share: float = 0.1
        """Factor of a class's mean share above which a source image has its tag. The published runs intend
        0.1 and use 0.218 for GTA5, whose pixels they count at another resolution than the mean."""
        smooth_max: Positive = 1.0
        """Sharpness k of the smooth maximum."""
        category_width: Count | None = None
        """Hidden width of the category discriminators; None: the width of the features, as published."""

    config: Config
    target_second = True
    optim_defaults: ClassVar[dict[str, Any]] = {
        "optim.networks.output.name": "adam",
        "optim.networks.output.lr": 1e-4,
        "optim.networks.output.betas": [0.9, 0.99],
        "optim.networks.output.weight_decay": 0.0,
        "optim.networks.output.clip_norm": None,  # as published, only the segmentor's gradient is clipped
        "optim.networks.category.name": "adam",
        "optim.networks.category.lr": 1e-4,
        "optim.networks.category.betas": [0.9, 0.99],
        "optim.networks.category.weight_decay": 0.0,
        "optim.networks.category.clip_norm": None,
    }
    shown: Tensor
    mean_share: Tensor

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        if config.adversarial_weight:
            self.output = FCDiscriminator(num_classes)
        if config.category_weight:
            self.category = CategoryDiscriminators(model.feature_channels, num_classes, config.category_width)
        self.register_buffer("shown", torch.zeros(num_classes))
        self.register_buffer("mean_share", torch.zeros(num_classes))

    def networks(self) -> dict[str, nn.Module]:
        names = ["model"]
        names += ["output"] if self.config.adversarial_weight else []
        names += ["category"] if self.config.category_weight else []
        return {name: getattr(self, name) for name in names}

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        source = self.model(batch.source_image)
        ce = valid_mean_ce(self.model, source, batch.source_label)
        yield Phase("model", {"ce": ce})
        source_features, source_logits = source.features.detach(), source.logits.detach()
        del source, ce

        target = self.model(batch.target_image)
        weak = self._weak_labels(batch, target.logits)
        losses = {"weak": config.classification_weight * self._classification(target.logits, weak)}
        if config.weak_labels == "points":
            losses["points"] = config.point_weight * self._point_loss(batch, target.logits)
        target_pooled = self._pool(target.features, target.logits) if config.category_weight else None
        if target_pooled is not None:
            with frozen(self.category):
                (category,) = self._judge((target_pooled, weak, SOURCE))
            losses["category"] = config.category_weight * category
            del category
        target_map = (
            self._probabilities(target.logits, batch.target_image) if config.adversarial_weight else None
        )
        if target_map is not None:
            with frozen(self.output):
                losses["adversarial"] = config.adversarial_weight * domain_loss(
                    self.output(target_map), SOURCE
                )
        yield Phase("model", losses, {"weak_classes": weak.float().sum(1).mean()})
        losses = {}

        if target_map is not None:
            source_map = self._probabilities(source_logits, batch.source_image)
            on_source = domain_loss(self.output(source_map), SOURCE)
            on_target = domain_loss(self.output(target_map.detach()), TARGET)
            yield Phase("output", {"output_source": 0.5 * on_source, "output_target": 0.5 * on_target})
        if target_pooled is not None:
            tags = self._source_tags(batch.source_label)
            source_pooled = self._pool(source_features, source_logits)
            on_source, on_target = self._judge(
                (source_pooled, tags, SOURCE), (target_pooled.detach(), weak, TARGET)
            )
            yield Phase("category", {"category_source": 0.5 * on_source, "category_target": 0.5 * on_target})

    def _weak_labels(self, batch: Batch, logits: Tensor) -> Tensor:
        """[B, K] bool, constants."""
        if self.config.weak_labels == "pseudo":
            scores = F.smooth_max_pool(logits.detach(), k=self.config.smooth_max)
            return scores.sigmoid().clamp(EPS_PROBABILITY, 1 - EPS_PROBABILITY) > self.config.pseudo_threshold
        if batch.target_tags is None:
            raise UserError(
                f"method.weak_labels is {self.config.weak_labels}, but the target has none: give"
                " data.weak_labels, your own file or one of python -m fastuda.data index DOMAIN --weak FILE"
            )
        return batch.target_tags

    def _classification(self, logits: Tensor, weak: Tensor) -> Tensor:
        dropped = nnf.dropout(logits, self.config.dropout, training=self.training)
        probability = F.smooth_max_pool(dropped, k=self.config.smooth_max).sigmoid()
        probability = probability.clamp(EPS_PROBABILITY, 1 - EPS_PROBABILITY)
        return -torch.where(weak, probability.log(), (1 - probability).log()).mean()

    def _point_loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """Mean of ``-log softmax(upsampled logits)`` at the points' classes."""
        if batch.target_points is None or batch.target_tags is None:
            raise UserError(
                "method.weak_labels is points, but the file of data.weak_labels has no points of the classes"
                " that are trained"
            )
        y, x, label = batch.target_points.unbind(2)
        tagged = batch.target_tags.gather(1, label.clamp(max=self.num_classes - 1))
        keep = (label != 255) & tagged
        height, width = batch.target_image.shape[2:]
        # unused points go to an extra pixel after the image: selecting the others would need a sync
        place = torch.where(keep, y * width + x, height * width)
        sparse = torch.full((len(label), height * width + 1), 255, device=label.device)
        sparse = sparse.scatter(1, place, label)[:, :-1].unflatten(1, (height, width))
        loss = F.upsample_cross_entropy(logits, sparse, align_corners=self.model.align_corners)
        return joint_mean(loss, (sparse != 255).sum())

    def _pool(self, features: Tensor, logits: Tensor) -> Tensor:
        """[B, C, K]."""
        if logits.shape[2:] != features.shape[2:]:  # a head with finer logits
            logits = nnf.interpolate(logits, features.shape[2:], mode="area")
        return F.category_pool(pixel_major(features), pixel_major(logits.detach())).transpose(1, 2)

    def _judge(self, *sides: tuple[Tensor, Tensor, float]) -> list[Tensor]:
        """The category discriminators' losses of (pooled features, present classes, domain), in one pass.
        Absent classes are computed as well: skipping them would need a device sync."""
        logits = self.category(torch.cat([pooled for pooled, _, _ in sides]))
        parts = logits.split([len(pooled) for pooled, _, _ in sides])
        return [
            present_class_loss(part, present, domain)
            for part, (_, present, domain) in zip(parts, sides, strict=True)
        ]

    def _probabilities(self, logits: Tensor, images: Tensor) -> Tensor:
        pixels = upsampled(logits, images, self.model.align_corners).permute(0, 2, 3, 1)
        return pixels.softmax(3).permute(0, 3, 1, 2)  # channels-last, as the discriminator reads them

    @torch.no_grad()
    def _source_tags(self, labels: Tensor) -> Tensor:
        """Classes that fill more than ``tag_share`` of their mean share so far, over the images that show
        them."""
        flat = torch.where(labels == 255, self.num_classes, labels).flatten(1)
        counts = self.shown.new_zeros(len(flat), self.num_classes + 1)
        counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
        share = counts[:, : self.num_classes] / flat.shape[1]
        present = share > self.config.tag_share * self.mean_share
        images, total = joint_sum(torch.stack([present.to(share.dtype).sum(0), (share * present).sum(0)]))
        seen = self.shown + images
        self.mean_share.copy_((self.mean_share * self.shown + total) / seen.clamp(min=1))
        self.shown.copy_(seen)
        return present
