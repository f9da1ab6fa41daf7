"""Which files of a data set a split holds: folders, name prefixes, or lists that the data set brings."""

from __future__ import annotations

import json
from pathlib import Path

from fastuda.data.domains.catalogue import DomainEntry, Split
from fastuda.data.domains.layouts import Item, find_items
from fastuda.data.labels import LabelMap
from fastuda.errors import UserError, nearest


def read_list(path: Path) -> list[str]:
    """The names in a split file: the first word of every line, relative to the data set; # starts a
    comment."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of images: {error}") from error
    words = (line.split() for line in text.splitlines())
    return [line[0] for line in words if line and not line[0].startswith("#")]


def check_names(names: list[str], where: Path) -> list[str]:
    """The names, once it is sure that each stays in the data set and comes once.

    Raises:
        UserError: an absolute name, one with ``..``, or one that occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{where}: {name} leads out of the data set")
        if name in seen:
            raise UserError(f"{where}: {name} is in the list twice; remove one")
        seen.add(name)
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


def select(root: Path, entry: DomainEntry, split: str) -> tuple[list[Item], LabelMap] | None:
    """Items of a split and the map of their labels, in the first layout that is on disk; None where none is.

    Raises:
        UserError: a layout is there but not this split, or a list names a file that is not there.
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
        if listed is not None:
            items = _listed(root, items, listed[1], listed[0])
        return [item for item in items if item.image.name.startswith(chosen.prefixes or "")], label_map
    if folders:
        known |= folders
        raise UserError(f"no images for split {split!r} of {entry.name} in {root}{nearest(split, known)}")
    if present:
        raise UserError(f"{entry.name} in {root} has no split {split!r}{nearest(split, known)}")
    return None


def _listed(root: Path, items: list[Item], names: list[str], where: Path) -> list[Item]:
    """The items that a list names, by path relative to the data set, file name or stem, in the list's
    order."""
    by_name: dict[str, Item] = {}
    for item in items:
        for name in (item.image.stem, item.image.name, item.image.relative_to(root).as_posix()):
            by_name[name] = item
    missing = [name for name in names if name.lstrip("./") not in by_name]
    if missing:
        raise UserError(f"{where} lists {missing[0]}, which is no image in {root}")
    return [by_name[name.lstrip("./")] for name in names]


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
