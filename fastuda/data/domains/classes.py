"""Matches the classes of two domains by name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from fastuda.data.labels import ClassSet
from fastuda.errors import UserError, nearest

_SYNONYMS = {
    "pavement": "sidewalk",
    "footpath": "sidewalk",
    "tree": "vegetation",
    "trees": "vegetation",
    "pedestrian": "person",
    "pedestrians": "person",
    "human": "person",
    "people": "person",
    "sign": "trafficsign",
    "signsymbol": "trafficsign",
    "light": "trafficlight",
    "columnpole": "pole",
    "motorbike": "motorcycle",
    "bike": "bicycle",
    "automobile": "car",
    "roads": "road",
    "sidewalks": "sidewalk",
    "buildings": "building",
    "walls": "wall",
    "fences": "fence",
    "poles": "pole",
    "trafficsigns": "trafficsign",
    "trafficlights": "trafficlight",
}


def canonical(name: str) -> str:
    """Class name for comparison: lower case, without spaces and punctuation, synonyms replaced."""
    word = _word(name)
    return _SYNONYMS.get(word, word)


def _word(name: str) -> str:
    plain = unicodedata.normalize("NFKC", name).lower()
    return re.sub(r"[\s!-/:-@\[-`{-~]", "", plain) or plain


def positions(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """Position of each class ``among`` others, by its own name or else by a synonym; None if it is not
    there."""
    words, keys = [_word(name) for name in among], [canonical(name) for name in among]
    places: list[int | None] = []
    for name in names:
        word, key = _word(name), canonical(name)
        places.append(words.index(word) if word in words else keys.index(key) if key in keys else None)
    return places


@dataclass(frozen=True)
class ClassMapping:
    """Classes that are trained and evaluated, and the new train ids of each domain."""

    shared: ClassSet
    """In the order of the target, with its names and colours."""
    source: dict[int, int]
    """Source train id to shared id; the others are ignored."""
    target: dict[int, int]
    """Target train id to shared id."""
    source_only: tuple[str, ...]
    target_only: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    """(source name, target name) of every shared class whose names differ."""

    def describe(self) -> str:
        """Summary for the log."""
        lines = [f"classes ({len(self.shared)}): {', '.join(self.shared.names)}"]
        if self.renamed:
            lines.append(
                "  same by name: " + ", ".join(f"{source} = {target}" for source, target in self.renamed)
            )
        if self.source_only:
            lines.append(f"  ignored, only in the source: {', '.join(self.source_only)}")
        if self.target_only:
            lines.append(f"  ignored, only in the target: {', '.join(self.target_only)}")
        return "\n".join(lines)


def class_mapping(
    source: ClassSet,
    target: ClassSet,
    classes: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
) -> ClassMapping:
    """Match the classes of two domains by name.

    Args:
        classes: names of the classes to keep, of either domain.
        aliases: pairs ``target=source`` of names for the same class.

    Raises:
        UserError: an alias or class is in neither domain, or the domains share no class.
    """
    keys = _keys(source, target, aliases)
    for name in classes or ():
        if canonical(name) not in keys:
            raise UserError(f"data.classes: no class {name!r}{nearest(name, target.names)}")
    kept = set(keys.values()) if classes is None else {keys[canonical(name)] for name in classes}
    source_ids: dict[str, list[int]] = {}
    for i, name in enumerate(source.names):
        source_ids.setdefault(keys[canonical(name)], []).append(i)
    shared: dict[str, str] = {}
    source_table: dict[int, int] = {}
    target_table: dict[int, int] = {}
    for j, name in enumerate(target.names):
        key = keys[canonical(name)]
        if key not in source_ids or key not in kept:
            continue
        shared.setdefault(key, name)
        target_table[j] = list(shared).index(key)
        source_table.update({i: target_table[j] for i in source_ids[key]})
    if not shared:
        raise UserError(
            f"no class in common: source has {', '.join(source.names)}; target has "
            f"{', '.join(target.names)}; name equal ones with data.class_alias"
        )
    names = tuple(shared.values())
    return ClassMapping(
        ClassSet(names, tuple(target.palette[target.names.index(name)] for name in names)),
        source_table,
        target_table,
        tuple(name for i, name in enumerate(source.names) if i not in source_table),
        tuple(name for i, name in enumerate(target.names) if i not in target_table),
        tuple(
            (source.names[i], names[k])
            for i, k in source_table.items()
            if source.names[i].lower() != names[k].lower()
        ),
    )


def _keys(source: ClassSet, target: ClassSet, aliases: Sequence[str]) -> dict[str, str]:
    """Key of every class by its canonical name; classes with equal keys are the same class."""
    keys = {canonical(name): canonical(name) for name in (*source.names, *target.names)}
    for alias in aliases:
        target_name, separator, source_name = alias.partition("=")
        if not separator:
            raise UserError(f"data.class_alias: {alias!r} is not of the form target=source")
        for name, owner in ((target_name, target), (source_name, source)):
            if canonical(name) not in {canonical(n) for n in owner.names}:
                raise UserError(f"data.class_alias: no class {name!r}{nearest(name, owner.names)}")
        keys[canonical(target_name)] = canonical(source_name)
    return keys
