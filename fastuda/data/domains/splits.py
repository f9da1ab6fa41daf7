"""Files of a split: chosen by folder, by name prefix, or by a list in the data set."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastuda.data.domains.entry import DomainEntry, Split
from fastuda.data.domains.layouts import IMAGE_SUFFIXES, Item, Layout, find_items, fixed_folder, left_out
from fastuda.data.labels import LabelMap
from fastuda.errors import UserError, nearest
from fastuda.system.files import reading

log = logging.getLogger("fastuda")


class Selected(NamedTuple):
    """Images and labels of a split."""

    items: list[Item]
    label_map: LabelMap
    layout: Layout


def read_list(path: Path) -> list[str]:
    """Lines of a split file, without empty lines and lines that begin with #."""
    with reading(path, "a list of images"):
        lines = list(map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()))
    return [line for line in lines if line and not line.startswith("#")]


def check_names(names: list[str], where: Path) -> list[str]:
    """Return the names if none of them leaves the data set.

    Raises:
        UserError: a name is absolute or contains ``..``.
    """
    for name in names:
        if name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{where}: {name} leads out of the data set")
    return names


def own_lists(root: Path) -> dict[str, tuple[Path, list[str] | None]]:
    """Splits listed in the data set, each with its file and the image names.

    Lists are in ``splits.json``, where dots join nested keys, and in files ``NAME.txt``. Names in such a file
    are None here and are read when the split is used.
    """
    lists: dict[str, tuple[Path, list[str] | None]] = {}
    for folder in (root, root / "splits", root / "lists"):
        if folder.is_dir():
            lists.update({path.stem: (path, None) for path in sorted(folder.glob("*.txt"))})
    path = root / "splits.json"
    if not path.is_file():
        return lists
    with reading(path, "JSON"):
        splits = json.loads(path.read_text(encoding="utf-8-sig"))

    def walk(node: object, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else str(key))
        elif isinstance(node, list) and node and all(isinstance(entry, str) for entry in node):
            lists[name] = (path, node)

    walk(splits, "")
    return lists


def is_list(split: str) -> bool:
    """Whether a split is named by its list file."""
    return split.endswith(".txt")


def list_file(root: Path, split: str) -> Path:
    """List file of a split: in the data set, or else a path.

    Raises:
        UserError: there is no such file.
    """
    for path in (root / split, root / "splits" / split, root / "lists" / split, Path(split).expanduser()):
        if path.is_file():
            return path
    raise UserError(f"no list {split} in {root} or in the working directory")


def _names(lists: dict[str, tuple[Path, list[str] | None]], split: str) -> tuple[Path, list[str]] | None:
    """File and image names of a listed split, by its full name or by a unique last part of it."""
    matches = [split] if split in lists else [name for name in lists if name.rpartition(".")[2] == split]
    if len(matches) != 1:
        return None
    path, names = lists[matches[0]]
    return path, check_names(read_list(path) if names is None else names, path)


def select(root: Path, entry: DomainEntry, split: str) -> Selected:
    """Items of a split and their label map, in the first layout that has images.

    Raises:
        UserError: there are no images, no such split, or a list names a missing file.
    """
    lists = own_lists(root)
    if is_list(split):
        path = list_file(root, split)
        listed: tuple[Path, list[str]] | None = (path, check_names(read_list(path), path))
    else:
        listed = None if split in entry.splits else _names(lists, split)
    chosen = entry.splits.get(split, Split() if listed or split == "all" else Split({"split": split}))
    names = {*entry.splits, *lists, "all"}
    group = sorted(name for name in lists if name.startswith(f"{split}."))
    if group and listed is None:
        raise UserError(f"split {split!r} is a group; choose one of {', '.join(group)}")
    without_splits = False
    folders: set[str] = set()
    for layout in entry.layouts:
        matches, label_map = find_items(root, layout, chosen.fields)
        if not matches:
            if chosen.fields:
                folders |= {
                    fields["split"] for _, fields in find_items(root, layout, {})[0] if "split" in fields
                }
            continue
        if "split" in chosen.fields and split not in entry.splits and "{split}" not in layout.image:
            without_splits = True
            continue
        items = [item for item, _ in matches]
        if entry.name == "folder":
            _note_left_out(layout, items)
        if listed is not None:
            items = _listed(root, layout, items, listed[1], listed[0])
        items = [item for item in items if item.image.name.startswith(chosen.prefixes or "")]
        if items:
            return Selected(items, label_map, layout)
    if without_splits:
        raise UserError(f"{entry.name} in {root} has no split {split!r}{nearest(split, names)}")
    patterns = " or ".join(filled(layout.image, chosen.fields) for layout in entry.layouts)
    others = nearest(split, (names | folders) - {split}) if folders else ""
    raise UserError(f"no images for split {split!r} of {entry.name} in {root}: looked for {patterns}{others}")


def filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with every field that has a single value filled in."""
    for name, value in fields.items():
        if "|" not in value:
            template = template.replace(f"{{{name}}}", value)
    return template


def _note_left_out(layout: Layout, items: list[Item]) -> None:
    others = left_out(items)
    if others:
        _log_once(
            f"{len(others)} files beside the images are left out: they do not match {layout.image},"
            f" are labels without an image, or are broken links; the first is {others[0]}"
        )


@cache
def _log_once(message: str) -> None:
    """Log a line once, even if the domain is opened several times."""
    log.info("%s", message)


class _Names:
    """Looks up images by the names that a list may use.

    The names are tried in this order: the path in the data set, the path in the folder of the images, both
    without suffix, the end of the path, and that without suffix. Unicode's composed forms are compared.
    """

    def __init__(self, root: Path, folder: str, items: list[Item]):
        self.root, self.items = root, items
        self.lookups: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(6)]
        for i, item in enumerate(items):
            path = item.image.relative_to(root)
            for kind, spelling in enumerate((path, path.with_suffix(""))):
                name = _composed(spelling.as_posix())
                self.lookups[2 * kind][name].append(i)
                self.lookups[2 * kind + 1][name.removeprefix(folder)].append(i)
                parts = name.split("/")
                for k in range(1, len(parts)):
                    self.lookups[4 + kind]["/".join(parts[k:])].append(i)

    def find(self, name: str, where: Path) -> int | None:
        """Index of the image with this name, or None.

        Raises:
            UserError: the name matches two images.
        """
        for spelling in (name, name.replace("\\", "/")):
            while spelling.startswith("./"):
                spelling = spelling[2:]
            for lookup in self.lookups:
                matches = lookup.get(_composed(spelling), [])
                if len(matches) > 1:  # two files may differ only in the Unicode form
                    exact = [i for i in matches if self._ends(i, spelling)]
                    matches = exact if len(exact) == 1 else matches
                if len(matches) > 1:
                    one, two = (self.items[i].image.relative_to(self.root) for i in matches[:2])
                    raise UserError(f"{where}: {name} fits two images, {one} and {two}; name one by its path")
                if matches:
                    return matches[0]
        return None

    def _ends(self, index: int, spelling: str) -> bool:
        path = self.items[index].image.as_posix()
        return path.endswith(f"/{spelling}") or path.rpartition(".")[0].endswith(f"/{spelling}")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(root: Path, layout: Layout, items: list[Item], names: list[str], where: Path) -> list[Item]:
    """Items that a list names, in the order of the list.

    A line is a name. If no image has that name, the name ends at one of the spaces, the last one first.

    Raises:
        UserError: a line names no image, two images, or the image of another line.
    """
    lookup = _Names(root, fixed_folder(layout.image), items)
    chosen: dict[int, str] = {}
    for name in names:
        index = lookup.find(name, where)
        for space in reversed([match.start() for match in re.finditer(r"\s+", name)]):
            # the suffix ends a name: "road 2.png" is never the image "road"
            cut = _is_image_name(name) and not _is_image_name(name[:space])
            if index is None and not cut:
                index = lookup.find(name[:space], where)
        if index is None:
            raise UserError(f"{where} lists {name}, which is no image in {root}")
        if index in chosen:
            other = "" if chosen[index] == name else f" (as {chosen[index]})"
            raise UserError(f"{where}: {name} is in the list twice{other}; remove one")
        chosen[index] = name
    return [items[index] for index in chosen]


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def evaluation_split(root: Path, entry: DomainEntry, target_split: str | None) -> str:
    """Split that evaluates a target split: the entry's, or the split with train replaced by val or test.
    A list file has the entry's, unless that is all images.

    Raises:
        UserError: there is none.
    """
    if target_split is None or target_split == entry.target_split:
        return entry.eval_split
    if is_list(target_split) and entry.eval_split != "all":
        return entry.eval_split
    if target_split in entry.eval_splits:
        return entry.eval_splits[target_split]
    names = {*own_lists(root), *entry.splits}
    for word in ("val", "test"):
        name = target_split.replace("train", word)
        if name != target_split and name in names:
            return name
    if target_split in ("all", "train"):
        return entry.eval_split
    raise UserError(f"which split evaluates {entry.name}:{target_split}? Name it with data.eval_split")
