"""Which files of a data set a split holds: folders, name prefixes, or lists that the data set brings."""

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

log = logging.getLogger("fastuda")


class Selected(NamedTuple):
    """What a split holds."""

    items: list[Item]
    label_map: LabelMap
    layout: Layout


def read_list(path: Path) -> list[str]:
    """The lines of a split file, without empty ones and those that begin with #."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of images: {error}") from error
    lines = map(str.strip, text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def check_names(names: list[str], where: Path) -> list[str]:
    """The names, once it is sure that each stays in the data set.

    Raises:
        UserError: an absolute name, or one with ``..``.
    """
    for name in names:
        if name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{where}: {name} leads out of the data set")
    return names


def own_lists(root: Path) -> dict[str, tuple[Path, list[str] | None]]:
    """Splits that the data set brings: lists in splits.json (nested keys joined by dots), and NAME.txt
    files (read when they are asked for)."""
    found: dict[str, tuple[Path, list[str] | None]] = {}
    for folder in (root, root / "splits", root / "lists"):
        if folder.is_dir():
            found.update({path.stem: (path, None) for path in sorted(folder.glob("*.txt"))})
    path = root / "splits.json"
    if not path.is_file():
        return found
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error

    def walk(node: object, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else str(key))
        elif isinstance(node, list) and node and all(isinstance(entry, str) for entry in node):
            found[name] = (path, node)

    walk(said, "")
    return found


def _names(lists: dict[str, tuple[Path, list[str] | None]], split: str) -> tuple[Path, list[str]] | None:
    """A split's list, by its full name or by the last part of it where that is unique."""
    full = split
    if split not in lists:
        ends = [name for name in lists if name.rpartition(".")[2] == split]
        if len(ends) != 1:
            return None
        full = ends[0]
    path, names = lists[full]
    return path, check_names(read_list(path) if names is None else names, path)


def select(root: Path, entry: DomainEntry, split: str) -> Selected:
    """Items of a split and the map of their labels, in the first layout that is on disk.

    Raises:
        UserError: there are no images, or not this split, or a list names a file that is not there.
    """
    lists = own_lists(root)
    listed = None if split in entry.splits else _names(lists, split)
    chosen = entry.splits.get(split, Split() if listed or split == "all" else Split({"split": split}))
    known = {*entry.splits, *lists, "all"}
    group = sorted(name for name in lists if name.startswith(f"{split}."))
    if group and listed is None:
        raise UserError(f"split {split!r} is a group; choose one of {', '.join(group)}")
    present = False
    folders: set[str] = set()
    for layout in entry.layouts:
        found, label_map = find_items(root, layout, chosen.fields)
        if not found:
            if chosen.fields:
                folders |= {
                    fields["split"] for _, fields in find_items(root, layout, {})[0] if "split" in fields
                }
            continue
        if "split" in chosen.fields and split not in entry.splits and "{split}" not in layout.image:
            present = True
            continue
        items = [item for item, _ in found]
        if entry.name == "folder":
            _note_left_out(layout, items)
        if listed is not None:
            items = _listed(root, layout, items, listed[1], listed[0])
        items = [item for item in items if item.image.name.startswith(chosen.prefixes or "")]
        if items:
            return Selected(items, label_map, layout)
    if present:
        raise UserError(f"{entry.name} in {root} has no split {split!r}{nearest(split, known)}")
    wanted = " or ".join(filled(layout.image, chosen.fields) for layout in entry.layouts)
    others = nearest(split, (known | folders) - {split}) if folders else ""
    raise UserError(f"no images for split {split!r} of {entry.name} in {root}: looked for {wanted}{others}")


def filled(template: str, fields: Mapping[str, str]) -> str:
    """A template with the fields that have one value."""
    for name, value in fields.items():
        if "|" not in value:
            template = template.replace(f"{{{name}}}", value)
    return template


def _note_left_out(layout: Layout, items: list[Item]) -> None:
    others = left_out(items)
    if others:
        _say(
            f"{len(others)} files beside the images are left out: {layout.image} does not take them,"
            f" they are labels without an image, or they lead nowhere; the first is {others[0]}"
        )


@cache
def _say(message: str) -> None:
    """Log a line once, however often a domain is opened."""
    log.info("%s", message)


class _Names:
    """Images by the names that a list can give them.

    In this order: the path in the data set, the path in the folder of the images, either without its suffix,
    the end of a path, the end of one without its suffix. Names are compared in Unicode's composed form.
    """

    def __init__(self, root: Path, folder: str, items: list[Item]):
        self.root, self.items = root, items
        self.ways: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(6)]
        for i, item in enumerate(items):
            path = item.image.relative_to(root)
            for way, shown in enumerate((path, path.with_suffix(""))):
                name = _composed(shown.as_posix())
                self.ways[2 * way][name].append(i)
                self.ways[2 * way + 1][name.removeprefix(folder)].append(i)
                parts = name.split("/")
                for k in range(1, len(parts)):
                    self.ways[4 + way]["/".join(parts[k:])].append(i)

    def find(self, name: str, where: Path) -> int | None:
        """The place of the image with this name; none where there is no such image.

        Raises:
            UserError: the name fits two images.
        """
        for spelling in (name, name.replace("\\", "/")):
            while spelling.startswith("./"):
                spelling = spelling[2:]
            for way in self.ways:
                fitting = way.get(_composed(spelling), [])
                if len(fitting) > 1:  # two files may differ in nothing but the Unicode form
                    same = [i for i in fitting if self._ends(i, spelling)]
                    fitting = same if len(same) == 1 else fitting
                if len(fitting) > 1:
                    one, two = (self.items[i].image.relative_to(self.root) for i in fitting[:2])
                    raise UserError(f"{where}: {name} fits two images, {one} and {two}; name one by its path")
                if fitting:
                    return fitting[0]
        return None

    def _ends(self, index: int, spelling: str) -> bool:
        path = self.items[index].image.as_posix()
        return path.endswith(f"/{spelling}") or path.rpartition(".")[0].endswith(f"/{spelling}")


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(root: Path, layout: Layout, items: list[Item], names: list[str], where: Path) -> list[Item]:
    """The items that a list names, in the list's order. A line is a name; where no image has it, the name is
    what stands before one of its spaces.

    Raises:
        UserError: a line that names no image, two, or one that another line names.
    """
    known = _Names(root, fixed_folder(layout.image), items)
    chosen: dict[int, str] = {}
    for name in names:
        index = known.find(name, where)
        for space in reversed([match.start() for match in re.finditer(r"\s+", name)]):
            # "road 2.png" is never "road" with something after it
            cut = _is_image_name(name) and not _is_image_name(name[:space])
            if index is None and not cut:
                index = known.find(name[:space], where)
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
    """The split that evaluates a target split.

    Raises:
        UserError: the table does not know one, and the split's own name does not lead to one.
    """
    if target_split is None or target_split == entry.target_split:
        return entry.eval_split
    if target_split in entry.eval_splits:
        return entry.eval_splits[target_split]
    known = {*own_lists(root), *entry.splits}
    for word in ("val", "test"):
        name = target_split.replace("train", word)
        if name != target_split and name in known:
            return name
    if target_split in ("all", "train"):
        return entry.eval_split
    raise UserError(f"which split evaluates {entry.name}:{target_split}? Name it with data.eval_split")
