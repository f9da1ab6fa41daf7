"""HRDA: a segmentor that sees a wide context at half resolution and a detail crop at full resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastuda.errors import UserError
from fastuda.models.segmentor import Detail, Segmentor, SegOutput

Refine = Callable[[Tensor], Tensor]
"""A change of the context's features [B, C, h, w]."""
WEIGHT = 0.1
"""Share of the loss on the detail crop, as published."""


def fuse(context: Tensor, attention: Tensor, detail: Tensor) -> Tensor:
    """``up2((1 - a) z_c) + up2(a) z_d``, with bilinear upsampling (``align_corners=False``).

    Args:
        context: z_c [B, K, h, w], logits of the context.
        attention: a [B, K, h, w] in 0..1; 0 where there is no detail.
        detail: z_d [B, K, 2 h, 2 w], logits of the detail.

    Source: Hoyer et al., HRDA, ECCV 2022, authors' decode_heads/hrda_head.py.
    """
    size = detail.shape[2:]

    def up(x: Tensor) -> Tensor:
        return nnf.interpolate(x, size, mode="bilinear", align_corners=False)

    return up((1 - attention) * context) + up(attention) * detail


def windows(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Corners of windows that cover an image, in row-major order. The last window of each row and column ends
    at the border."""
    rows, columns = (
        [*range(0, length - side, step), length - side]
        for length, side, step in zip(size, window, stride, strict=True)
    )
    return [(top, left) for top in rows for left in columns]


def averaged(
    parts: Sequence[Tensor], places: Sequence[tuple[int, int]], size: Sequence[int], cell: int
) -> Tensor:
    """Mean of the overlapping maps [B, C, h, w] of windows, in float32 or float64.

    Args:
        parts: one map per window.
        places: corner of each window in pixels.
        size: height and width of the image in pixels.
        cell: pixels of a cell of the maps.
    """
    if len(parts) == 1:
        return parts[0]
    grid = (size[0] // cell, size[1] // cell)
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].new_zeros(*parts[0].shape[:2], *grid, dtype=dtype)
    count = total.new_zeros(grid)
    for part, (top, left) in zip(parts, places, strict=True):
        rows = slice(top // cell, top // cell + part.shape[2])
        columns = slice(left // cell, left // cell + part.shape[3])
        total[:, :, rows, columns] += part
        count[rows, columns] += 1
    return total / count


def placed(x: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """Zeros of the given size, with ``x`` [B, C, h, w] placed at (``top``, ``left``)."""
    return nnf.pad(x, (left, size[1] - left - x.shape[3], top, size[0] - top - x.shape[2]))


class HRSegmentor(Segmentor):
    """``images [B, 3, H, W] -> SegOutput`` from two scales, which share a backbone and a head.

    The context is the image at half resolution; the detail is a window of ``detail`` pixels at full
    resolution. An attention head decides per class and cell of the context how much of the detail's logits is
    used (:func:`fuse`). Logits are at ``stride``, features (of the context) at twice that.

    In training, with gradients, there is one random window for the whole batch. The output contains its
    logits, which get their own loss. Without gradients (a teacher, evaluation) the windows slide by half
    their size and their logits are averaged. Images larger than twice ``detail`` are processed in windows of
    that size, which slide by ``detail``. Images are padded to whole cells with their last pixels.

    Source: Hoyer et al., HRDA, ECCV 2022.

    Args:
        backbone, head, num_classes, align_corners: as for :class:`Segmentor`.
        attention: a head like ``head``, without the sigmoid.
        detail: height and width of the detail crop, multiples of twice the stride; published 512 x 512, half
            the training crop.

    Raises:
        UserError: ``detail`` is not such a multiple, or ``align_corners`` is set.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        attention: nn.Module,
        num_classes: int,
        align_corners: bool,
        detail: tuple[int, int],
    ):
        super().__init__(backbone, head, num_classes, align_corners)
        self.attention = attention
        self.detail = detail
        self.cell = 2 * self.stride
        """Pixels of a cell of the context."""
        if detail[0] % self.cell or detail[1] % self.cell:
            raise UserError(
                f"model.hrda is {detail[0]} x {detail[1]}; with this backbone it must be a multiple of"
                f" {self.cell}"
            )
        if align_corners:
            raise UserError("model.hrda needs model.align_corners=false: its two grids have common cells")

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and deepest map of the context: ``images`` at half resolution."""
        return super().encode(nnf.avg_pool2d(images, 2))

    def forward(self, images: Tensor) -> SegOutput:
        if self.training and torch.is_grad_enabled():
            return self._one_window(images)
        return self._frames(images)

    def refined(self, images: Tensor, refine: Refine) -> Tensor:
        """Logits of images, in sliding windows. The features of the context pass through ``refine`` before
        the head and the attention; the features of the details do not."""
        return self._frames(images, refine).logits

    def param_groups(
        self, lr: float, head_lr_mult: float = 1.0, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """The segmentor's parameter groups, and those of the attention head with the head's learning rate."""
        groups = super().param_groups(lr, head_lr_mult, layer_decay)
        own = [p for p in self.attention.parameters() if p.requires_grad]
        return [*groups, {"params": own, "lr": lr * head_lr_mult}]

    def _context(
        self, images: Tensor, refine: Refine | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Features, deepest map, logits and attention of the context."""
        features, deepest = self.encode(images)
        features = features if refine is None else refine(features)
        logits = self._on_grid(self.head(features), images, self.cell)
        return features, deepest, logits, self.attention(features).sigmoid()

    def _detail(self, windows: Tensor) -> Tensor:
        """Logits of windows at full resolution."""
        features, _ = super().encode(windows)
        return self._on_grid(self.head(features), windows, self.stride)

    def _on_grid(self, logits: Tensor, images: Tensor, cell: int) -> Tensor:
        if (logits.shape[2] * cell, logits.shape[3] * cell) != images.shape[2:]:
            raise UserError(
                "model.hrda needs a backbone whose map has one cell for every"
                f" {self.stride} x {self.stride} pixels: set model.caffe=false, or choose another --backbone"
            )
        return logits

    def _one_window(self, images: Tensor) -> SegOutput:
        """Training: one detail crop."""
        height, width = images.shape[2:]
        high, wide = self.detail
        if height < high or width < wide or height % self.cell or width % self.cell:
            raise UserError(
                f"model.hrda is {high} x {wide}, and the training images are {height} x {width}: make"
                " data.crop and data.target_crop (and method.balanced_crop of sepico) as large at least, and"
                f" multiples of {self.cell}"
            )
        features, deepest, context, attention = self._context(images)
        rows, columns = (
            self.cell * int(torch.randint((side - window) // self.cell + 1, ()))
            for side, window in ((height, high), (width, wide))
        )
        detail = self._detail(images[:, :, rows : rows + high, columns : columns + wide])
        top, left = rows // self.cell, columns // self.cell
        inside = attention[:, :, top : top + high // self.cell, left : left + wide // self.cell]
        grid = (context.shape[2], context.shape[3])
        fused = fuse(
            context,
            placed(inside, top, left, grid),
            placed(detail, 2 * top, 2 * left, (2 * grid[0], 2 * grid[1])),
        )
        box = (rows, rows + high, columns, columns + wide)
        return SegOutput(features, fused, deepest, Detail(detail, box, WEIGHT))

    def _frames(self, images: Tensor, refine: Refine | None = None) -> SegOutput:
        """Prediction of images of any size, in windows of twice the detail crop."""
        height, width = images.shape[2:]
        size = [
            max(window, -(-side // self.cell) * self.cell)
            for side, window in zip((height, width), self.detail, strict=True)
        ]
        if (height, width) != tuple(size):
            images = nnf.pad(images, (0, size[1] - width, 0, size[0] - height), mode="replicate")
        high, wide = (min(2 * window, side) for window, side in zip(self.detail, size, strict=True))
        places = windows(size, (high, wide), self.detail)
        parts = [self._slide(images[:, :, y : y + high, x : x + wide], refine) for y, x in places]
        features = averaged([part for part, _ in parts], places, size, self.cell)
        logits = averaged([part for _, part in parts], places, size, self.stride)
        coarse, fine = ([-(-side // cell) for side in (height, width)] for cell in (self.cell, self.stride))
        return SegOutput(features[:, :, : coarse[0], : coarse[1]], logits[:, :, : fine[0], : fine[1]])

    def _slide(self, images: Tensor, refine: Refine | None) -> tuple[Tensor, Tensor]:
        """Features and fused logits of images of the training size. All details are one batch, because a
        teacher's batch norm computes its statistics over all of them."""
        features, _, context, attention = self._context(images, refine)
        size, (high, wide) = images.shape[2:], self.detail
        places = windows(size, self.detail, (high // 2, wide // 2))
        details = torch.cat([images[:, :, y : y + high, x : x + wide] for y, x in places])
        logits = averaged(self._detail(details).chunk(len(places)), places, size, self.stride)
        return features, fuse(context, attention, logits)
