"""The domain ``folder:PATH``: a user's images and labels, described by ``classes.yaml`` in the folder.

    names: [road, building, tree]        # classes in the order of their train ids
    ids: [7, 11, 21]                     # their values in the label files; default 0, 1, 2, ...
    palette: [[128, 64, 128], ...]       # colours in label files and pictures
    ignore: [0, 255]                     # values without a class, may be negative; default 255
    same_as: {tree: vegetation}          # class names of other domains; equal names become one class
    images: images/{path}.{ext}          # templates or globs; these two are the default
    labels: labels/{path}.png

Training reads the split train and evaluation the split val if the patterns contain ``{split}``, or if the
folder has lists ``train.txt`` and ``val.txt``. ``{split}`` is the default if ``images`` has a folder train or
val. A target may have images without label; a source leaves them out.
"""

from __future__ import annotations

import colorsys
import re
from pathlib import Path
from typing import Any

from fastuda.data.domains.entry import DomainEntry
from fastuda.data.domains.layouts import FIELD, LabelRule, Layout
from fastuda.data.labels import IGNORE, UNKNOWN, ClassSet, Color, LabelMap
from fastuda.errors import UserError, nearest
from fastuda.system.files import reading
from fastuda.system.yaml import read_yaml

_KEYS = ("names", "ids", "palette", "ignore", "same_as", "images", "labels")


def template(glob: str) -> str:
    """Template of a glob: ``**/*`` or ``**`` becomes {path}, every other star a field of its own."""
    count = 0

    def star(match: re.Match[str]) -> str:
        nonlocal count
        if "**" in match[0]:
            return "{path}"
        count += 1
        return f"{{star{count}}}"

    return re.sub(r"\*\*/\*|\*\*|\*", star, glob)


def default_palette(count: int) -> tuple[Color, ...]:
    """Distinct colours: hues in steps of the golden ratio, three levels of brightness."""
    colours = []
    for i in range(count):
        r, g, b = colorsys.hsv_to_rgb(i * 0.61803398875 % 1, 0.75, (0.95, 0.7, 0.5)[i % 3])
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return tuple(colours)


def _names(values: list[Any], where: str) -> tuple[str, ...]:
    """Class names; YAML reads an unquoted no, null or 2020-10-05 as another type."""
    for value in values:
        if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
            raise UserError(f"{where} has {value!r}, which is not a name; put it in quotes")
    return tuple(map(str, values))


def _ints(value: Any, where: str, least: int, most: int) -> list[int]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and least <= v <= most for v in values):
        raise UserError(f"{where} must be one or more integers from {least} to {most}, not {value!r}")
    return values


def _is_colour(value: Any) -> bool:
    three = isinstance(value, list) and len(value) == 3
    return three and all(type(v) is int and 0 <= v <= 255 for v in value)


def _pattern(value: Any, where: str) -> str:
    """Template of a pattern whose braces hold field names."""
    pattern = template(value) if isinstance(value, str) else ""
    rest = FIELD.sub("", pattern)
    if not pattern or "{" in rest or "}" in rest or not all(map(str.isidentifier, FIELD.findall(pattern))):
        raise UserError(f"{where} must be a pattern such as some/*.png or some/{{path}}.png, not {value!r}")
    return pattern


def folder_entry(root: Path) -> DomainEntry:
    """Description of a user's data set.

    Raises:
        UserError: ``classes.yaml`` is missing, has an unknown key, or a value is wrong.
    """
    path = root / "classes.yaml"
    if not root.is_dir():
        raise UserError(f"no folder {root} for the domain folder:{root}")
    if not path.is_file():
        raise UserError(f"{root} has no classes.yaml; it names the classes, e.g.  names: [road, car]")
    with reading(path, "YAML"):
        values = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(values, dict) or not isinstance(values.get("names"), list) or not values["names"]:
        raise UserError(f"{path} needs `names`, a list of the classes")
    for key in values:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    classes, label_map = _classes(values, path)
    images, labels = _patterns(values, path)
    has_splits = "{split}" in images or (root / "train.txt").is_file()
    return DomainEntry(
        "folder",
        f"images and labels of {root}",
        classes,
        (Layout(images, (LabelRule(labels, label_map),)),),
        source_split="train" if has_splits else "all",
        target_split="train" if has_splits else "all",
        eval_split="val" if has_splits else "all",
        assumed_void=len(values["names"]) > 1 and not {"ids", "ignore"} & set(values),
        partly_labelled=True,
    )


def _classes(values: dict[str, Any], path: Path) -> tuple[ClassSet, LabelMap]:
    """Classes and label map from the keys names, ids, palette, ignore and same_as."""
    names = _names(values["names"], f"{path}: names")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names has a class twice")
    if len(names) > UNKNOWN:
        raise UserError(f"{path} has {len(names)} names; there can be {UNKNOWN}")
    ids = _ints(values.get("ids", list(range(len(names)))), f"{path}: ids", 0, (1 << 16) - 1)
    palette = values.get("palette")
    if palette is not None and not (isinstance(palette, list) and all(map(_is_colour, palette))):
        raise UserError(f"{path}: palette must be a list of [red, green, blue] from 0 to 255")
    for key, entries in (("ids", ids), ("palette", palette)):
        if entries is not None and len(entries) != len(names):
            raise UserError(f"{path} has {len(names)} names, {len(entries)} {key}")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: ids has a value twice")
    if palette and len(set(map(tuple, palette))) < len(palette):
        raise UserError(f"{path}: palette has a colour twice")
    ignore = _ints(values.get("ignore", IGNORE), f"{path}: ignore", -(1 << 31), (1 << 31) - 1)
    for raw in ignore if "ignore" in values else ():
        if raw in ids:
            name = names[ids.index(raw)] + ("" if "ids" in values else " (the default ids are 0, 1, 2, ...)")
            raise UserError(f"{path}: ignore has {raw}, the id of {name}; remove it from one of them")
    same_as = values.get("same_as", {})
    if not isinstance(same_as, dict) or not set(map(str, same_as)) <= set(names):
        raise UserError(f"{path}: same_as must map names of this file to names elsewhere, not {same_as!r}")
    same_as = dict(zip(map(str, same_as), _names(list(same_as.values()), f"{path}: same_as"), strict=True))
    colours = tuple((c[0], c[1], c[2]) for c in palette) if palette else default_palette(len(names))
    # names with the same name elsewhere become one class, with the colour of the first
    renamed = [same_as.get(name, name) for name in names]
    unique = tuple(dict.fromkeys(renamed))
    classes = ClassSet(unique, tuple(colours[renamed.index(name)] for name in unique))
    train = [unique.index(name) for name in renamed]
    label_map = LabelMap(
        {raw: IGNORE for raw in (*ignore, IGNORE)} | dict(zip(ids, train, strict=True)),
        ({(0, 0, 0): IGNORE} | dict(zip(colours, train, strict=True))) if palette else {},
    )
    return classes, label_map


def _patterns(values: dict[str, Any], path: Path) -> tuple[str, str]:
    """Templates of images and labels."""
    has_folders = any((path.parent / "images" / split).is_dir() for split in ("train", "val"))
    below = "{split}/{path}" if has_folders else "{path}"
    images = _pattern(values.get("images", f"images/{below}.{{ext}}"), f"{path}: images")
    labels = _pattern(values.get("labels", f"labels/{below}.png"), f"{path}: labels")
    unknown = set(FIELD.findall(labels)) - set(FIELD.findall(images))
    if unknown or ".." in f"{images}/{labels}".split("/") or images.startswith("/") or labels.startswith("/"):
        raise UserError(f"{path}: images and labels must be patterns inside the folder with the same stars")
    return images, labels
