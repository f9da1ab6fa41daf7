"""Finds image and label files by path templates.

A template is a path with fields: ``leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png``. ``{path}`` matches
folders of any depth; every other field matches a path component or a part of one. The fields of an image fill
the template of its label.
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
    """Paths of an image and its label, if it has one."""

    image: Path
    label: Path | None


class LabelRule(NamedTuple):
    """Path template of the labels, and their label map."""

    template: str
    label_map: LabelMap


@dataclass(frozen=True)
class Layout:
    """Path templates of a data set; the first label rule with a file on disk is used."""

    image: str
    labels: tuple[LabelRule, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    """Allowed values of ambiguous fields; ``|`` separates alternatives."""

    def narrowed(self, fields: Mapping[str, str]) -> dict[str, str] | None:
        """Field values that both ``fields`` and the layout allow; None if a field has none left."""
        narrow = dict(self.fields)
        for name, value in fields.items():
            allowed = self.fields.get(name, value).split("|")
            kept = [choice for choice in value.split("|") if choice in allowed]
            if not kept:
                return None
            narrow[name] = "|".join(kept)
        return narrow


def _regex(template: str, fields: Mapping[str, str]) -> re.Pattern[str]:
    """Regular expression of a template; a field in ``fields`` matches only its values."""
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
    """Leading folders of a template in which every field has a single value."""
    folders = []
    for part in template.split("/")[:-1]:
        names = FIELD.findall(part)
        if any(name not in fields or "|" in fields[name] for name in names):
            break
        folders.append(part.format(**fields) if names else part)
    return folders


def fixed_folder(template: str) -> str:
    """Leading folders of a template without fields, each followed by a slash."""
    return "".join(f"{part}/" for part in _fixed_part(template, {}))


def match_files(root: Path, template: str, fields: Mapping[str, str]) -> list[tuple[Path, dict[str, str]]]:
    """Files under ``root`` that match the template, sorted, each with its fields."""
    fixed = _fixed_part(template, fields)
    base = root.joinpath(*fixed)
    if not base.is_dir():
        return []
    pattern = _regex(template, fields)
    deep = "{path}" in template or template.count("/") > len(fixed)
    files = []
    for path in _walk(base) if deep else sorted(base.iterdir()):
        match = pattern.fullmatch(path.relative_to(root).as_posix())
        if match and not path.name.startswith(".") and path.is_file():
            files.append((path, match.groupdict()))
    return files


def _walk(base: Path) -> Iterator[Path]:
    """Files below ``base`` in sorted order; links to folders are followed, each real folder once."""
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
    """Label file of an image with these fields."""
    return root / template.format(**fields)


def find_items(
    root: Path, layout: Layout, fields: Mapping[str, str]
) -> tuple[list[tuple[Item, dict[str, str]]], LabelMap]:
    """Images of a layout with their labels (None if the file is missing), and the label map in use.

    A file that is the label of another image is not an image, even if the image template matches it. An
    unlabelled file that matches the label template is not an image either, unless a labelled image matches
    that template too.

    Raises:
        UserError: two images have the same label file, or an image is its own label.
    """
    narrow = layout.narrowed(fields)
    images = [] if narrow is None else match_files(root, layout.image, narrow)
    rule = layout.labels[0]
    for candidate in layout.labels:
        if any(label_path(root, candidate.template, values).is_file() for _, values in images):
            rule = candidate
            break
    labelled = [(path, label_path(root, rule.template, values), values) for path, values in images]
    files = {label for _, label, _ in labelled if label.is_file()}
    labels = files | _strays(root, rule.template, labelled, files)
    owner: dict[Path, Path] = {}
    items = []
    for path, label, values in labelled:
        if path == label:
            raise UserError(f"{path} is image and label at once: images and labels need different patterns")
        if path in labels:
            continue
        if label in files and label in owner:
            raise UserError(f"{owner[label]} and {path} are two images of one label {label.name}: remove one")
        owner[label] = path
        items.append((Item(path, label if label in files else None), values))
    return items, rule.label_map


def _strays(
    root: Path, template: str, labelled: Sequence[tuple[Path, Path, object]], files: set[Path]
) -> set[Path]:
    """Unlabelled images that match the label template, unless labelled images match it as well."""
    pattern = _regex(template, {})
    matching = {path for path, _, _ in labelled if pattern.fullmatch(path.relative_to(root).as_posix())}
    images = {path for path, label, _ in labelled if label in files} - files
    return matching - images if images and not matching & images else set()


def left_out(items: Sequence[Item]) -> list[Path]:
    """Files in the folders of the images that look like images but are not in ``items``, as image or label.

    They have another suffix than the template, or are broken links.
    """
    taken = {path for item in items for path in item}
    return [
        path
        for folder in sorted({item.image.parent for item in items})
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path not in taken
    ]
