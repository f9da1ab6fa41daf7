"""Pictures as data URIs, and those of a run folder taken apart."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.domains.decode import open_rgb
from fastuda.errors import UserError

WIDTH = 512
"""Largest width of an embedded picture."""


def read_pictures(folder: Path, baseline: Path | None, label: str, labelled: bool) -> list[dict[str, str]]:
    """The pictures in ``preds/``: name, and image, prediction, the baseline's prediction (as ``label``) and
    the true labels, where there are such, as data URIs.

    Raises:
        UserError: one cannot be read, or is not of a run.
    """
    parts = 3 if labelled else 2
    pictures = []
    for path in sorted((folder / "preds").glob("*.png")):
        image, prediction, *truth = _panels(path, parts)
        layers = {"image": image, "prediction": prediction}
        other = baseline / "preds" / path.name if baseline else None
        if other is not None and other.is_file():
            layers[label] = _panels(other, parts)[1]
        if truth:
            layers["label"] = truth[0]
        uris = {name: data_uri(layer, photo=name == "image") for name, layer in layers.items()}
        pictures.append({"name": path.stem, **uris})
    return pictures


def _panels(path: Path, parts: int) -> list[np.ndarray]:
    """The parts of a picture that a run left, which have four white columns between them.

    Raises:
        UserError: it is none.
    """
    row = np.asarray(open_rgb(path))
    width, rest = divmod(row.shape[1] - 4 * (parts - 1), parts)
    if rest or width < 1:
        raise UserError(f"{path} is no picture that a run left; remove it")
    return [row[:, i * (width + 4) : i * (width + 4) + width] for i in range(parts)]


def data_uri(picture: np.ndarray, photo: bool) -> str:
    """An RGB picture at :data:`WIDTH` or less: JPEG for a photograph, palette PNG for flat colours."""
    image = Image.fromarray(picture)
    if image.width > WIDTH:
        how = Image.Resampling.BILINEAR if photo else Image.Resampling.NEAREST
        image = image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), how)
    buffer = io.BytesIO()
    if photo:
        image.save(buffer, "JPEG", quality=82)
    else:
        image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    kind = "jpeg" if photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
