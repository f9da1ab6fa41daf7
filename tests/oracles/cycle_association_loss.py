"""The cycle association loss, pixel by pixel as published."""

from __future__ import annotations

import torch

from tests.helpers import contrast_normalised, similarity


def literal(source, target, labels, kind, contrast=True, ignore=255):
    """The published sum over cycles, pixel by pixel, in the dtype of the inputs."""
    forward, backward = similarity(source, target, kind), similarity(target, source, kind)
    normalise = contrast_normalised if contrast else (lambda sim: sim)
    p_forward, p_backward = normalise(forward).softmax(-1), normalise(backward).softmax(-1)
    terms = []
    for b in range(source.shape[0]):
        for i in range(source.shape[1]):
            j = int(forward[b, i].argmax())
            end = int(backward[b, j].argmax())
            if labels[b, i] != ignore and labels[b, end] == labels[b, i]:
                terms.append(-(p_forward[b, i, j] * p_backward[b, j, end]).log())
    return torch.stack(terms).mean() if terms else source.sum() * 0
