"""Reads one image or label file and names every fault.

Images are turned upright by their EXIF orientation, in training and prediction alike, because labels are
drawn on what a viewer shows. Label files are read as they are stored.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from fastuda.errors import UserError
from fastuda.system.files import reading

_LABEL_MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L", "RGB", "RGBA"}


class BadFile(UserError):
    """A file of a data set cannot be used; the loaders skip a limited number of such files."""

    def __init__(self, path: Path | str, reason: str, fatal: bool = False) -> None:
        super().__init__(f"{path} {reason}")
        self.path = str(path)
        self.reason = reason
        self.fatal = fatal
        """The label map is wrong, not the file, so skipping the file does not help."""

    def __reduce__(self) -> tuple[type[BadFile], tuple[str, str, bool]]:
        return type(self), (self.path, self.reason, self.fatal)


_UNTURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Per orientation, the transpose from the upright image back to the stored one."""
_BAD_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an opened image that is not decoded yet; 1 if it is missing or damaged."""
    try:
        # getexif of the PNG class would decode the pixels
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _BAD_EXIF:
        return 1
    return value if value in _UNTURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as it is stored."""
    if isinstance(image, TiffImageFile):  # Pillow returns the upright size
        return image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return image.size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image after :func:`open_rgb` turns it upright."""
    width, height = stored_size(image)
    return (height, width) if orientation(image) >= 5 else (width, height)


def open_image(path: Path, low_bytes: bool = False, upright: bool = False) -> Image.Image:
    """Decoded Pillow image.

    Args:
        low_bytes: keep the low byte of 16-bit colour channels instead of the high byte.
        upright: turn the image by its EXIF orientation; otherwise it stays as stored.

    Raises:
        BadFile: the file is missing, empty, truncated or not an image.
    """
    try:
        # given a path, Pillow would map a TIFF into memory by its upright size
        with path.open("rb") as file, Image.open(file) as image:
            # Pillow turns TIFFs upright by itself, and no other format
            turned = orientation(image) if isinstance(image, TiffImageFile) else 1
            if low_bytes and isinstance(image, PngImageFile):
                # Pillow keeps the high byte; as little-endian, that is the low byte of the file
                image.tile = [
                    tile._replace(args="RGB;16L") if tile.args == "RGB;16B" else tile for tile in image.tile
                ]
            image.load()
            if upright:
                with contextlib.suppress(*_BAD_EXIF):
                    ImageOps.exif_transpose(image, in_place=True)
                return image
            return image if turned == 1 else image.transpose(_UNTURNS[turned])
    except FileNotFoundError as error:
        raise BadFile(path, "cannot be read: it is not there any more") from error
    except UnidentifiedImageError as error:
        reason = "it is empty" if path.stat().st_size == 0 else "no image that Pillow knows"
        raise BadFile(path, f"cannot be read: {reason}") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadFile(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def open_rgb(path: Path) -> Image.Image:
    """Decoded upright image in 8-bit RGB. Grey and palette images are converted; alpha is dropped."""
    image = open_image(path, upright=True)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "L", "P", "CMYK", "LA"):
        return image.convert("RGB")
    raise BadFile(path, f"has mode {image.mode}, not 8-bit RGB")


def read_raw_label(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Raw values of a label file, and its palette if it has one.

    Of 16-bit colour files (SYNTHIA) the low bytes are returned, which hold the class. Pillow by default keeps
    the high bytes, which are zero.

    Returns:
        Ids [H, W] (indices of a palette file) or colours [H, W, 3]; palette ``uint8 [N, 3]`` or None.

    Raises:
        BadFile: as :func:`open_image`, or the mode of the image holds no labels.
    """
    image = open_image(path, low_bytes=True)
    if image.mode not in _LABEL_MODES:
        raise BadFile(path, f"has mode {image.mode}, which holds neither ids nor colours")
    raw = np.asarray(image)
    if image.mode == "P":
        return raw, np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    return raw.astype(np.uint8) if raw.dtype == np.bool_ else raw[..., :3] if raw.ndim == 3 else raw, None


def draw_polygons(path: Path, names: Mapping[str, int], ignore: int) -> np.ndarray:
    """Train ids ``uint8 [H, W]`` of a JSON file with named polygons, painted in the order of the file.

    A name that ends in ``group`` counts as the name without it (cityscapesScripts, json2labelImg).

    Raises:
        BadFile: the file is not such JSON, or ``names`` lacks one of its names.
    """
    with reading(path, "polygons", BadFile):
        annotation = json.loads(path.read_text(encoding="utf-8-sig"))
        width, height = int(annotation["imgWidth"]), int(annotation["imgHeight"])
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow's own limit
            raise ValueError(f"{width} x {height} pixels")
        picture = Image.new("L", (width, height), ignore)
        shapes = [
            (str(shape["label"]), [(float(x), float(y)) for x, y in shape["polygon"]])
            for shape in annotation["objects"]
            if not shape.get("deleted")
        ]
    brush = ImageDraw.Draw(picture)
    for name, points in shapes:
        single = name if name in names else name.removesuffix("group")
        if single not in names:
            raise BadFile(path, f"holds a polygon of {name!r}, which is not defined", fatal=True)
        if len(points) > 1:
            brush.polygon(points, fill=names[single])
    return np.asarray(picture)
