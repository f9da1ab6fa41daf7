"""Supervised training on the source, the baseline of every adaptation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fastuda.ops as F
from fastuda.data.loading.batch import Batch
from fastuda.methods.base import Method, Phase
from fastuda.methods.losses import valid_mean_ce
from fastuda.methods.registry import register


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
        losses = {"ce": valid_mean_ce(self.model, output, batch.source_label)}
        if self.config.lovasz_weight:
            align = self.model.align_corners
            lovasz = F.lovasz_softmax(
                output.logits, batch.source_label, from_logits=True, align_corners=align
            )
            losses["lovasz"] = self.config.lovasz_weight * lovasz
        yield Phase("model", losses)
