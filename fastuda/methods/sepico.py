"""SePiCo: semantic-guided pixel contrast (Xie et al., TPAMI 2022, arXiv 2204.08808).

In addition to self-training, pixels of both domains are attracted to prototypes of their classes, which
are computed from the teacher's embeddings of labelled source pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.methods.base import Phase
from fastuda.methods.cells import downsample_labels
from fastuda.methods.crops import balanced_crops, cut
from fastuda.methods.registry import register
from fastuda.methods.self_training import PseudoLabel, SelfTraining
from fastuda.methods.tensors import at_least_float32
from fastuda.models.ema import EMATeacher
from fastuda.models.projection import ProjectionHead
from fastuda.models.segmentor import Detail, Segmentor
from fastuda.ops import ClassStatistics, PrototypeBank
from fastuda.system.distributed import joint_mean, joint_share, joint_sum
from fastuda.system.settings import Count, Natural, Positive, Size


class StudentOutput(NamedTuple):
    """Output of a segmentor with a projection head."""

    features: Tensor
    """[B, C, h, w]."""
    logits: Tensor
    """[B, K, h, w]."""
    embedding: Tensor | None
    """[B, A, h, w] unit vectors, if requested."""
    deepest: Tensor | None
    """As of the segmentor."""
    detail: Detail | None
    """As of the segmentor."""


class Student(nn.Module):
    """A segmentor with a projection head, which is dropped after training."""

    def __init__(self, segmentor: Segmentor, width: int, hidden: int | None = None):
        super().__init__()
        self.segmentor = segmentor
        self.projection = ProjectionHead(segmentor.feature_channels, hidden, width)

    def forward(self, images: Tensor, project: bool = False) -> StudentOutput:
        out = self.segmentor(images)
        embedding = self.projection(out.features) if project else None
        return StudentOutput(out.features, out.logits, embedding, out.deepest, out.detail)

    def param_groups(
        self, lr: float, head_lr_mult: float = 1.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """The segmentor's parameter groups and the projection head's, which has the head's learning rate."""
        groups = self.segmentor.param_groups(lr, head_lr_mult, layer_decay)
        return [*groups, {"params": list(self.projection.parameters()), "lr": lr * head_lr_mult}]


@register("sepico")
class SePiCo(SelfTraining):
    """``CE(source) + CE(mixed) + sum over domains of contrast_weight (L_cl + regularizer_weight L_reg)``.

    ``L_cl`` is one of the three losses of :func:`fastuda.ops.prototype_contrast`; ``L_reg = 1 / (K ln K)
    sum_k ln softmax_k(Q mu / tau)`` of the batch's mean embedding Q. At the published tau of 100 the contrast
    stays within about 0.01 of ln K. The informative curves are ``contrast_gap`` (``L_cl - ln K``) and
    ``centroid_accuracy``, the share of pixels whose nearest prototype is that of their class.

    Statistics and banks are buffers, saved in checkpoints and shared by all ranks; in the authors' code
    they are neither.
    """

    @dataclass(frozen=True)
    class Config(SelfTraining.Config):
        variant: Literal["dist", "bank", "proto"] = "dist"
        """The contrast: DistCL, BankCL or ProtoCL."""
        tau: Positive = 100.0
        """Temperature of the inner products. The published 100 gives a gradient of about 0.006 per pixel;
        contrastive losses usually use about 0.1 (not published)."""
        contrast_weight: float = 1.0
        """Weight of L_cl and L_reg together, for each domain; published 1."""
        contrast_start: Natural = 3000
        """First step with the contrast; statistics are collected from step 0."""
        regularizer_weight: float = 1.0
        """Weight of L_reg relative to the contrast. The published sign pushes away from the uniform
        distribution; a negative weight gives the diversity term that the paper's text describes. It has no
        measurable effect at tau = 100."""
        width: Count = 512
        """Width of the embedding."""
        hidden: Count | None = None
        """Hidden width of the projection head; None: the width of the features (published for ResNet; for
        MiT 256)."""
        bank_length: Count = 200
        """Local centroids per class (BankCL)."""
        min_share: float = 0.75
        """Share of a feature's cell that one class must fill for the feature to get its label."""
        balanced_crop: Size | None = None
        """Class-balanced crop of the target (height, width): the best of ``crop_candidates`` by the
        teacher's labels of the loaded image. None: no crop."""
        crop_candidates: Count = 10
        """Number of crops that ``balanced_crop`` draws."""

    config: Config
    seen: Tensor
    mean: Tensor
    variance: Tensor
    bank: Tensor
    bank_count: Tensor

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        self.student = Student(model, config.width, config.hidden)
        self.teacher = EMATeacher(self.student, config.ema_decay)
        self.register_buffer("seen", torch.zeros(num_classes))
        self.register_buffer("mean", torch.zeros(num_classes, config.width))
        self.register_buffer("variance", torch.zeros(num_classes, config.width))
        length = config.bank_length if config.variant == "bank" else 0
        self.register_buffer("bank", torch.zeros(num_classes, length, config.width))
        # as published, every bank starts with one zero vector
        self.register_buffer("bank_count", torch.ones(num_classes, dtype=torch.int64))

    def networks(self) -> dict[str, nn.Module]:
        return {"model": self.student}

    @property
    def statistics(self) -> ClassStatistics:
        """Statistics of all source embeddings of the teacher so far."""
        return ClassStatistics(self.seen, self.mean, self.variance)

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        config = self.config
        contrast, mixing = step >= config.contrast_start, step >= config.mix_start
        self._follow(self.student, step)
        labelled = self._target(batch) if contrast or mixing else None
        self._gather(batch)

        images = self._strong(batch.source_image)
        source = self.student(images, project=contrast)
        ce = self._ce(source, batch.source_label)
        losses: dict[str, Tensor] = {"ce": ce} | self._source_distance(source, images, batch.source_label)
        metrics = {} if labelled is None else {"confident": labelled[1].confident}
        if source.embedding is not None:
            self._contrast("source", source.embedding, batch.source_label, losses, metrics)
        yield Phase("model", losses, metrics)
        del source, images, losses, ce
        if labelled is None:
            return

        target, pseudo = labelled
        if contrast:
            strong = self.student(self._strong(target), project=True)
            trusted = torch.where(pseudo.weight > 0, pseudo.label, 255)
            losses, metrics = {}, {}
            self._contrast("target", strong.embedding, trusted, losses, metrics)
            yield Phase("model", losses, metrics)
            del strong, losses
        if mixing:
            yield from self._on_target(self.student, batch, target, pseudo)

    def _target(self, batch: Batch) -> tuple[Tensor, PseudoLabel]:
        """The target images to train on and their labels, cropped for class balance if requested."""
        images, match, size = batch.target_image, batch.target_match, self.config.balanced_crop
        pseudo = self._pseudo_label(images, match)
        if size is None:
            return images, pseudo
        if images.shape[2] < size[0] or images.shape[3] < size[1]:
            raise UserError(
                f"method.balanced_crop is {size[0]} x {size[1]} and the target images are {images.shape[2]} x"
                f" {images.shape[3]}: raise data.target_crop, or lower method.balanced_crop"
            )
        corners = balanced_crops(pseudo.label, size, self.config.crop_candidates, self.num_classes)
        images = cut(images, corners, size)
        return images, self._pseudo_label(images, None if match is None else cut(match, corners, size))

    def _rows(self, embedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        size = (embedding.shape[2], embedding.shape[3])
        small = downsample_labels(labels, size, self.num_classes, self.config.min_share)
        return embedding.movedim(1, -1).flatten(0, 2), small.flatten()

    @torch.no_grad()
    def _gather(self, batch: Batch) -> None:
        """Merge the teacher's embeddings of the plain source into the statistics and the banks."""
        embedding = self.teacher(batch.source_image, project=True).embedding
        rows, labels = self._rows(embedding, batch.source_label)
        statistics = F.class_statistics(rows, labels, self.num_classes).all_reduce()
        total = self.statistics.merge(
            ClassStatistics(
                *(x.to(self.seen.dtype) for x in (statistics.count, statistics.mean, statistics.variance))
            )
        )
        self.seen.copy_(total.count)
        self.mean.copy_(total.mean)
        self.variance.copy_(total.variance)
        if self.config.variant == "bank":
            self._append(statistics)

    def _append(self, statistics: ClassStatistics) -> None:
        """Append the batch's class means; a full queue drops its oldest entry."""
        new = statistics.count > 0
        full = new & (self.bank_count == self.config.bank_length)
        rolled = self.bank.roll(-1, 1)
        self.bank.copy_(torch.where(full[:, None, None], rolled, self.bank))
        place = self.bank_count.clamp(max=self.config.bank_length - 1)
        place = torch.where(new & ~full, self.bank_count, place)
        slot = (place[:, None] == torch.arange(self.config.bank_length, device=place.device)) & new[:, None]
        self.bank.copy_(torch.where(slot[..., None], statistics.mean[:, None].to(self.bank.dtype), self.bank))
        self.bank_count.copy_((self.bank_count + new).clamp(max=self.config.bank_length))

    def _contrast(
        self,
        domain: str,
        embedding: Tensor,
        labels: Tensor,
        losses: dict[str, Tensor],
        metrics: dict[str, Tensor],
    ) -> None:
        config = self.config
        q, y = self._rows(embedding, labels)
        valid = (y != 255).sum()
        prototypes: ClassStatistics | PrototypeBank = self.statistics
        if config.variant == "bank":
            prototypes = PrototypeBank(self.bank, self.bank_count)
        raw = F.prototype_contrast(q, y, prototypes, kind=config.variant, tau=config.tau)
        loss = joint_mean(raw, valid)
        losses[f"contrast_{domain}"] = config.contrast_weight * loss
        if config.regularizer_weight:
            weight = config.contrast_weight * config.regularizer_weight
            losses[f"regularizer_{domain}"] = weight * self._regularizer(q, y)
        with torch.no_grad():
            gap = raw.detach() - math.log(self.num_classes)
            metrics[f"contrast_gap_{domain}"] = gap * (valid > 0)  # without labelled pixels there is no gap
            with torch.autocast(q.device.type, enabled=False):
                nearest = (q.to(self.mean.dtype) @ self.mean.T).argmax(1)
            metrics[f"centroid_accuracy_{domain}"] = ((nearest == y) & (y != 255)).sum() / valid.clamp(min=1)

    def _regularizer(self, q: Tensor, y: Tensor) -> Tensor:
        # no early return: all ranks must reach the collectives. No indexing: it would need a device sync
        keep = y != 255
        count = keep.sum()
        with torch.autocast(q.device.type, enabled=False):
            rows = at_least_float32(q)
            total = keep.to(rows.dtype) @ rows
        centre = joint_mean(total / count.clamp(min=1), count)
        # each rank has its share of the joint mean with gradient; the rest is added without
        centre = centre + (joint_share(centre) - centre).detach()
        with torch.autocast(q.device.type, enabled=False):
            scores = centre.to(self.mean.dtype) @ self.mean.T / self.config.tau
            # for a single class the logarithm is 0, so any divisor will do
            value = scores.log_softmax(0).sum() / (self.num_classes * math.log(max(self.num_classes, 2)))
            return value * (joint_sum(count) > 0)
