"""Pictures of predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.labels import IGNORE, ClassSet
from fastuda.system.files import open_for_library


def overlay(image: np.ndarray, labels: np.ndarray, classes: ClassSet, opacity: float = 0.5) -> np.ndarray:
    """Blend the classes' colours into a picture [H, W, 3], both uint8. Ignored pixels stay unchanged."""
    colors = classes.colorize(labels).astype(np.float32)
    mixed = (image * (1 - opacity) + colors * opacity).round().astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], image, mixed)


def panels(
    image: np.ndarray, prediction: np.ndarray, label: np.ndarray | None, classes: ClassSet
) -> np.ndarray:
    """Image, prediction and label (if given) side by side."""
    parts = [image, classes.colorize(prediction)] + ([] if label is None else [classes.colorize(label)])
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    row = [parts[0]]
    for part in parts[1:]:
        row += [gap, part]
    return np.concatenate(row, 1)


def save_palette_png(path: Path, labels: np.ndarray, classes: ClassSet) -> None:
    """Save train ids as a palette PNG: the values are the ids, and viewers show the colours."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(classes.flat_palette())
    picture.save(path, "PNG")


def save_array(path: Path, array: np.ndarray) -> None:
    """Save an array as .npy.

    Raises:
        OSError: the disk is full.
    """
    with open_for_library(path) as file:
        np.save(file, array)
