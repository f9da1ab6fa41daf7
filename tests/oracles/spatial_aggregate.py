"""Spatial aggregation with the N x N matrix."""

from __future__ import annotations

from tests.helpers import contrast_normalised, similarity


def literal(x, kind, contrast, alpha=0.5):
    sim = similarity(x, x, kind)
    weights = (contrast_normalised(sim) if contrast else sim).softmax(-1)
    return (1 - alpha) * x + alpha * (weights @ x)
