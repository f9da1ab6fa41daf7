"""Pictures as data URIs, and the parts of the pictures in a run folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from fastuda.data.domains.decode import open_rgb
from fastuda.errors import UserError

WIDTH = 512
"""Largest width of an embedded picture."""


def names_of(folder: Path) -> list[str]:
    """Names of the pictures in a run's ``preds/``, in order."""
    return sorted(path.stem for path in (folder / "preds").glob("*.png"))


def read_pictures(runs: Mapping[str, Path], names: Iterable[str], labelled: bool) -> list[dict[str, str]]:
    """Pictures in ``preds/`` as data URIs: each with its name, the image, the prediction of every run that
    has it (by the run's title), and the true labels if there are any.

    Args:
        runs: run folders by title; the first has all pictures.
        names: names of the pictures.
        labelled: whether the pictures have labels.

    Raises:
        UserError: one cannot be read, or no run wrote it.
    """
    pictures = []
    for name in names:
        paths = {title: folder / "preds" / f"{name}.png" for title, folder in runs.items()}
        left = {title: _panels(path, 2 + labelled) for title, path in paths.items() if path.is_file()}
        image, _, *truth = next(iter(left.values()))
        layers = {"image": image, **{title: prediction for title, (_, prediction, *_) in left.items()}}
        if truth:
            layers["label"] = truth[0]
        uris = {layer: data_uri(drawn, photo=layer == "image") for layer, drawn in layers.items()}
        pictures.append({"name": name, **uris})
    return pictures


def _panels(path: Path, parts: int) -> list[np.ndarray]:
    """The parts of a picture that a run wrote, which are separated by four white columns.

    Raises:
        UserError: it is not such a picture.
    """
    row = np.asarray(open_rgb(path))
    width, rest = divmod(row.shape[1] - 4 * (parts - 1), parts)
    if rest or width < 1:
        raise UserError(f"{path} is no picture that a run left; remove it")
    return [row[:, i * (width + 4) : i * (width + 4) + width] for i in range(parts)]


def data_uri(picture: np.ndarray, photo: bool) -> str:
    """An RGB picture, at most :data:`WIDTH` wide: JPEG for a photograph, palette PNG for flat colours."""
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
