"""Label maps and pictures of image files."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import fastuda.ops as F
from fastuda.checkpoint import write_atomic
from fastuda.data.labels import ClassSet
from fastuda.data.transforms import resize_image
from fastuda.errors import UserError
from fastuda.methods import Method
from fastuda.visualize import overlay, save_palette_png


@torch.no_grad()
def predict_labels(
    method: Method, image: np.ndarray, size: tuple[int, int] | None, device: torch.device
) -> np.ndarray:
    """Train ids ``uint8 [H, W]`` of an RGB image ``uint8 [H, W, 3]`` that the network sees at ``size``."""
    pixels = method.model.input.apply(torch.from_numpy(resize_image(image, size).copy()).permute(2, 0, 1))
    scores = method.predict(pixels[None].to(device, memory_format=torch.channels_last)).scores
    nothing = torch.full((1, *image.shape[:2]), 255, dtype=torch.int64, device=device)
    align = method.model.align_corners
    return F.upsample_confusion(scores, nothing, align_corners=align, return_labels=True)[1][0].cpu().numpy()


def predict_files(
    method: Method,
    classes: ClassSet,
    files: list[tuple[Path, Path]],
    out: Path,
    save: set[str],
    size: tuple[int, int] | None,
    device: torch.device,
    quiet: bool = False,
) -> float:
    """Write what ``save`` names for every (file, name under ``out``); returns images per second.

    Raises:
        UserError: an image cannot be read, or the folder cannot be written.
    """
    began = time.perf_counter()
    for path, name in tqdm(files, desc="predicting", unit="image", disable=quiet):
        try:
            with Image.open(path) as file:
                image = np.asarray(file.convert("RGB"))
        except Exception as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error
        labels = predict_labels(method, image, size, device)
        pictures: dict[str, Callable[[Path], None]] = {
            "labels": partial(_save, Image.fromarray(labels)),
            "color": partial(save_palette_png, labels=labels, classes=classes),
            "overlay": partial(_save, Image.fromarray(overlay(image, labels, classes))),
        }
        for kind in sorted(save):
            place = (out / kind / name).with_suffix(".png")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write to {out}: {error}") from error
            write_atomic(place, pictures[kind])
    return len(files) / (time.perf_counter() - began)


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, "PNG")
