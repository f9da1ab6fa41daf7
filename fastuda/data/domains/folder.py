"""``folder:PATH``: any images and label files, described by a ``classes.yaml`` in the folder.

    names: [road, building, tree]        # the classes, train ids in this order
    ids: [7, 11, 21]                     # their values in the label files; 0, 1, 2, ... where absent
    palette: [[128, 64, 128], ...]       # for pictures, and for label files with colours
    ignore: [0, 255]                     # values without a class, -1 as well; 255 where absent
    same_as: {tree: vegetation}          # names of the same class in other domains; two of one name are one
    images: images/{path}.{ext}          # templates or globs; these two are the default
    labels: labels/{path}.png

With ``{split}`` in the patterns (the default where images/ has a folder train or val), or with lists
``train.txt`` and ``val.txt`` in the folder, training reads train and evaluation val. Images without a label
file are fine in a target; as a source, they are left out.
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
from fastuda.system.yaml import read_yaml

_KEYS = ("names", "ids", "palette", "ignore", "same_as", "images", "labels")


def template(glob: str) -> str:
    """A glob as a template: ``**/*`` or ``**`` becomes {path}, every other star a field that images and
    labels share."""
    count = 0

    def star(match: re.Match[str]) -> str:
        nonlocal count
        if "**" in match[0]:
            return "{path}"
        count += 1
        return f"{{star{count}}}"

    return re.sub(r"\*\*/\*|\*\*|\*", star, glob)


def default_palette(count: int) -> tuple[Color, ...]:
    """Distinct colours: hues by the golden ratio, brightness in three steps."""
    colours = []
    for i in range(count):
        r, g, b = colorsys.hsv_to_rgb(i * 0.61803398875 % 1, 0.75, (0.95, 0.7, 0.5)[i % 3])
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return tuple(colours)


def _names(values: list[Any], where: str) -> tuple[str, ...]:
    """Class names as they are written; YAML reads a bare no, null or 2020-10-05 as something else."""
    for value in values:
        if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
            raise UserError(f"{where} has {value!r}, which is no name; put it in quotes")
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
    """The template of a pattern, whose braces hold names."""
    found = template(value) if isinstance(value, str) else ""
    rest = FIELD.sub("", found)
    if not found or "{" in rest or "}" in rest or not all(map(str.isidentifier, FIELD.findall(found))):
        raise UserError(f"{where} must be a pattern such as some/*.png or some/{{path}}.png, not {value!r}")
    return found


def folder_entry(root: Path) -> DomainEntry:
    """The entry of a user's own data set.

    Raises:
        UserError: no ``classes.yaml``, or one with an unknown key or a value of the wrong kind; the key is
            named.
    """
    path = root / "classes.yaml"
    if not root.is_dir():
        raise UserError(f"no folder {root} for the domain folder:{root}")
    if not path.is_file():
        raise UserError(f"{root} has no classes.yaml; it names the classes, e.g.  names: [road, car]")
    try:
        said = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(said, dict) or not isinstance(said.get("names"), list) or not said["names"]:
        raise UserError(f"{path} needs `names`, a list of the classes")
    for key in said:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    names = _names(said["names"], f"{path}: names")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: names has a class twice")
    if len(names) > UNKNOWN:
        raise UserError(f"{path} has {len(names)} names; there can be {UNKNOWN}")
    ids = _ints(said.get("ids", list(range(len(names)))), f"{path}: ids", 0, (1 << 16) - 1)
    palette = said.get("palette")
    if palette is not None and not (isinstance(palette, list) and all(map(_is_colour, palette))):
        raise UserError(f"{path}: palette must be a list of [red, green, blue] from 0 to 255")
    for key, value in (("ids", ids), ("palette", palette)):
        if value is not None and len(value) != len(names):
            raise UserError(f"{path} has {len(names)} names, {len(value)} {key}")
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: ids has a value twice")
    if palette and len(set(map(tuple, palette))) < len(palette):
        raise UserError(f"{path}: palette has a colour twice")
    ignore = _ints(said.get("ignore", IGNORE), f"{path}: ignore", -(1 << 31), (1 << 31) - 1)
    for raw in ignore if "ignore" in said else ():
        if raw in ids:
            by_default = "" if "ids" in said else " (ids are 0, 1, 2, ... where the file has none)"
            name = names[ids.index(raw)]
            raise UserError(f"{path}: ignore has {raw}, the id of {name}{by_default}; take it out of one")
    same = said.get("same_as", {})
    if not isinstance(same, dict) or not set(map(str, same)) <= set(names):
        raise UserError(f"{path}: same_as maps names of this file to names elsewhere, not {same!r}")
    same = dict(zip(map(str, same), _names(list(same.values()), f"{path}: same_as"), strict=True))
    colours = tuple((c[0], c[1], c[2]) for c in palette) if palette else default_palette(len(names))
    # names that are the same elsewhere are one class, in the colour of the first
    called = [same.get(name, name) for name in names]
    unique = tuple(dict.fromkeys(called))
    classes = ClassSet(unique, tuple(colours[called.index(name)] for name in unique))
    train = [unique.index(name) for name in called]
    label_map = LabelMap(
        {raw: IGNORE for raw in (*ignore, IGNORE)} | dict(zip(ids, train, strict=True)),
        ({(0, 0, 0): IGNORE} | dict(zip(colours, train, strict=True))) if palette else {},
    )
    below = "{split}/" if any((root / "images" / split).is_dir() for split in ("train", "val")) else ""
    images = _pattern(said.get("images", f"images/{below}{{path}}.{{ext}}"), f"{path}: images")
    labels = _pattern(said.get("labels", f"labels/{below}{{path}}.png"), f"{path}: labels")
    fields = set(FIELD.findall(labels)) - set(FIELD.findall(images))
    if fields or ".." in f"{images}/{labels}".split("/") or images.startswith("/") or labels.startswith("/"):
        raise UserError(f"{path}: images and labels must be patterns inside the folder with the same stars")
    split = "{split}" in images or (root / "train.txt").is_file()
    return DomainEntry(
        "folder",
        f"images and labels of {root}",
        classes,
        (Layout(images, (LabelRule(labels, label_map),)),),
        source_split="train" if split else "all",
        target_split="train" if split else "all",
        eval_split="val" if split else "all",
        assumed_void=len(names) > 1 and not {"ids", "ignore"} & set(said),
        partly_labelled=True,
    )
