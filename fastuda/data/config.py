"""Settings of the domains and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastuda.system.settings import Ascending, Bounds, Count, Natural, NonNegative, Positive, Share, Size

Crop = Annotated[tuple[int, int], Bounds(8)]
"""At least 8 x 8, the stride of the networks."""
Edges = Annotated[tuple[int, int], Bounds(1), Ascending()]


@dataclass(frozen=True)
class DataConfig:
    """Domains, sizes, augmentation and loading."""

    source: str = "scenes"
    """Labelled domain, ``name`` or ``name:path[:split]``; several joined by commas. A split may be a file
    ``LIST.txt`` with the names of images."""
    source_weights: Annotated[tuple[float, ...], Bounds(0)] | None = None
    """Weights with which several sources are drawn; none: their numbers of images."""
    target: str = "scenes"
    """Unlabelled domain, in the same form; labels of its training split are never read."""
    data_root: str = "data"
    """Folder of the domains that are given without a path, each in a subfolder of its name."""
    eval_split: str = "auto"
    """Split of the target to evaluate; auto: the one that belongs to the target's training split (val for
    Cityscapes); none: no evaluation, for a target without labels."""
    classes: tuple[str, ...] | None = None
    """Classes to train and evaluate; none: all that source and target share by name."""
    class_alias: tuple[str, ...] = ()
    """Pairs target=source of names for the same class: rider=Bicyclist."""
    crop: Crop = (128, 256)
    """Height and width of the training crop."""
    target_crop: Crop | None = None
    """Height and width of the target's crop (FADA and ASANet: 512 x 1024 with crop 720 x 1280); none: same as
    crop."""
    source_resize: Edges | None = None
    """Range of the shorter edge, drawn per image, aspect kept (PLCA: 760 to 988); none keeps the size."""
    target_resize: Edges | None = None
    """The same for the target."""
    source_size: Size | None = None
    """Exact height and width, aspect not kept (FADA: 720 x 1280); replaces source_resize."""
    target_size: Size | None = None
    """The same for the target."""
    eval_size: Size | None = None
    """Height and width of evaluated images; labels keep their resolution."""
    resampling: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter to resize images, with antialiasing, in training and evaluation (FADA, ASANet, WeakSegDA:
    bicubic)."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: NonNegative = 0.0
    """Colour jitter of source images: brightness, contrast and saturation are multiplied by 1 - jitter to
    1 + jitter (FADA: 0.5)."""
    jitter_hue: NonNegative = 0.0
    """Largest shift of the hue of source images, in turns (FADA: 0.2)."""
    batch_size: Count = 4
    """Number of source images, and of target images, per process and backward pass."""
    workers: Natural = 2
    """Number of loader processes; 0 loads in the process of the trainer."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Loader; dali needs NVIDIA DALI and decodes on the GPU if there is one."""
    sampling: Literal["uniform", "rare", "balanced"] = "uniform"
    """Sampling of source images: uniform, rare (rare-class sampling of DAFormer) or balanced (class-balanced
    sampling of FADA). The last two build an index of the labels on first use."""
    rare_temperature: Positive = 0.01
    """Temperature of rare-class sampling; a lower one draws rare classes more often."""
    rare_share: NonNegative = 0.0015
    """Smallest share of an image that a drawn class fills (DAFormer: 3000 pixels of GTA5)."""
    rare_crop_share: NonNegative | None = None
    """Smallest share of a crop that a drawn class fills; up to ten draws (SePiCo: 1500 pixels of 640 x 640);
    none: half of rare_share."""
    max_class_share: Share = 1.0
    """Largest share of a source crop that one class may fill; up to ten redraws (DAFormer and SePiCo: 0.75);
    1: no redraws."""
    weak_labels: str | None = None
    """JSON or CSV file with tags and points of target images (WeakSegDA; see
    fastuda.data.loading.weak_labels)."""
    pairs: str | None = None
    """CSV file, or folder of CSV files, with the matched image of every target image (Dark Zurich:
    corresp/train/night; see fastuda.data.loading.pairs)."""
    max_bad: Natural = 10
    """Largest number of unreadable training files to skip; each is logged once."""
    check_labels: Natural = 16
    """Label files per domain to read before training, to find a wrong label map early."""
