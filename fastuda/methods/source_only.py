"""Supervised training on the source, the baseline of every adaptation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.methods.base import Method, Phase
from fastuda.methods.registry import register
from fastuda.methods.tensors import with_detail
from fastuda.system.distributed import joint_mean


@register("source_only")
class SourceOnly(Method):
    """Cross-entropy and, optionally, Lovasz-Softmax on labelled source images."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        lovasz_weight: float = 0.0
        """Weight of Lovasz-Softmax; 0 disables it."""

        def supervised(self) -> dict[str, Any]:
            return {"lovasz_weight": self.lovasz_weight}

    config: Config

    def phases(self, batch: Batch, step: int) -> Iterator[Phase]:
        output = self.model(batch.source_image)
        align = self.model.align_corners

        def ce(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
            mean = F.upsample_cross_entropy(logits, labels, align_corners=align)
            return joint_mean(mean, (labels != 255).sum())

        losses = {"ce": with_detail(output, batch.source_label, ce)}
        if self.config.lovasz_weight:
            lovasz = F.lovasz_softmax(
                output.logits, batch.source_label, from_logits=True, align_corners=align
            )
            losses["lovasz"] = self.config.lovasz_weight * lovasz
        yield Phase("model", losses)
