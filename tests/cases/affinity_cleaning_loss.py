import torch

import fastuda.ops as F
from tests.cases._inputs import normal, tensor

BAD = {"neighbours": (0, 6)}


def good():
    return dict(logits=tensor(2, 3, 4, 5))


def edges():
    for shape in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 1, 4, 5), (2, 3, 1, 5)):
        yield dict(logits=tensor(*shape) / 2)


def _loss(x, b):
    return F.affinity_cleaning_loss(x, backend=b)


def hard():
    yield "", (1, 3, 4, 4), _loss


def samples(device):
    yield "cleaning", 4 * normal(2, 7, 45, 70), _loss


def small():
    yield "cleaning", 4 * normal(2, 3, 9, 30), _loss


def operators(device):
    yield "affinity_cleaning_loss_fwd", torch.rand(2, 4, 3, 5, device=device).softmax(1), 8, True


def compiled(dtype):
    p = torch.rand(1, 19, 32, 32).to(dtype).float()
    yield "affinity cleaning", "affinity_cleaning_loss_fwd", p, 8, True
