"""Writing small pictures and labels."""

import numpy as np
from PIL import Image

from fastuda.data.domains.domain import Domain
from fastuda.data.domains.open import open_domain
from fastuda.data.domains.run import share_classes
from fastuda.data.labels import CITYSCAPES_IDS
from fastuda.data.loading.transforms import Augment

RNG = np.random.default_rng(0)


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


def only(domain: Domain, *names: str) -> Domain:
    """The domain in these of its classes."""
    return share_classes(domain, domain, classes=names)[0]


def drawn(augment: Augment, image: np.ndarray, label: np.ndarray, rng: np.random.Generator):
    """An image and its label in one window that is drawn for both."""
    window = augment.draw(image.shape[0], image.shape[1], rng)
    return augment.image(image, window), augment.label(label, window)


def opened(spec, role="source", **kwargs):
    return open_domain(spec, role=role, data_root=".", **kwargs)


def folder(root, names=("a.png",), classes="names: [road, car]\n", label=None):
    """A folder: with an image and a label under each name."""
    for name in names:
        save(picture(RNG, 8, 10), root / "images" / name)
        values = RNG.integers(0, 2, (8, 10), dtype=np.uint8) if label is None else label
        save(values, (root / "labels" / name).with_suffix(".png"))
    (root / "classes.yaml").write_text(classes, encoding="utf-8")
    return root
