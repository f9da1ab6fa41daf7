"""Feature distance: a network's deepest features stay near those of its initial weights.

Sources: Hoyer et al., DAFormer, CVPR 2022 (thing classes of the source); VFM-UDA++, ICCVW 2025,
arXiv 2503.10685 (all cells, smooth L1 and cosine).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.errors import UserError
from fastuda.methods.cells import downsample_labels
from fastuda.methods.tensors import at_least_float32
from fastuda.models.segmentor import Segmentor
from fastuda.system.distributed import joint_mean


class InitialFeatures(nn.Module):
    """``images [B, 3, H, W] -> [B, C, h, w]``: the deepest features of a frozen copy of a network, in
    evaluation mode.

    Checkpoints do not contain the copy, because it can be read again from the weights file or ``hf:PATH``.
    They contain its digest.
    """

    digest: Tensor

    def __init__(self, model: Segmentor):
        super().__init__()
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        del frozen.head
        self.held = (frozen,)
        """In a tuple, so that it is not a submodule."""
        content = hashlib.blake2b(digest_size=7)
        for value in frozen.backbone.state_dict().values():
            content.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        self.register_buffer("digest", torch.tensor(int.from_bytes(content.digest(), "big")))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> InitialFeatures:
        self.held[0]._apply(fn, *args)
        return super()._apply(fn, *args)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state.get(f"{prefix}digest")
        if saved is not None and int(saved) != int(self.digest):
            raise UserError(
                "the initial weights (of model.weights or hf:PATH) are others than when the run began, and"
                " method.feature_distance needs those: give the same file or folder"
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features, deepest = self.held[0].encode(images)
        return features if deepest is None else deepest


def cell_distance(features: Tensor, initial: Tensor, kind: str) -> Tensor:
    """Distance of each cell, [B, h, w] in float32 or float64.

    Args:
        features: [B, C, h, w].
        initial: the same of the initial weights.
        kind: norm (``||F - F0||_2``, DAFormer), or cosine (``0.1 mean_c smooth_l1(F, F0) + 0.9 (1 - cos(F,
            F0))``, VFM-UDA++).
    """
    features, initial = at_least_float32(features), at_least_float32(initial)
    if kind == "norm":
        return torch.linalg.vector_norm(features - initial, dim=1)
    smooth = nnf.smooth_l1_loss(features, initial, reduction="none").mean(1)
    return 0.1 * smooth + 0.9 * (1 - nnf.cosine_similarity(features, initial, dim=1))


def feature_distance(
    features: Tensor,
    initial: Tensor,
    kind: str,
    labels: Tensor | None = None,
    classes: Sequence[int] | None = None,
    num_classes: int = 0,
    min_share: float = 0.75,
) -> Tensor:
    """Mean of :func:`cell_distance` over the cells of some classes, or over all cells; 0 if there are none.

    Args:
        features: [B, C, h, w].
        initial: the same of the initial weights.
        kind: norm or cosine.
        labels: [B, H, W], needed with ``classes``.
        classes: classes whose cells count; None: all cells.
        num_classes: K.
        min_share: smallest share of a cell that its class must fill; published 0.75.

    Source: DAFormer, authors' uda/dacs.py, which gives NaN if there are no cells.
    """
    distance = cell_distance(features, initial, kind)
    if classes is None or labels is None:
        return distance.mean()
    size = (features.shape[2], features.shape[3])
    cells = downsample_labels(labels, size, num_classes, min_share)
    chosen = torch.zeros_like(cells, dtype=torch.bool)
    for k in classes:  # one by one, because a list would be copied to the device
        chosen |= cells == k
    count = chosen.sum()
    return joint_mean((distance * chosen).sum() / count.clamp(min=1), count)
