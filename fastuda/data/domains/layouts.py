"""Finding image and label files from path templates: one line says where both are.

A template is a path with fields: ``leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png``. ``{path}`` matches
any depth, every other field one path component or a part of it. A label template is filled from the fields of
the image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastuda.data.labels import LabelMap
from fastuda.errors import UserError

FIELD = re.compile(r"\{(\w+)\}")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Item(NamedTuple):
    """One image and, where there is one, its label."""

    image: Path
    label: Path | None


class LabelRule(NamedTuple):
    """Where the label of an image is, and what its values mean."""

    template: str
    label_map: LabelMap


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on disk. The first label rule with a file on disk is the one used."""

    image: str
    labels: tuple[LabelRule, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    """The values that a field can have, alternatives by ``|``, where it could be mistaken."""

    def narrowed(self, fields: Mapping[str, str]) -> dict[str, str] | None:
        """Fixed field values within what the layout allows; None where it allows none of them."""
        narrow = dict(self.fields)
        for name, value in fields.items():
            allowed = self.fields.get(name, value).split("|")
            kept = [choice for choice in value.split("|") if choice in allowed]
            if not kept:
                return None
            narrow[name] = "|".join(kept)
        return narrow


def _regex(template: str, fields: Mapping[str, str]) -> re.Pattern[str]:
    """The template as an expression; a field with a fixed value (alternatives by ``|``) matches only that."""
    parts, last, seen = [], 0, set()
    for match in FIELD.finditer(template):
        name = match[1]
        parts.append(re.escape(template[last : match.start()]))
        if name in seen:
            parts.append(f"(?P={name})")
        elif name in fields:
            choices = "|".join(re.escape(choice) for choice in fields[name].split("|"))
            parts.append(f"(?P<{name}>{choices})")
        elif name == "ext":
            parts.append(f"(?P<ext>(?i:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}))")
        else:
            parts.append(f"(?P<{name}>{'.+' if name == 'path' else '[^/]+'})")
        seen.add(name)
        last = match.end()
    parts.append(re.escape(template[last:]))
    return re.compile("".join(parts))


def _fixed_part(template: str, fields: Mapping[str, str]) -> list[str]:
    """The leading folders of a template that hold no open field."""
    folders = []
    for part in template.split("/")[:-1]:
        names = FIELD.findall(part)
        if any(name not in fields or "|" in fields[name] for name in names):
            break
        folders.append(part.format(**fields) if names else part)
    return folders


def fixed_folder(template: str) -> str:
    """The leading folders of a template without a field, each with its slash: where all images are."""
    return "".join(f"{part}/" for part in _fixed_part(template, {}))


def match_files(root: Path, template: str, fields: Mapping[str, str]) -> list[tuple[Path, dict[str, str]]]:
    """Files under ``root`` that the template names, sorted, each with its fields."""
    fixed = _fixed_part(template, fields)
    base = root.joinpath(*fixed)
    if not base.is_dir():
        return []
    pattern = _regex(template, fields)
    deep = "{path}" in template or template.count("/") > len(fixed)
    found = []
    for path in _walk(base) if deep else sorted(base.iterdir()):
        match = pattern.fullmatch(path.relative_to(root).as_posix())
        if match and not path.name.startswith(".") and path.is_file():
            found.append((path, match.groupdict()))
    return found


def _walk(base: Path) -> Iterator[Path]:
    """Every file below ``base`` in sorted order; linked folders are entered, each real folder once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(base, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            yield Path(folder, name)


def label_path(root: Path, template: str, fields: Mapping[str, str]) -> Path:
    """The label file of an image with these fields."""
    return root / template.format(**fields)


def find_items(
    root: Path, layout: Layout, fields: Mapping[str, str]
) -> tuple[list[tuple[Item, dict[str, str]]], LabelMap]:
    """Every image of a layout with its label (none where the file is absent), and the map of the rule in use.
    A label is no image, even where the pattern of the images takes it: one of another image, or one without
    an image where the pattern of the labels takes no labelled image.

    Raises:
        UserError: two images claim one label file, or an image is its own label.
    """
    narrow = layout.narrowed(fields)
    images = [] if narrow is None else match_files(root, layout.image, narrow)
    rule = layout.labels[0]
    for candidate in layout.labels:
        if any(label_path(root, candidate.template, found).is_file() for _, found in images):
            rule = candidate
            break
    labelled = [(path, label_path(root, rule.template, found), found) for path, found in images]
    files = {label for _, label, _ in labelled if label.is_file()}
    labels = files | _strays(root, rule.template, labelled, files)
    owner: dict[Path, Path] = {}
    items = []
    for path, label, found in labelled:
        if path == label:
            raise UserError(f"{path} is image and label at once: images and labels need different patterns")
        if path in labels:
            continue
        if label in files and label in owner:
            raise UserError(f"{owner[label]} and {path} are two images of one label {label.name}: remove one")
        owner[label] = path
        items.append((Item(path, label if label in files else None), found))
    return items, rule.label_map


def _strays(
    root: Path, template: str, labelled: Sequence[tuple[Path, Path, object]], files: set[Path]
) -> set[Path]:
    """Unlabelled images with the name of a label, unless labelled images have such names as well."""
    pattern = _regex(template, {})
    named = {path for path, _, _ in labelled if pattern.fullmatch(path.relative_to(root).as_posix())}
    sure = {path for path, label, _ in labelled if label in files} - files
    return named - sure if sure and not named & sure else set()


def left_out(items: Sequence[Item]) -> list[Path]:
    """Files beside the images that are named as images are, and are neither images nor labels of the items:
    another suffix than the pattern's, links that lead nowhere."""
    taken = {path for item in items for path in item}
    return [
        path
        for folder in sorted({item.image.parent for item in items})
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path not in taken
    ]
