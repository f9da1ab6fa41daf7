"""Self-training with a mean teacher and ClassMix (DACS, Tranheden et al., WACV 2021, arXiv 2007.08702).

The constants are those of its successors, DAFormer and SePiCo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastuda.data.loading import augment
from fastuda.data.loading.batch import Batch
from fastuda.errors import UserError
from fastuda.methods.base import Method, Phase, SegPrediction
from fastuda.methods.day_night import fuse_matched, rarity_weights
from fastuda.methods.feature_distance import InitialFeatures, feature_distance
from fastuda.methods.losses import pixel_mean_ce, with_detail
from fastuda.methods.registry import register
from fastuda.methods.tensors import upsampled
from fastuda.models.ema import EMATeacher
from fastuda.models.mask_tokens import masked_tokens
from fastuda.models.segmentor import Segmentor
from fastuda.system.ddp import bare
from fastuda.system.distributed import joint_share
from fastuda.system.settings import Count, Natural, NonNegative, Share


class PseudoLabel(NamedTuple):
    """Pseudo-labels of target images."""

    label: Tensor
    """[B, H, W] int64."""
    weight: Tensor
    """[B, H, W]: one weight for the whole batch, 0 in rows that are not used."""
    confident: Tensor
    """Share of the batch's pixels whose probability reaches the threshold."""


@register("self_training")
class SelfTraining(Method):
    """``CE(source) + ssl_weight CE(mixed) + mask_weight CE(masked)``: half of a source image's classes are
    pasted onto a target image. The other pixels have the teacher's label, weighted by the share of confident
    pixels in the batch. In masked images (MIC), random blocks or tokens are hidden, and all pixels have the
    label of the whole image: the teacher's, or a source image's own.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        ema_decay: Share = 0.999
        """Decay of the teacher: ``min(1 - 1 / (t + 1), decay)``. Averages only parameters, as published."""
        threshold: NonNegative = 0.968
        """Smallest probability of a confident pixel."""
        flip_pseudo_label: bool = False
        """Average the teacher's probabilities with those of the mirrored image (VFM-UDA)."""
        ssl_weight: float = 1.0
        """Weight of the loss on the mixed image."""
        mix_start: Natural = 0
        """First step with the losses on target images (published: 0). Until then the student trains on the
        source alone. The teacher follows it and labels nothing, so that its first labels are better."""
        ignore_top: Natural = 0
        """Rows at the top without pseudo-labels (published: 15 of a 640 crop of Cityscapes)."""
        ignore_bottom: Natural = 0
        """Rows at the bottom without pseudo-labels (published: 120)."""
        mix_share: Share = 0.5
        """Share of a source image's classes to paste onto the target, rounded up."""
        jitter_share: Share = 0.8
        """Share of images with colour jitter."""
        jitter_strength: NonNegative = 0.2
        """Strength of the jitter of brightness, contrast, saturation, and hue (in turns)."""
        blur_share: Share = 0.5
        """Share of blurred images."""
        mask_ratio: Share = 0.0
        """Share of the blocks or tokens to hide in a target image, for masked image consistency (published
        0.7); 0: off."""
        mask_kind: Literal["blocks", "tokens"] = "blocks"
        """What is hidden: blocks of pixels (MIC), or patches of a ViT of hf:PATH, whose tokens become its
        learnt mask token (VFM-UDA)."""
        mask_block: Count = 32
        """Side of a block in pixels (published: 32 for crops at half resolution, 64 at full resolution)."""
        mask_weight: NonNegative = 1.0
        """Weight of the loss on the masked image."""
        mask_images: Literal["target", "both"] = "target"
        """Images to mask: target (published for GTA5 and SYNTHIA), or both, half of the source images and
        half of the target images (published for Cityscapes to ACDC and Dark Zurich)."""
        mask_strong: bool = True
        """Whether masked images have jitter and blur as well (published: not with both)."""
        feature_distance: NonNegative = 0.0
        """Weight of the distance of the source's features to those of the initial weights (published: 0.005
        in DAFormer, 0.1 in VFM-UDA++); 0: off."""
        feature_target: NonNegative = 0.0
        """The same on the target, over all cells (published: 0.1 in VFM-UDA++); 0: off."""
        feature_loss: Literal["norm", "cosine"] = "norm"
        """Distance of a cell: norm (DAFormer) or cosine, with smooth L1 (VFM-UDA++)."""
        feature_classes: tuple[Natural, ...] | None = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
        """Classes whose cells of the source count: Cityscapes' things; None: all cells (VFM-UDA++)."""
        feature_share: Share = 0.75
        """Share of a cell that one class must fill for the cell to have it."""
        static_classes: tuple[int, ...] = (0, 1, 2, 3, 4, 8, 9, 10)
        """Classes whose pseudo-labels also use a matched image (``data.pairs``): Cityscapes' road,
        sidewalk, building, wall, fence, vegetation, terrain and sky."""
        match_share: Share = 0.8
        """Weight of the matched image's probability if it exceeds ``match_threshold``; otherwise the
        weight of the target image's own."""
        match_threshold: Share = 0.4
        """Threshold of the matched image's probability; published 0.4."""
        class_frequencies: tuple[float, ...] | None = None
        """Share of the source's pixels per class, for class weights; None: equal weights."""
        class_spread: float = 0.05
        """Spread of the class weights in losses and pseudo-labels (published for Dark Zurich)."""
        test_spread: float = 0.0
        """Spread of the class weights in predictions (published for Dark Zurich: 0.16)."""

        def keeps_initial(self) -> bool:
            return bool(self.feature_distance or self.feature_target)

    config: Config
    class_weight: Tensor | None

    def __init__(self, config: Config, model: Segmentor, num_classes: int):
        super().__init__(config, model, num_classes)
        tokens = config.mask_ratio and config.mask_kind == "tokens"
        if tokens and getattr(model.backbone, "token_masks", None) is None:
            raise UserError(
                "method.mask_kind=tokens needs a ViT with a mask token, such as DINOv2 by --backbone hf:PATH;"
                " method.mask_kind=blocks works with every network"
            )
        self.teacher = EMATeacher(model, config.ema_decay)
        self.followed = -1
        """The step of the last teacher update: it moves once a step, however many batches a step has."""
        self.initial: InitialFeatures | None = None
        if model.pretrained and config.keeps_initial():
            self.initial = InitialFeatures(model)
        self.register_buffer("class_weight", self._rarity(config.class_spread), persistent=False)

    def _rarity(self, spread: float) -> Tensor | None:
        frequencies = self.config.class_frequencies
        if frequencies is None or spread == 0:
            return None
        if len(frequencies) != self.num_classes:
            raise UserError(
                f"method.class_frequencies has {len(frequencies)} entries for {self.num_classes} classes"
            )
        return rarity_weights(frequencies, spread)

    def predict(self, images: Tensor) -> SegPrediction:
        prediction = super().predict(images)
        weight = self._rarity(self.config.test_spread)
        if weight is None:
            return prediction
        # a factor of a probability is a summand of its logit; the logits are upsampled after this
        return SegPrediction(prediction.scores + weight.log().to(images.device)[:, None, None], False)

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        self._follow(self.model, step)
        pseudo = None
        if step >= self.config.mix_start:
            pseudo = self._pseudo_label(batch.target_image, batch.target_match)
        source = self.model(batch.source_image)
        ce = self._ce(source, batch.source_label)
        losses = {"ce": ce} | self._source_distance(source, batch.source_image, batch.source_label)
        del source, ce  # the backward frees its maps one after another
        yield Phase("model", losses, {} if pseudo is None else {"confident": pseudo.confident})
        del losses
        if pseudo is not None:
            yield from self._on_target(self.model, batch, batch.target_image, pseudo)

    def _follow(self, student: nn.Module, step: int) -> None:
        if step != self.followed:
            self.teacher.update(bare(student))
            self.followed = step

    def _pseudo_label(self, images: Tensor, match: Tensor | None) -> PseudoLabel:
        scores = self._probabilities(images)
        if match is not None:
            config = self.config
            if max(config.static_classes, default=0) >= self.num_classes:
                raise UserError(
                    f"method.static_classes names class {max(config.static_classes)} of {self.num_classes}"
                )
            day = self._probabilities(match)
            scores = fuse_matched(
                scores, day, config.static_classes, config.match_share, config.match_threshold
            )
        if self.class_weight is not None:
            scores = scores * self.class_weight[:, None, None]
        probability, label = scores.max(1)
        return self._weighted(probability, label)

    def _probabilities(self, images: Tensor) -> Tensor:
        """[B, K, H, W] of the teacher. If requested, the mean of ``softmax(image)`` and the softmax of the
        mirrored image, mirrored back."""
        align = self.model.align_corners
        p = upsampled(self.teacher(images).logits, images, align).softmax(1)
        if not self.config.flip_pseudo_label:
            return p
        mirrored = upsampled(self.teacher(images.flip(3)).logits, images, align).softmax(1)
        return (p + mirrored.flip(3)) / 2

    def _weighted(self, probability: Tensor, label: Tensor) -> PseudoLabel:
        confident = joint_share((probability >= self.config.threshold).to(probability.dtype).mean())
        weight = confident.expand(label.shape).clone()
        weight[:, : self.config.ignore_top] = 0
        if self.config.ignore_bottom:
            weight[:, -self.config.ignore_bottom :] = 0
        return PseudoLabel(label, weight, confident)

    def _ce(self, output: Any, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """:func:`pixel_mean_ce` of the student's output."""
        align = self.model.align_corners
        return with_detail(
            output, labels, lambda z, y, w: pixel_mean_ce(z, y, align, w, self.class_weight), weight
        )

    def _source_distance(self, source: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The feature distance of the student's output for source images, if it has a weight."""
        weight, last = self.config.feature_distance, max(self.config.feature_classes or (0,))
        if not weight:
            return {}
        if last >= self.num_classes:
            raise UserError(
                f"method.feature_classes names class {last} of {self.num_classes}: name the run's own, or"
                " null for all cells"
            )
        return {"feature_distance": weight * self._distance(source, images, labels)}

    def _distance(self, output: Any, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Distance of the student's output to the initial features; of all cells without labels."""
        if self.initial is None:
            raise UserError(
                "method.feature_distance and feature_target keep features near those of pretrained weights:"
                " name a file with --weights, or a folder hf:PATH that has weights"
            )
        config = self.config
        features = output.features if output.deepest is None else output.deepest
        return feature_distance(
            features, self.initial(images), config.feature_loss, labels, config.feature_classes,
            self.num_classes, config.feature_share,
        )  # fmt: skip

    def _on_target(
        self, student: nn.Module, batch: Batch, target: Tensor, pseudo: PseudoLabel
    ) -> Iterator[Phase]:
        """The losses on target images, each with its own backward."""
        if self.config.feature_target:
            distance = self._distance(student(self._strong(target)), target)
            yield Phase("model", {"feature_target": self.config.feature_target * distance})
            del distance
        yield self._mixed(student, batch, target, pseudo)
        if self.config.mask_ratio:
            yield self._masked(student, batch, target, pseudo)

    def _mixed(self, student: nn.Module, batch: Batch, target: Tensor, pseudo: PseudoLabel) -> Phase:
        """The loss on target images with pasted source classes."""
        if target.shape != batch.source_image.shape:
            of_target, of_source = (f"{x.shape[2]} x {x.shape[3]}" for x in (target, batch.source_image))
            raise UserError(
                f"method {self.name} pastes source images onto target images, and these are {of_target},"
                f" those {of_source}: make data.crop, data.target_crop and"
                " method.balanced_crop (sepico) agree"
            )
        mask = augment.class_mask(batch.source_label, self.config.mix_share)
        image = augment.paste(mask, batch.source_image, target)
        label = augment.paste(mask, batch.source_label, pseudo.label)
        weight = torch.where(mask, 1.0, pseudo.weight)
        loss = self._ce(student(self._strong(image)), label, weight)
        return Phase("model", {"mixed": self.config.ssl_weight * loss})

    def _masked(self, student: nn.Module, batch: Batch, target: Tensor, pseudo: PseudoLabel) -> Phase:
        """The loss on images with hidden parts, by the labels of the whole images."""
        config = self.config
        image, label, weight = target, pseudo.label, pseudo.weight
        if config.mask_images == "both":
            half = -(-len(target) // 2)
            image = torch.cat([batch.source_image[:half], image[:half]])
            label = torch.cat([batch.source_label[:half], label[:half]])
            weight = torch.cat([torch.ones_like(weight[:half]), weight[:half]])
        image = self._strong(image) if config.mask_strong else image
        if config.mask_kind == "blocks":
            output = student(augment.block_mask(image, config.mask_block, config.mask_ratio))
        else:
            with masked_tokens(self.model.backbone, config.mask_ratio):
                output = student(image[:])  # a composition keeps the output of each tensor of images
        loss = self._ce(output, label, weight)
        return Phase("model", {"masked": config.mask_weight * loss})

    def _strong(self, images: Tensor) -> Tensor:
        config = self.config
        if config.jitter_share:
            images = augment.colour_jitter(
                images, self.model.input, config.jitter_strength, config.jitter_share
            )
        return augment.gaussian_blur(images, share=config.blur_share) if config.blur_share else images
