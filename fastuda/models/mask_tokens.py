"""Masked patch tokens: a ViT of transformers sees its learnt mask token instead of some patches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class TokenMasks:
    """Replaces patch tokens of a ViT by its mask token, each with probability ``share``, after the patch
    embedding and before the positions.

    A hook on the network's ``embeddings``, because the backbones of transformers do not pass
    ``bool_masked_pos`` on. A copy of the network has a copy of the hook.

    Source: Englert et al., VFM-UDA, CVPR workshops 2024 (the authors' TokenMasking).
    """

    def __init__(self, patch: tuple[int, int]):
        self.patch = patch
        self.share = 0.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if not self.share:
            return None
        images = args[0] if args else given["pixel_values"]
        rows, columns = (-(-side // size) for side, size in zip(images.shape[2:], self.patch, strict=True))
        masked = torch.rand(len(images), rows * columns, device=images.device) < self.share
        return args, {**given, "bool_masked_pos": masked}


def token_masks_of(network: nn.Module) -> TokenMasks | None:
    """Register the hook on a network of transformers and return it; None if it has no mask token."""
    embeddings = next((p for p in network.modules() if getattr(p, "mask_token", None) is not None), None)
    if embeddings is None or "bool_masked_pos" not in inspect.signature(embeddings.forward).parameters:
        return None
    patch: Any = network.config.patch_size  # type: ignore[union-attr]
    masks = TokenMasks((patch, patch) if isinstance(patch, int) else tuple(patch))
    embeddings.register_forward_pre_hook(masks, with_kwargs=True)
    return masks


@contextmanager
def masked_tokens(backbone: Any, share: float) -> Iterator[None]:
    """Within the block, the backbone masks this share of its patch tokens."""
    backbone.token_masks.share = share
    try:
        yield
    finally:
        backbone.token_masks.share = 0.0
