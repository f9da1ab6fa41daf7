"""A trained method applied to single images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastuda.ops as F
from fastuda.data.domains.classes import canonical
from fastuda.data.domains.decode import BadFile
from fastuda.data.domains.domain import Domain
from fastuda.data.labels import CITYSCAPES_ROWS, ClassSet
from fastuda.data.loading.transforms import resize_image
from fastuda.errors import UserError
from fastuda.inference.pictures import panels
from fastuda.inference.windows import Inference, probabilities
from fastuda.methods import Method


@dataclass(frozen=True)
class Predictor:
    """A method with everything that is needed to label an RGB image."""

    method: Method
    classes: ClassSet
    device: torch.device
    size: tuple[int, int] | None = None
    """Height and width of the network's input; None: the image's own."""
    inference: Inference = field(default_factory=Inference)
    resampling: str = "bilinear"
    """How images are resized."""
    ids: tuple[int, ...] | None = None
    """Number of each class in label files; None: its train id, the position in ``classes``."""

    @torch.no_grad()
    def __call__(self, image: np.ndarray, with_probabilities: bool = False) -> tuple[np.ndarray, Any]:
        """Train ids ``uint8 [H, W]`` of an image ``uint8 [H, W, 3]``, and float16 probabilities ``[K, H,
        W]`` if requested, else None."""
        model = self.method.model
        resized = torch.from_numpy(resize_image(image, self.size, self.resampling).copy()).permute(2, 0, 1)
        prediction = self.inference(self.method, model.input.apply(resized)[None].to(self.device))
        size = (image.shape[0], image.shape[1])
        if with_probabilities:
            p = probabilities(prediction, size, model.align_corners)[0]
            return p.argmax(0).to(torch.uint8).cpu().numpy(), p.half().cpu().numpy()
        unlabelled = torch.full((1, *size), 255, dtype=torch.int64, device=self.device)
        confusion_and_labels = F.upsample_confusion(
            prediction.scores, unlabelled, align_corners=model.align_corners, return_labels=True
        )
        return confusion_and_labels[1][0].cpu().numpy(), None


def label_ids(numbering: str, classes: ClassSet) -> tuple[int, ...] | None:
    """The classes' ids for label files: None for ``train``, labelIds for ``cityscapes``.

    Raises:
        UserError: Cityscapes does not have a class.
    """
    if numbering == "train":
        return None
    official = {canonical(row.name): row.id for row in CITYSCAPES_ROWS}
    missing = [name for name in classes.names if canonical(name) not in official]
    if missing:
        raise UserError(f"--ids cityscapes: Cityscapes has no class named {', '.join(missing)}")
    return tuple(official[canonical(name)] for name in classes.names)


def leave_pictures(predictor: Predictor, domain: Domain, folder: Path, count: int) -> None:
    """Save image and prediction of ``count`` evenly spread images of a domain side by side, without their
    labels. Images that cannot be read are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in np.linspace(0, len(domain) - 1, min(count, len(domain)), dtype=int).tolist():
        try:
            image = domain.read_image(index)
        except BadFile:
            continue
        row = panels(image, predictor(image)[0], None, predictor.classes)
        Image.fromarray(row).save(folder / f"{domain.short_name(index)}.png")
