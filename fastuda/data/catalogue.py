"""The table of data sets: one entry each, as downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastuda.data.labels import (
    CAMVID,
    CAMVID_LABELS,
    CITYSCAPES,
    CITYSCAPES_LABELS,
    CITYSCAPES_TRAIN_IDS,
    SYNTHIA,
    SYNTHIA_LABELS,
    ClassSet,
)
from fastuda.data.layouts import LabelRule, Layout


@dataclass(frozen=True)
class Split:
    """A named part of a data set."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Values of the template's fields, alternatives by ``|``."""
    prefixes: tuple[str, ...] = ()
    """Beginnings of the file names."""


@dataclass(frozen=True)
class DomainEntry:
    """How a data set lies on disk."""

    name: str
    about: str
    classes: ClassSet
    layouts: tuple[Layout, ...]
    source_split: str = "train"
    """Split that is read where none is named."""
    target_split: str = "train"
    eval_split: str = "val"
    splits: Mapping[str, Split] = field(default_factory=dict)
    """Splits that are not folders of their own name."""
    eval_splits: Mapping[str, str] = field(default_factory=dict)
    """Evaluation split of a target split, where it is not ``eval_split``."""
    folders: tuple[str, ...] = ()
    """Names under the data root, besides the domain's own."""
    fit_labels: bool = False
    """Some labels are known to differ from their image's size by a few rows: they are resized (nearest)."""

    partly_labelled: bool = False
    """Images without label are left out of training and evaluation instead of being an error."""


_CITYSCAPES_RULES = (
    LabelRule("gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", CITYSCAPES_LABELS),
    LabelRule("gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png", CITYSCAPES_TRAIN_IDS),
)

_TABLE = (
    DomainEntry(
        "gta5",
        "GTA5 (Playing for Data): images/*.png, labels/*.png with palette or colour",
        CITYSCAPES,
        (Layout("images/{path}.{ext}", (LabelRule("labels/{path}.png", CITYSCAPES_LABELS),)),),
        source_split="all",
        target_split="all",
        eval_split="val",
        folders=("gta", "GTA5", "GTA"),
        fit_labels=True,
    ),
    DomainEntry(
        "synthia",
        "SYNTHIA-RAND-CITYSCAPES: RGB/*.png, GT/LABELS/*.png with 16-bit colour",
        SYNTHIA,
        (Layout("RGB/{stem}.png", (LabelRule("GT/LABELS/{stem}.png", SYNTHIA_LABELS),)),),
        source_split="all",
        target_split="all",
        folders=("SYNTHIA", "RAND_CITYSCAPES"),
    ),
    DomainEntry(
        "cityscapes",
        "Cityscapes: leftImg8bit/{train,val,test}, gtFine labelIds or labelTrainIds",
        CITYSCAPES,
        (Layout("leftImg8bit/{split}/{city}/{stem}_leftImg8bit.{ext}", _CITYSCAPES_RULES),),
        folders=("Cityscapes",),
    ),
    DomainEntry(
        "camvid",
        "CamVid: images/ labels/ splits.json, SegNet's train/ trainannot/, or 701_StillsRaw_full/",
        CAMVID,
        (
            Layout("images/{stem}.{ext}", (LabelRule("labels/{stem}.png", CAMVID_LABELS),)),
            Layout(
                "{split}/{stem}.{ext}",
                (LabelRule("{split}annot/{stem}.png", CAMVID_LABELS),),
                {"split": "train|val|test"},
            ),
            Layout(
                "701_StillsRaw_full/{stem}.{ext}",
                (LabelRule("LabeledApproved_full/{stem}_L.png", CAMVID_LABELS),),
            ),
        ),
        source_split="dusk",
        target_split="day",
        eval_split="day-test",
        splits={
            "dusk": Split(prefixes=("0001TP",)),
            "day": Split(prefixes=("0006R0", "0016E5")),
            "day-test": Split(prefixes=("Seq05VD",)),
        },
        eval_splits={"train": "test", "official.train": "official.test"},
        folders=("CamVid",),
    ),
)

DOMAINS = {entry.name: entry for entry in _TABLE}
