"""Day and night: class weights by rarity, and pseudo-labels that a matched day image corrects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rarity_weights(frequencies: Sequence[float], spread: float) -> Tensor:
    """``v_k = 1 + spread (mean(ln f) - ln f_k) / std(ln f)``: rare classes above 1, frequent ones below.

    Source: SePiCo, authors' experiments.py for Dark Zurich, after DANNet (Wu et al., CVPR 2021).
    """
    log = torch.tensor(frequencies, dtype=torch.float64).log()
    return (1 + spread * (log.mean() - log) / log.std()).float()


def fuse_matched(
    own: Tensor, match: Tensor, static: Sequence[int], share: float = 0.8, threshold: float = 0.4
) -> Tensor:
    """Mix the probabilities of a day image into those of its night image, for static classes.

    ``a P_day + (1 - a) P_night`` for static classes, where a is ``share`` if P_day exceeds the threshold and
    ``1 - share`` otherwise. Other classes keep P_night. As published, the result is not normalised.

    Args:
        own: [B, K, H, W], probabilities of the target image.
        match: probabilities of the matched image.
        static: the static classes.
        share: published 0.8.
        threshold: published 0.4.

    Source: SePiCo, authors' sepico_dark.py, after DANNet.
    """
    mixed = own.clone()
    for k in static:  # one by one: indexing with a list would copy it to the device
        day, night = match[:, k], own[:, k]
        weight = torch.full_like(day, 1 - share).masked_fill(day > threshold, share)
        mixed[:, k] = weight * day + (1 - weight) * night
    return mixed
