"""Evaluates a method on a labelled domain, at the resolution of the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image

import fastuda.ops as F
from fastuda.data.config import DataConfig
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import IGNORE
from fastuda.data.loading.evaluation import eval_loader
from fastuda.data.loading.torch_loader import workers_alive
from fastuda.errors import UserError
from fastuda.inference.pictures import panels
from fastuda.inference.scores import Scores, class_centre_distance
from fastuda.inference.windows import Inference
from fastuda.methods.base import Method
from fastuda.system.distributed import World
from fastuda.system.log import progress


class Stopped(Exception):
    """The evaluation was asked to stop before it had seen every image."""


@workers_alive()
@torch.no_grad()
def evaluate(
    method: Method,
    domain: Domain,
    config: DataConfig,
    world: World,
    *,
    how: Inference | None = None,
    pictures: Path | None = None,
    count: int = 0,
    ccd: bool = False,
    protocol: str = "ignore",
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = True,
) -> Scores:
    """Score a method on all images, shared among the ranks, and save ``count`` evenly spread pictures.

    Pixels with label 255 are ignored. ``protocol`` says how pixels of the domain's ``others`` count, classes
    that the run does not have (see :class:`~fastuda.inference.scores.Scores`). The op upsamples the
    prediction to the label's size. With ``ccd`` the class-centre distances of the segmentor's features [B, C,
    h, w] are computed as well; each feature gets the nearest pixel's label.

    Args:
        how: windows, scales, mirroring and precision; None: one float32 pass over the whole image.
        stop: called before every image; True stops the evaluation.
        quiet: no progress bar.

    Raises:
        UserError: a label is not a class of the method.
        Stopped: ``stop`` returned True on some rank.
    """
    tally = _Tally(method, domain, how or Inference(), world.device, ccd)
    shown = set()
    if pictures is not None and count:
        shown = set(np.linspace(0, len(domain) - 1, min(count, len(domain)), dtype=int).tolist())
    was_training, stopped = method.training, False
    method.eval()
    bar = progress(len(domain), 0, "evaluating", quiet or not world.first, unit="image")
    try:
        images = eval_loader(domain, config, method.model.input, rank=world.rank, world=world.size)
        for position, (image, label, name) in enumerate(images):
            stopped = stop()
            if stopped:
                break
            image = image.to(world.device, memory_format=torch.channels_last)
            label = label.to(world.device)
            predicted, label = tally.add(image, label, name)
            index = position * world.size + world.rank
            if pictures is not None and index in shown:
                _picture(pictures, method, image[0], predicted[0], label[0], domain, index)
            bar.update(min(world.size, len(domain) - bar.n))
    finally:
        bar.close()
        method.train(was_training)
    if world.any(stopped):
        raise Stopped
    return tally.scores(world, protocol)


class _Tally:
    """Counts over the images of this rank."""

    def __init__(self, method: Method, domain: Domain, how: Inference, device: torch.device, ccd: bool):
        self.method, self.domain, self.how, self.ccd = method, domain, how, ccd
        classes = method.num_classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.elsewhere = torch.zeros(classes, dtype=torch.int64, device=device)
        """Predictions at pixels of the domain's ``others``."""
        width = method.model.feature_channels if ccd else 0
        zeros = torch.zeros(classes, width, dtype=torch.float64, device=device)
        self.statistics = F.ClassStatistics(zeros.sum(1), zeros, zeros)

    def add(self, image: torch.Tensor, label: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict an image and count its pixels. Returns the prediction, and the label without ``others``."""
        classes = self.method.num_classes
        other = label == classes if self.domain.others else None
        if other is not None:
            label = label.masked_fill(other, IGNORE)
        scores = self.how(self.method, image).scores
        if int((label[label != IGNORE]).max() if (label != IGNORE).any() else 0) >= classes:
            raise UserError(f"the label of {name} has a class that is not among the run's {classes}")
        matrix, predicted = F.upsample_confusion(
            scores, label, align_corners=self.method.model.align_corners, return_labels=True
        )
        self.confusion += matrix
        if other is not None:
            self.elsewhere += torch.bincount(predicted[other], minlength=classes)
        if self.ccd:
            self.statistics = self.statistics.merge(
                feature_statistics(self.method, image, label, self.how.amp)
            )
        return predicted, label

    def scores(self, world: World, protocol: str) -> Scores:
        """The scores over the images of all ranks."""
        counts = world.sum(torch.cat([self.confusion, self.elsewhere[None]])).cpu()
        others = counts[-1] if self.domain.others and len(self.domain) else None
        scores = Scores.of(counts[:-1], self.domain.classes.names, others, protocol)
        if not self.ccd:
            return scores
        distances = class_centre_distance(self.statistics.all_reduce()).tolist()
        return dataclasses.replace(scores, ccd=tuple(distances))


def feature_statistics(
    method: Method, image: torch.Tensor, label: torch.Tensor, amp: torch.dtype | None
) -> F.ClassStatistics:
    """Statistics of one image's features by class, in float64 so that thousands of images merge without
    loss. Pixels of classes that the run does not have are ignored."""
    with torch.autocast(image.device.type, dtype=amp, enabled=amp is not None):
        features = method.model(image).features
    resized = nnf.interpolate(label[:, None].float(), features.shape[2:])[:, 0].long()
    resized = resized.masked_fill(resized == method.num_classes, IGNORE)
    statistics = F.class_statistics(
        features.permute(0, 2, 3, 1).flatten(0, 2), resized.flatten(), method.num_classes
    )
    return F.ClassStatistics(
        statistics.count.double(), statistics.mean.double(), statistics.variance.double()
    )


def _picture(
    folder: Path,
    method: Method,
    image: torch.Tensor,
    predicted: torch.Tensor,
    label: torch.Tensor,
    domain: Domain,
    index: int,
) -> None:
    folder.mkdir(exist_ok=True)
    rgb = method.model.input.invert(image).permute(1, 2, 0).numpy()
    height, width = label.shape
    rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
    row = panels(rgb, predicted.cpu().numpy(), label.cpu().numpy().astype(np.uint8), domain.classes)
    Image.fromarray(row).save(folder / f"{domain.short_name(index)}.png")
