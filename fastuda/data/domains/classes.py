"""Which classes two domains share, found from their names."""

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
    """A class name as it is compared: lower case, no spaces and punctuation, one word of each group of
    synonyms."""
    plain = unicodedata.normalize("NFKC", name).lower()
    word = re.sub(r"[\s!-/:-@\[-`{-~]", "", plain) or plain
    return _SYNONYMS.get(word, word)


@dataclass(frozen=True)
class ClassMapping:
    """The classes that are trained and evaluated, and where each domain's train ids go."""

    shared: ClassSet
    """In the target's order, with the target's names and colours."""
    source: dict[int, int]
    """Train id of the source to shared id; the rest is ignored."""
    target: dict[int, int]
    source_only: tuple[str, ...]
    target_only: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    """(source's name, target's name) of a class where the two differ."""

    def describe(self) -> str:
        """A few lines for the log."""
        lines = [f"classes ({len(self.shared)}): {', '.join(self.shared.names)}"]
        if self.renamed:
            lines.append(
                "  same by name: " + ", ".join(f"{theirs} = {ours}" for theirs, ours in self.renamed)
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
        classes: keep only these (names of either domain).
        aliases: further pairs that mean one class, ``target=source``.

    Raises:
        UserError: an alias or class that is in neither domain, or no class in common.
    """
    key = {canonical(name): canonical(name) for name in (*source.names, *target.names)}
    for alias in aliases:
        theirs, separator, ours = alias.partition("=")
        if not separator:
            raise UserError(f"data.class_alias: {alias!r} is not of the form target=source")
        for name, owner in ((theirs, target), (ours, source)):
            if canonical(name) not in {canonical(n) for n in owner.names}:
                raise UserError(f"data.class_alias: no class {name!r}{nearest(name, owner.names)}")
        key[canonical(theirs)] = canonical(ours)
    wanted = None
    if classes is not None:
        for name in classes:
            if canonical(name) not in key:
                raise UserError(f"data.classes: no class {name!r}{nearest(name, target.names)}")
        wanted = {key[canonical(name)] for name in classes}
    of_source: dict[str, list[int]] = {}
    for i, name in enumerate(source.names):
        of_source.setdefault(key[canonical(name)], []).append(i)
    shared: dict[str, str] = {}
    source_table: dict[int, int] = {}
    target_table: dict[int, int] = {}
    for j, name in enumerate(target.names):
        word = key[canonical(name)]
        if word not in of_source or (wanted is not None and word not in wanted):
            continue
        shared.setdefault(word, name)
        target_table[j] = list(shared).index(word)
        source_table.update({i: target_table[j] for i in of_source[word]})
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
