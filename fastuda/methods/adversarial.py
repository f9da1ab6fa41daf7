"""The domain discriminators' loss, shared by the adversarial methods."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

SOURCE, TARGET = 0.0, 1.0


def domain_loss(logits: Tensor, domain: float) -> Tensor:
    """Binary cross-entropy of patch logits with one domain label, averaged over patches, in float32."""
    return nnf.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits.float(), domain))
