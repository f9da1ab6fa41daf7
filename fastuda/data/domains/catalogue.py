"""The data sets that are built in, one entry each, in the layouts in which they are published."""

from __future__ import annotations

from fastuda.data.domains.entry import DomainEntry, Split
from fastuda.data.domains.label_tables import (
    CAMVID,
    CAMVID_LABELS,
    CARLA_COLORS,
    CARLA_OLD_RAW,
    CARLA_RAW,
    CROSS_CITY,
    CROSS_CITY_LABELS,
    IDD_LABELS,
    SYNTHIA,
    SYNTHIA_LABELS,
    VISTAS_1_LABELS,
    VISTAS_2_LABELS,
)
from fastuda.data.domains.layouts import LabelRule, Layout
from fastuda.data.labels import CITYSCAPES, CITYSCAPES_LABELS, CITYSCAPES_TRAIN_IDS

_CITYSCAPES_RULES = (
    LabelRule("gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", CITYSCAPES_LABELS),
    LabelRule("gtFine/{split}/{city}/{stem}_gtFine_labelTrainIds.png", CITYSCAPES_TRAIN_IDS),
    LabelRule("gtFine/{split}/{city}/{stem}_gtFine_polygons.json", CITYSCAPES_LABELS),
)
_CITIES = ("Rio", "Rome", "Taipei", "Tokyo")
_WEATHER = ("fog", "night", "rain", "snow")

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
        "CamVid: images/ labels/ splits.json, train/ with SegNet's trainannot/ or Kaggle's train_labels/, or"
        " 701_StillsRaw_full/",
        CAMVID,
        (
            Layout("images/{stem}.{ext}", (LabelRule("labels/{stem}.png", CAMVID_LABELS),)),
            Layout(
                "{split}/{stem}.{ext}",
                (
                    LabelRule("{split}annot/{stem}.png", CAMVID_LABELS),
                    LabelRule("{split}_labels/{stem}_L.png", CAMVID_LABELS),
                ),
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
    DomainEntry(
        "cross_city",
        "Cross-City (NTHU): {Rio,Rome,Taipei,Tokyo}/Images/{Train,Test}, Labels/Test; or one city's folder",
        CROSS_CITY,
        (
            Layout(
                "{city}/Images/{split}/{stem}.{ext}",
                (LabelRule("{city}/Labels/{split}/{stem}_eval.png", CROSS_CITY_LABELS),),
                {"city": "|".join(_CITIES)},
            ),
            Layout(
                "Images/{split}/{stem}.{ext}",
                (LabelRule("Labels/{split}/{stem}_eval.png", CROSS_CITY_LABELS),),
            ),
        ),
        eval_split="test",
        splits={
            "train": Split({"split": "Train"}),
            "test": Split({"split": "Test"}),
            **{city: Split({"city": city, "split": "Train"}) for city in _CITIES},
            **{f"{city}-test": Split({"city": city, "split": "Test"}) for city in _CITIES},
        },
        eval_splits={city: f"{city}-test" for city in _CITIES},
        folders=("NTHU_Datasets",),
    ),
    DomainEntry(
        "dark_zurich",
        "Dark Zurich: rgb_anon/{train,val}/{night,twilight,day}, gt; splits train (night), train-day, val",
        CITYSCAPES,
        (
            Layout(
                "rgb_anon/{split}/{time}/{sequence}/{stem}_rgb_anon.png",
                (
                    LabelRule(
                        "gt/{split}/{time}/{sequence}/{stem}_gt_labelTrainIds.png", CITYSCAPES_TRAIN_IDS
                    ),
                ),
            ),
        ),
        splits={split: Split({"split": split, "time": "night"}) for split in ("train", "val", "test")}
        | {f"train-{time}": Split({"split": "train", "time": time}) for time in ("twilight", "day")},
        eval_splits={"train-twilight": "val", "train-day": "val"},
        folders=("Dark_Zurich",),
    ),
    DomainEntry(
        "nighttime_driving",
        "Nighttime Driving: leftImg8bit/test/night, gtCoarse_daytime_trainvaltest/test/night",
        CITYSCAPES,
        (
            Layout(
                "leftImg8bit/{split}/night/{stem}_leftImg8bit.png",
                (
                    LabelRule(
                        "gtCoarse_daytime_trainvaltest/{split}/night/{stem}_gtCoarse_labelTrainIds.png",
                        CITYSCAPES_TRAIN_IDS,
                    ),
                ),
            ),
        ),
        source_split="test",
        target_split="test",
        eval_split="test",
        folders=("NighttimeDrivingTest",),
    ),
    DomainEntry(
        "bdd100k",
        "BDD100K: images/10k, labels/sem_seg/masks (or seg/images, seg/labels); night: a list night.txt",
        CITYSCAPES,
        (
            Layout(
                "images/10k/{split}/{stem}.jpg",
                (LabelRule("labels/sem_seg/masks/{split}/{stem}.png", CITYSCAPES_TRAIN_IDS),),
            ),
            Layout(
                "seg/images/{split}/{stem}.jpg",
                (LabelRule("seg/labels/{split}/{stem}_train_id.png", CITYSCAPES_TRAIN_IDS),),
            ),
        ),
        eval_splits={"night": "night"},
        partly_labelled=True,
    ),
    DomainEntry(
        "acdc",
        "ACDC: rgb_anon/{fog,night,rain,snow}/{train,val,test}, gt; splits train, val_ref, fog-train, ...",
        CITYSCAPES,
        (
            Layout(
                "rgb_anon/{weather}/{split}/{sequence}/{stem}_rgb_anon.png",
                (
                    LabelRule(
                        "gt/{weather}/{split}/{sequence}/{stem}_gt_labelTrainIds.png", CITYSCAPES_TRAIN_IDS
                    ),
                    LabelRule("gt/{weather}/{split}/{sequence}/{stem}_gt_labelIds.png", CITYSCAPES_LABELS),
                ),
                {"weather": "|".join(_WEATHER)},
            ),
            Layout(
                "rgb_anon/{weather}/{split}/{sequence}/{stem}_rgb_ref_anon.png",
                (
                    LabelRule(
                        "gt/{weather}/{split}/{sequence}/{stem}_gt_ref_labelTrainIds.png",
                        CITYSCAPES_TRAIN_IDS,
                    ),
                    LabelRule(
                        "gt/{weather}/{split}/{sequence}/{stem}_gt_ref_labelIds.png", CITYSCAPES_LABELS
                    ),
                ),
                {"weather": "|".join(_WEATHER), "split": "train_ref|val_ref|test_ref"},
            ),
        ),
        splits={
            f"{weather}-{split}": Split({"weather": weather, "split": split})
            for weather in _WEATHER
            for split in ("train", "val", "test", "train_ref", "val_ref", "test_ref")
        },
        eval_splits={f"{weather}-train": f"{weather}-val" for weather in _WEATHER}
        | {f"{weather}-train_ref": f"{weather}-val_ref" for weather in _WEATHER}
        | {"train_ref": "val_ref"},
        folders=("ACDC",),
    ),
    DomainEntry(
        "mapillary",
        "Mapillary Vistas 1.2 or 2.0: {training,validation}/images, labels, in Cityscapes' 19 classes",
        CITYSCAPES,
        (
            Layout(
                "{split}/images/{stem}.jpg",
                (
                    LabelRule("{split}/v1.2/labels/{stem}.png", VISTAS_1_LABELS),
                    LabelRule("{split}/v2.0/labels/{stem}.png", VISTAS_2_LABELS),
                    LabelRule("{split}/labels/{stem}.png", VISTAS_1_LABELS),
                ),
            ),
        ),
        splits={"train": Split({"split": "training"}), "val": Split({"split": "validation"})},
        folders=("vistas", "Mapillary"),
    ),
    DomainEntry(
        "idd",
        "India Driving Dataset: leftImg8bit, gtFine polygons (read directly), labelids or labelcsTrainIds",
        CITYSCAPES,
        (
            Layout(
                "leftImg8bit/{split}/{drive}/{stem}_leftImg8bit.{ext}",
                (
                    LabelRule(
                        "gtFine/{split}/{drive}/{stem}_gtFine_labelcsTrainIds.png", CITYSCAPES_TRAIN_IDS
                    ),
                    LabelRule("gtFine/{split}/{drive}/{stem}_gtFine_labelids.png", IDD_LABELS),
                    LabelRule("gtFine/{split}/{drive}/{stem}_gtFine_polygons.json", IDD_LABELS),
                ),
            ),
        ),
        folders=("IDD", "IDD_Segmentation"),
    ),
    DomainEntry(
        "carla",
        "CARLA: X_rgb.png with X_seg.png in CityScapesPalette; rgb/ with seg/ or raw/; CameraRGB/",
        CITYSCAPES,
        (
            Layout("{path}_rgb.{ext}", (LabelRule("{path}_seg.png", CARLA_COLORS),)),
            Layout(
                "rgb/{path}.{ext}",
                (LabelRule("seg/{path}.png", CARLA_COLORS), LabelRule("raw/{path}.png", CARLA_RAW)),
            ),
            Layout("CameraRGB/{path}.{ext}", (LabelRule("CameraSeg/{path}.png", CARLA_OLD_RAW),)),
        ),
        source_split="all",
        target_split="all",
        eval_split="all",
    ),
)

DOMAINS = {entry.name: entry for entry in _TABLE}
