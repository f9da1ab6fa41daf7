"""What the loaders can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastuda.system.settings import Ascending, Bounds, Count, Natural, NonNegative, Positive, Share, Size

Crop = Annotated[tuple[int, int], Bounds(8)]
"""The stride of a network needs 8 x 8."""
Edges = Annotated[tuple[int, int], Bounds(1), Ascending()]


@dataclass(frozen=True)
class DataConfig:
    """Domains, sizes, augmentation and loading."""

    source: str = "scenes"
    """Labelled domain, ``name`` or ``name:path[:split]``."""
    target: str = "scenes"
    """Unlabelled domain, likewise; its training split never shows its labels."""
    data_root: str = "data"
    """Where domains without a path of their own lie, under their names."""
    eval_split: str = "auto"
    """Split of the target that is evaluated; auto: the one that goes with the target's own (val for
    Cityscapes); none: nothing is evaluated, for a target without any label."""
    classes: tuple[str, ...] | None = None
    """Classes to train and evaluate; none: those that source and target share by name."""
    class_alias: tuple[str, ...] = ()
    """Names that mean the same class, as target=source: rider=Bicyclist."""
    crop: Crop = (128, 256)
    """Height and width of the training crop."""
    target_crop: Crop | None = None
    """Of the target, where it differs (FADA and ASANet: 512 x 1024 beside 720 x 1280); none: the same."""
    source_resize: Edges | None = None
    """Range of the shorter edge, drawn per image, aspect kept (PLCA: 760 to 988); none keeps the size."""
    target_resize: Edges | None = None
    """Likewise for the target."""
    source_size: Size | None = None
    """Exact height and width instead, aspect not kept (FADA: 720 x 1280)."""
    target_size: Size | None = None
    """Likewise for the target."""
    eval_size: Size | None = None
    """Height and width of an evaluated image; its label keeps its own resolution."""
    resampling: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, with antialiasing, in training and evaluation; bicubic in FADA, ASANet and
    WeakSegDA."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: NonNegative = 0.0
    """Colour jitter of every source image, on the device: brightness, contrast and saturation times
    1 - jitter to 1 + jitter (FADA: 0.5)."""
    jitter_hue: NonNegative = 0.0
    """Largest turn of the source's hue, in circles (FADA: 0.2)."""
    batch_size: Count = 4
    """Source images and target images of one process and one backward pass."""
    workers: Natural = 2
    """Loader processes; 0 loads in the trainer's own process."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """dali needs NVIDIA DALI and decodes on the GPU where there is one."""
    sampling: Literal["uniform", "rare", "balanced"] = "uniform"
    """Source images: uniform, rare (DAFormer's rare-class sampling) or balanced (FADA's class-balanced
    draws); the index that the last two need is built on first use and kept."""
    rare_temperature: Positive = 0.01
    """Of rare-class sampling: lower draws rare classes more often."""
    rare_share: NonNegative = 0.0015
    """Part of an image that a drawn class must fill (DAFormer: 3000 pixels of GTA5)."""
    rare_crop_share: NonNegative | None = None
    """Part of the crop that it must fill, in the best of ten (SePiCo: 1500 pixels of 640 x 640); none: half
    of rare_share."""
    max_class_share: Share = 1.0
    """Part of a source crop's labelled pixels that one class must stay below, if ten more draws find such a
    crop (DAFormer and SePiCo: 0.75); 1: any crop is taken."""
    weak_labels: str | None = None
    """JSON or CSV file with tags and points of the target's images (WeakSegDA; see
    fastuda.data.loading.weak_labels)."""
    pairs: str | None = None
    """CSV file, or folder of them, with a matched image of every target image (Dark Zurich:
    corresp/train/night; see fastuda.data.loading.pairs)."""
    max_bad: Natural = 10
    """Unreadable training files to skip (each named once) before the run stops."""
    check_labels: Natural = 16
    """Label files per domain that are read before training, so that a wrong label map is found at once."""
