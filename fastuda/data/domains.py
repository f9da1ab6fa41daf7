"""Domains: data sets as they are downloaded, one table entry each.

A domain is named ``name`` or ``name:path[:split]``. Without a path it is looked for under ``<data
root>/<name>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from fastuda.data.labels import (
    CAMVID,
    CAMVID_COLORS,
    CITYSCAPES,
    CITYSCAPES_IDS,
    IGNORE,
    UNKNOWN,
    ClassSet,
    lookup,
)
from fastuda.errors import UserError, nearest

Items = list[tuple[Path, Path | None]]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Layout:
    """What a data set's folder holds for one split."""

    items: Items
    classes: ClassSet
    table: np.ndarray
    """65,536 entries from the value in a label file to the train id."""
    colors: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """For labels stored as colours: colour to train id."""
    red_channel: bool = False
    """The id is the red channel of a 16-bit RGB file (SYNTHIA)."""


@dataclass(frozen=True)
class Domain:
    """A readable list of images and, where there are any, labels."""

    name: str
    split: str
    layout: Layout
    kept: tuple[int, ...] | None = None
    """Train ids of the layout that stay, in their new order; the others are ignored. None keeps all."""

    @property
    def classes(self) -> ClassSet:
        full = self.layout.classes
        if self.kept is None:
            return full
        return ClassSet(tuple(full.names[i] for i in self.kept), tuple(full.palette[i] for i in self.kept))

    def restrict(self, names: Sequence[str]) -> Domain:
        """The same images with these classes only, in this order."""
        return replace(self, kept=tuple(self.layout.classes.names.index(name) for name in names))

    @property
    def items(self) -> Items:
        return self.layout.items

    def __len__(self) -> int:
        return len(self.layout.items)

    def read_image(self, index: int) -> np.ndarray:
        """``uint8 [H, W, 3]`` RGB.

        Raises:
            UserError: the file cannot be read whole.
        """
        path = self.items[index][0]
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error

    def read_label(self, index: int) -> np.ndarray:
        """``uint8 [H, W]`` train ids, 255 = ignore.

        Raises:
            UserError: there is no label, it cannot be read whole, or it holds a value that the data set does
                not define.
        """
        image, path = self.items[index]
        if path is None:
            raise UserError(f"{image} has no label in {self.name}")
        try:
            with Image.open(path) as file:
                if self.layout.red_channel:
                    # Pillow keeps the high byte of 16-bit RGB, which is zero here; the class is in the low
                    # one
                    file.tile = [tile._replace(args="RGB;16L") for tile in getattr(file, "tile", [])]
                    raw = np.asarray(file)[..., 0]
                else:
                    raw = np.asarray(file.convert("RGB") if file.mode == "RGBA" else file)
        except Exception as error:
            raise UserError(f"{path} cannot be read as a label map: {error}") from error
        labels = self._from_colors(path, raw) if raw.ndim == 3 else self._from_ids(path, raw)
        if self.kept is None:
            return labels
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.kept)] = np.arange(len(self.kept), dtype=np.uint8)
        return table[labels]

    def _from_ids(self, path: Path, raw: np.ndarray) -> np.ndarray:
        labels = self.layout.table[raw.astype(np.uint16)]
        if (labels == UNKNOWN).any():
            values = np.unique(raw[labels == UNKNOWN])[:5].tolist()
            raise UserError(f"{path} holds label values {values} that {self.name} does not define")
        return labels

    def read_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of one size.

        Raises:
            UserError: as the two readers do, or the sizes differ.
        """
        image, label = self.read_image(index), self.read_label(index)
        if image.shape[:2] != label.shape:
            raise UserError(
                f"{self.items[index][1]} is {label.shape[1]}x{label.shape[0]},"
                f" its image is {image.shape[1]}x{image.shape[0]}"
            )
        return image, label

    def _from_colors(self, path: Path, rgb: np.ndarray) -> np.ndarray:
        if not self.layout.colors:
            raise UserError(f"{path} is a colour picture; {self.name} expects label ids (one channel)")
        keys = rgb[..., 0].astype(np.uint32) << 16 | rgb[..., 1].astype(np.uint32) << 8 | rgb[..., 2]
        values, inverse = np.unique(keys, return_inverse=True)
        known = {r << 16 | g << 8 | b: train for (r, g, b), train in self.layout.colors.items()}
        for value in values.tolist():
            if value not in known:
                raise UserError(f"{path} holds the colour #{value:06x} that {self.name} does not define")
        return np.array([known[v] for v in values.tolist()], np.uint8)[inverse].reshape(rgb.shape[:2])


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


CITYSCAPES_TABLE = lookup(CITYSCAPES_IDS, [i for i in range(35) if i not in CITYSCAPES_IDS] + [255])
TRAIN_ID_TABLE = lookup(range(19), [255])
_CITY_COLORS = dict(zip(CITYSCAPES.palette, range(19), strict=True)) | {
    (0, 0, 0): IGNORE,
    (20, 20, 20): IGNORE,
    (111, 74, 0): IGNORE,
    (81, 0, 81): IGNORE,
    (250, 170, 160): IGNORE,
    (230, 150, 140): IGNORE,
    (180, 165, 180): IGNORE,
    (150, 100, 100): IGNORE,
    (150, 120, 90): IGNORE,
    (153, 153, 153): 5,
    (0, 0, 90): IGNORE,
    (0, 0, 110): IGNORE,
}


def _gta5(root: Path, split: str) -> Layout:
    names = [path.relative_to(root / "images") for path in _images(root / "images")]
    if split != "all":
        listed = _split_list(root / f"{split}.txt")
        names = [name for name in names if name.stem in listed]
    items: Items = [
        (root / "images" / n, _existing((root / "labels" / n).with_suffix(".png"))) for n in names
    ]
    return Layout(items, CITYSCAPES, CITYSCAPES_TABLE, _CITY_COLORS)


def _split_list(path: Path) -> set[str]:
    if not path.is_file():
        raise UserError(f"no list of that split at {path}; leave the split out for all images")
    return {Path(line.strip()).stem for line in path.read_text().splitlines() if line.strip()}


def _cityscapes(root: Path, split: str) -> Layout:
    folder, suffix = root / "leftImg8bit" / split, "_leftImg8bit.png"
    items: Items = []
    train_ids = False
    for image in sorted(folder.glob(f"*/*{suffix}")):
        base = root / "gtFine" / split / image.parent.name / image.name.removesuffix(suffix)
        label = _existing(base.with_name(base.name + "_gtFine_labelIds.png"))
        if label is None and (label := _existing(base.with_name(base.name + "_gtFine_labelTrainIds.png"))):
            train_ids = True
        items.append((image, label))
    return Layout(items, CITYSCAPES, TRAIN_ID_TABLE if train_ids else CITYSCAPES_TABLE)


def _camvid(root: Path, split: str) -> Layout:
    table = lookup(range(11), [11, 255])
    if (root / "splits.json").is_file():
        node = json.loads((root / "splits.json").read_text())
        for part in ("official." + split if split in ("train", "val", "test") else split).split("."):
            if not isinstance(node, dict) or part not in node:
                known = node if isinstance(node, dict) else ()
                raise UserError(f"{root / 'splits.json'} has no split {split!r}{nearest(part, known)}")
            node = node[part]
        if not isinstance(node, list):
            raise UserError(
                f"split {split!r} is a group; choose one of {', '.join(f'{split}.{k}' for k in node)}"
            )
        items: Items = []
        for name in node:
            image = next(
                (p for s in IMAGE_SUFFIXES if (p := root / "images" / f"{Path(name).name}{s}").is_file()),
                None,
            )
            if image is None:
                raise UserError(f"{root / 'splits.json'} lists {name}, which is not in {root / 'images'}")
            items.append((image, _existing(root / "labels" / f"{image.stem}.png")))
        return Layout(items, CAMVID, table, CAMVID_COLORS)
    if (root / split).is_dir():
        pairs: Items = [(p, _existing(root / f"{split}annot" / p.name)) for p in _images(root / split)]
        return Layout(pairs, CAMVID, table, CAMVID_COLORS)
    images = root / "701_StillsRaw_full"
    colored: Items = [
        (p, _existing(root / "LabeledApproved_full" / f"{p.stem}_L.png")) for p in _images(images)
    ]
    return Layout(colored, CAMVID, table, CAMVID_COLORS)


def _folder(root: Path, split: str) -> Layout:
    spec_path = root / "classes.yaml"
    if not spec_path.is_file():
        raise UserError(f"{root} has no classes.yaml; it names the classes, e.g.  names: [road, car]")
    try:
        spec = yaml.safe_load(spec_path.read_text())
        names = tuple(str(name) for name in spec["names"])
        ids = [int(i) for i in spec.get("ids", range(len(names)))]
        ignored = [int(i) for i in spec.get("ignore", [255])]
        rng = np.random.default_rng(0)
        palette = spec.get("palette") or rng.integers(40, 256, (len(names), 3)).tolist()
        classes = ClassSet(names, tuple((int(r), int(g), int(b)) for r, g, b in palette))
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{spec_path} cannot be used: {error!r}; it needs `names`, and may have `ids`,"
                        " `palette` and `ignore`") from error  # fmt: skip
    if len(ids) != len(names) or len(classes.palette) != len(names):
        raise UserError(
            f"{spec_path} has {len(names)} names, {len(ids)} ids and {len(classes.palette)} colours"
        )
    images, labels = root / "images", root / "labels"
    if split and (images / split).is_dir():
        images, labels = images / split, labels / split
    items: Items = [
        (p, _existing((labels / p.relative_to(images)).with_suffix(".png"))) for p in _images(images)
    ]
    return Layout(items, classes, lookup(ids, ignored))


SYNTHIA_IDS = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    1: 10,
    10: 11,
    17: 12,
    8: 13,
    19: 15,
    12: 17,
    11: 18,
}
"""Class in SYNTHIA-RAND-CITYSCAPES to Cityscapes train id; it lacks terrain, truck and train."""


def _synthia(root: Path, split: str) -> Layout:
    folder = root / "GT" / "LABELS"
    items: Items = [(p, _existing(folder / p.name)) for p in _images(root / "RGB")]
    order = sorted(SYNTHIA_IDS, key=lambda i: SYNTHIA_IDS[i])
    kept = [SYNTHIA_IDS[i] for i in order]
    classes = ClassSet(tuple(CITYSCAPES.names[i] for i in kept), tuple(CITYSCAPES.palette[i] for i in kept))
    ignored = [i for i in range(23) if i not in SYNTHIA_IDS]
    return Layout(items, classes, lookup(order, ignored), red_channel=True)


@dataclass(frozen=True)
class Entry:
    """One data set: how to list it, and which split serves which purpose."""

    read: Callable[[Path, str], Layout]
    source_split: str
    target_split: str
    about: str


DOMAINS: dict[str, Entry] = {
    "gta5": Entry(_gta5, "all", "all", "GTA5: images/ and labels/ (palette or colour PNGs)"),
    "synthia": Entry(_synthia, "all", "all", "SYNTHIA-RAND-CITYSCAPES: RGB/ and GT/LABELS/ (16-bit PNGs)"),
    "cityscapes": Entry(_cityscapes, "train", "train", "Cityscapes: leftImg8bit/ and gtFine/"),
    "camvid": Entry(_camvid, "train", "train", "CamVid: images/, labels/ and splits.json, or as published"),
    "folder": Entry(_folder, "train", "train", "your own: images/, labels/ (one-channel PNGs), classes.yaml"),
}


def open_domain(spec: str, *, role: str, data_root: str | Path, split: str | None = None) -> Domain:
    """The domain that ``spec`` names, as ``source`` or ``target``.

    ``scenes`` is the built-in pair of domains: drawn on first use under ``<data root>/scenes``, the synthetic
    side for the source in GTA5's layout, the real-looking side for the target in Cityscapes' layout.

    Raises:
        UserError: the name is unknown, the folder is missing or empty, or a source or evaluation image has no
            label.
    """
    name, _, rest = spec.partition(":")
    path, _, given = rest.partition(":")
    labelled = role == "source" or split is not None
    if name == "scenes":
        from fastuda.data.scenes import ensure_scenes

        folder = ensure_scenes(Path(path or Path(data_root) / "scenes"))
        name, path = (
            ("gta5", str(folder / "gta5")) if role == "source" else ("cityscapes", str(folder / "cityscapes"))
        )
    if name not in DOMAINS:
        raise UserError(f"unknown domain {name!r}{nearest(name, [*DOMAINS, 'scenes'])}")
    entry = DOMAINS[name]
    root = Path(path) if path else Path(data_root) / name
    if not root.is_dir():
        raise UserError(f"no folder {root} for {spec!r}; give its place as {name}:PATH or with --data-root")
    chosen = split or given or (entry.source_split if role == "source" else entry.target_split)
    layout = entry.read(root, chosen)
    if not layout.items:
        raise UserError(f"no images for split {chosen!r} in {root} ({entry.about})")
    if labelled and (bare := [image for image, label in layout.items if label is None]):
        raise UserError(
            f"{len(bare)} of {len(layout.items)} images in {root} have no label; the first is {bare[0]}"
        )
    return Domain(spec.partition(":")[0], chosen, layout)


def share_classes(source: Domain, target: Domain) -> tuple[Domain, Domain]:
    """Both domains with the classes that both name, in the target's order.

    Raises:
        UserError: they share none.
    """
    if source.classes.names == target.classes.names:
        return source, target
    shared = [name for name in target.classes.names if name in source.classes.names]
    if not shared:
        raise UserError(
            f"{source.name} and {target.name} share no class: {', '.join(source.classes.names)}"
            f" against {', '.join(target.classes.names)}"
        )
    return source.restrict(shared), target.restrict(shared)
