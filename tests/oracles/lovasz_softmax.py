"""The Lovasz extension of the Jaccard loss, set by set."""

from __future__ import annotations

import torch


def jaccard_loss(mistakes: set, truth: set) -> float:
    """1 - IoU when the pixels ``mistakes`` are wrong about a class whose pixels are ``truth``."""
    union = len(truth | mistakes)
    return len(mistakes) / union if union else 0.0


def literal(p, labels, ignore=255):
    """Sum over the sorted errors of m_i (J(first i) - J(first i - 1)), set by set; mean over present
    classes."""
    p, y = p.movedim(1, -1).reshape(-1, p.shape[1]), labels.flatten()
    p, y = p[y != ignore], y[y != ignore]
    losses = []
    for c in sorted(set(y.tolist())):
        truth = {i for i in range(len(y)) if y[i] == c}
        error = torch.where(y == c, 1 - p[:, c], p[:, c])
        total, seen, before = 0.0, set(), 0.0
        for i in error.argsort(descending=True, stable=True).tolist():
            seen.add(i)
            now = jaccard_loss(seen, truth)
            total = total + error[i] * (now - before)
            before = now
        losses.append(total)
    return torch.stack(losses).mean() if losses else p.sum() * 0
