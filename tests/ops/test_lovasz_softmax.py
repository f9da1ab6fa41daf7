"""lovasz_softmax against the Lovasz extension taken literally."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends

BACKENDS = cpu_backends("lovasz_softmax")


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


def case(b=2, k=4, h=5, w=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(b, k, h, w, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(0, k, (b, h, w), generator=generator)
    labels[:, 0] = 255
    return p.requires_grad_(), labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_image", [False, True])
def test_definition(backend, per_image):
    p, labels = case()
    labels[labels == 2] = 1
    if per_image:
        wanted = torch.stack([literal(p[i : i + 1], labels[i : i + 1]) for i in range(2)]).mean()
    else:
        wanted = literal(p, labels)
    found = F.lovasz_softmax(p, labels, per_image=per_image, backend=backend)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    a, b = torch.autograd.grad(found, p)[0], torch.autograd.grad(wanted, p)[0]
    assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_from_logits(backend, align_corners):
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 13, 17))
    full = nnf.interpolate(logits, size=(13, 17), mode="bilinear", align_corners=align_corners).softmax(1)
    wanted = F.lovasz_softmax(full, labels, backend="reference")
    found = F.lovasz_softmax(logits, labels, from_logits=True, align_corners=align_corners, backend=backend)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-10)
    a, b = torch.autograd.grad(found, logits)[0], torch.autograd.grad(wanted, logits)[0]
    assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_wrong_and_empty(backend):
    labels = torch.tensor([[[0, 1], [1, 255]]])
    right = nnf.one_hot(torch.tensor([[[0, 1], [1, 0]]]), 2).permute(0, 3, 1, 2).float()
    assert F.lovasz_softmax(right, labels, backend=backend).item() == 0
    assert F.lovasz_softmax(1 - right, labels, backend=backend).item() == pytest.approx(1)
    p = right.clone().requires_grad_()
    nothing = F.lovasz_softmax(p, torch.full_like(labels, 255), backend=backend)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, p)[0].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 6), h=st.integers(1, 7), w=st.integers(1, 7), seed=st.integers(0, 99))
def test_between_zero_and_one(backend, k, h, w, seed):
    p, labels = case(1, k, h, w, seed)
    assert -1e-9 <= F.lovasz_softmax(p, labels, backend=backend).item() <= 1 + 1e-9


def test_bad_input_is_named():
    p, labels = case()
    with pytest.raises(ValueError, match="labels must have shape"):
        F.lovasz_softmax(p, labels[:, :-1])
