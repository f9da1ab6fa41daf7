"""Reading one image or label file, with every fault named.

Images are turned as their EXIF orientation says, for training and prediction alike: labels are drawn on what
a viewer shows, and a label file is taken as it is stored.
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

OTHERWISE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading JSON raises that is cut off, nested too deep, or of another shape than expected."""

_LABEL_MODES = {"1", "L", "P", "I", "I;16", "I;16B", "I;16L", "RGB", "RGBA"}


class BadFile(UserError):
    """One file of a data set that cannot be used; the loaders skip a limited number of them."""

    def __init__(self, path: Path | str, reason: str, fatal: bool = False) -> None:
        super().__init__(f"{path} {reason}")
        self.path = str(path)
        self.reason = reason
        self.fatal = fatal
        """The label map is wrong, not the file: known before training where the file is looked at."""

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
"""By orientation, what brings an upright picture back to how it is stored."""
_BAD_EXIF = (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of an opened image that is not decoded yet; 1 where there is none or it
    is damaged."""
    try:
        # PNG's own getexif would decode the pixels
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _BAD_EXIF:
        return 1
    return value if value in _UNTURNS else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as the file holds it."""
    if isinstance(image, TiffImageFile):  # Pillow gives the size of the upright picture
        return image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
    return image.size


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image, turned as :func:`open_rgb` turns it."""
    width, height = stored_size(image)
    return (height, width) if orientation(image) >= 5 else (width, height)


def open_image(path: Path, low_bytes: bool = False, upright: bool = False) -> Image.Image:
    """A decoded Pillow image.

    Args:
        path: the file.
        low_bytes: of 16-bit colour, the low byte of every channel and not the high one.
        upright: turned as its EXIF orientation says; else as it is stored.

    Raises:
        BadFile: the file is missing, empty, truncated or no image.
    """
    try:
        # by name, Pillow maps a TIFF into memory by its upright size
        with path.open("rb") as file, Image.open(file) as image:
            # Pillow turns TIFFs itself, and nothing else
            turned = orientation(image) if isinstance(image, TiffImageFile) else 1
            if low_bytes and isinstance(image, PngImageFile):
                # read as little-endian, the "high" byte that Pillow keeps is the low one of the file
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
        reason = (
            "cannot be read: it is empty"
            if path.stat().st_size == 0
            else "cannot be read: no image that Pillow knows"
        )
        raise BadFile(path, reason) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadFile(path, f"cannot be read ({told})") from error


def open_rgb(path: Path) -> Image.Image:
    """A decoded image in 8-bit RGB, upright; grey and palette images are converted, alpha is dropped."""
    image = open_image(path, upright=True)
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "L", "P", "CMYK", "LA"):
        return image.convert("RGB")
    raise BadFile(path, f"has mode {image.mode}, not 8-bit RGB")


def read_raw_label(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The values in a label file as they are: ids [H, W] (palette files: the index) or colours [H, W, 3]; and
    of a palette file ``uint8 [N, 3]``, the colours of the indices below N.

    16-bit colour files (SYNTHIA) come as their low bytes, where the class is: Pillow by itself keeps the high
    ones, which are zero.

    Raises:
        BadFile: as :func:`open_image`, or a mode that holds no labels.
    """
    image = open_image(path, low_bytes=True)
    if image.mode not in _LABEL_MODES:
        raise BadFile(path, f"has mode {image.mode}, which holds neither ids nor colours")
    raw = np.asarray(image)
    if image.mode == "P":
        return raw, np.array(image.getpalette("RGB") or (), np.uint8).reshape(-1, 3)
    return raw.astype(np.uint8) if raw.dtype == np.bool_ else raw[..., :3] if raw.ndim == 3 else raw, None


def draw_polygons(path: Path, names: Mapping[str, int], ignore: int) -> np.ndarray:
    """``uint8 [H, W]`` train ids of a JSON file with named polygons, painted in its order (cityscapesScripts'
    json2labelImg); a name with ``group`` at its end is its single one.

    Raises:
        BadFile: no such JSON, or a name that ``names`` lacks.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
        width, height = int(said["imgWidth"]), int(said["imgHeight"])
        if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:  # as Pillow refuses a file
            raise ValueError(f"{width} x {height} pixels")
        picture = Image.new("L", (width, height), ignore)
        shapes = [
            (str(shape["label"]), [(float(x), float(y)) for x, y in shape["polygon"]])
            for shape in said["objects"]
            if not shape.get("deleted")
        ]
    except FileNotFoundError as error:
        raise BadFile(path, "cannot be read: it is not there any more") from error
    except OTHERWISE as error:
        raise BadFile(path, f"cannot be read as polygons ({error!r})") from error
    brush = ImageDraw.Draw(picture)
    for name, points in shapes:
        known = name if name in names else name.removesuffix("group")
        if known not in names:
            raise BadFile(path, f"holds a polygon of {name!r}, which is not defined", fatal=True)
        if len(points) > 1:
            brush.polygon(points, fill=names[known])
    return np.asarray(picture)
