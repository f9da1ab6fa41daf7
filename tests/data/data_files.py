"""Writing small pictures and labels."""

import numpy as np
from PIL import Image

from fastuda.data.labels import CITYSCAPES_IDS


def picture(rng, height=20, width=36):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(rng, height=20, width=36):
    return rng.choice(np.array(CITYSCAPES_IDS, np.uint8), (height, width))


def save(array, path, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette)
    image.save(path)
    return path
