"""Description of a data set: its classes, where its files are, and its splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastuda.data.domains.layouts import Layout
from fastuda.data.labels import ClassSet


@dataclass(frozen=True)
class Split:
    """A named part of a data set."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Values of the template's fields; ``|`` separates alternatives."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of the file names."""


@dataclass(frozen=True)
class DomainEntry:
    """A data set as it lies on disk."""

    name: str
    about: str
    classes: ClassSet
    layouts: tuple[Layout, ...]
    source_split: str = "train"
    """Default split of a source."""
    target_split: str = "train"
    """Default split of a target."""
    eval_split: str = "val"
    """Split that evaluates ``target_split``."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    """Splits that are not folders of the same name."""
    eval_splits: Mapping[str, str] = field(default_factory=dict)
    """Evaluation split of a target split, if it is not ``eval_split``."""
    folders: tuple[str, ...] = ()
    """Further names of its folder under the data root."""
    fit_labels: bool = False
    """Some labels differ from their image by a few rows and are resized to it (nearest)."""
    assumed_void: bool = False
    """``classes.yaml`` sets neither ``ids`` nor ``ignore``, so 255 may be a class or void."""
    partly_labelled: bool = False
    """Training and evaluation leave out images without a label instead of raising an error."""
