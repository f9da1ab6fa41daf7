"""Scores of a method on a labelled domain, at the labels' resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastuda.ops as F
from fastuda.data.config import DataConfig
from fastuda.data.domains import Domain
from fastuda.data.torch_loader import eval_loader
from fastuda.distributed import World
from fastuda.errors import UserError
from fastuda.methods.base import Method
from fastuda.metrics import Scores
from fastuda.visualize import panels


@torch.no_grad()
def evaluate(
    method: Method,
    domain: Domain,
    config: DataConfig,
    world: World,
    *,
    amp: torch.dtype | None = None,
    pictures: Path | None = None,
    count: int = 0,
) -> Scores:
    """Confusion over all images (shared out over the ranks), and ``count`` evenly spread pictures.

    Pixels whose label is 255 do not count. The prediction is upsampled to the label's size inside the op.

    Raises:
        UserError: a label is not a class of the method.
    """
    classes = method.num_classes
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=world.device)
    shown = (
        set(np.linspace(0, len(domain) - 1, min(count, len(domain)), dtype=int).tolist()) if count else set()
    )
    was_training = method.training
    method.eval()
    try:
        images = eval_loader(domain, config, method.model.input, rank=world.rank, world=world.size)
        for position, (image, label, name) in enumerate(images):
            image = image.to(world.device, memory_format=torch.channels_last)
            label = label.to(world.device)
            with torch.autocast(world.device.type, dtype=amp, enabled=amp is not None):
                scores = method.predict(image).scores
            if int((label[label != 255]).max() if (label != 255).any() else 0) >= classes:
                raise UserError(f"the label of {name} has a class beyond the {classes} of this run")
            matrix, predicted = F.upsample_confusion(
                scores, label, align_corners=method.model.align_corners, return_labels=True
            )
            confusion += matrix
            index = position * world.size + world.rank
            if pictures is not None and index in shown:
                _picture(pictures, method, image[0], predicted[0], label[0], domain, name)
    finally:
        method.train(was_training)
    return Scores.of(world.sum(confusion).cpu(), domain.classes.names)


def _picture(
    folder: Path,
    method: Method,
    image: torch.Tensor,
    predicted: torch.Tensor,
    label: torch.Tensor,
    domain: Domain,
    name: str,
) -> None:
    folder.mkdir(exist_ok=True)
    rgb = method.model.input.invert(image).permute(1, 2, 0).numpy()
    height, width = label.shape
    rgb = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
    row = panels(rgb, predicted.cpu().numpy(), label.cpu().numpy().astype(np.uint8), domain.classes)
    Image.fromarray(row).save(folder / f"{Path(name).stem}.png")
