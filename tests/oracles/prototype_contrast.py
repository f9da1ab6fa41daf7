"""The inputs of SePiCo's published values."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

import fastuda.ops as F
from fastuda.ops import PrototypeBank
from tests.helpers import wave


def published_statistics():
    total = None
    for a, n in ((0.07, 9), (0.19, 12), (0.29, 7)):
        x = nnf.normalize(wave((n, 5), a).abs(), dim=1)
        found = F.class_statistics(x, (5 * torch.arange(n) % 7) % 3, 4)
        total = found if total is None else total.merge(found)
    return total


def published_bank(length=3):
    vectors, count = torch.zeros(4, length, 5, dtype=torch.float64), torch.ones(4, dtype=torch.int64)
    for a, n in ((0.07, 9), (0.19, 12), (0.29, 7)):
        x = nnf.normalize(wave((n, 5), a).abs(), dim=1)
        labels = (5 * torch.arange(n) % 7) % 3
        for c in range(3):
            if (labels == c).any():
                queue = [*vectors[c, : count[c]], x[labels == c].mean(0)][-length:]
                vectors[c, : len(queue)] = torch.stack(queue)
                count[c] = len(queue)
    return PrototypeBank(vectors, count)


def published_query():
    q = wave((2, 5, 2, 3), 0.37).abs()
    q = (q / q.norm(dim=1, keepdim=True)).requires_grad_()
    labels = ((5 * torch.arange(12) % 7) % 3).reshape(2, 2, 3)
    labels[0, 0, 1] = 255
    return q, q.movedim(1, -1).reshape(-1, 5), labels.flatten()
