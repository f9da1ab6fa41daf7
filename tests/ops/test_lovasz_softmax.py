"""lovasz_softmax against the Lovasz extension taken literally."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget
from tests.oracles.lovasz_softmax import literal

ALL = cpu_backends("lovasz_softmax")
BACKENDS = [pytest.param("reference", id="reference")]
"""Of tests in float64, which the kernels leave to the reference."""


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


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("from_logits", "align"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("per_image", [False, True])
def test_error_budget(backend, dtype, from_logits, align, per_image):
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(2, 5, 9, 7, generator=generator, dtype=torch.float64)).to(dtype)
    if not from_logits:
        x = x.double().softmax(1).to(dtype)
    labels = torch.randint(
        0, 4, (2, 9, 7) if not from_logits else (2, 37, 41), generator=generator
    )  # class 4: absent
    labels[0, :3] = 255
    found, plain, truth = [], [], []
    for out, leaf, name in ((found, x, backend), (plain, x, "reference"), (truth, x.double(), "reference")):
        leaf = leaf.clone().requires_grad_()
        loss = F.lovasz_softmax(
            leaf, labels, from_logits=from_logits, align_corners=align, per_image=per_image, backend=name
        )
        out += [loss.detach(), torch.autograd.grad(loss, leaf)[0]]
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    within_budget(found[0], plain[0], truth[0], "loss", torch.float32)
    if from_logits or dtype == torch.float32:  # equal errors have several right orders in half precision
        within_budget(found[1], plain[1], truth[1], "gradient", dtype)


@pytest.mark.parametrize("backend", ALL)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_any_labels(backend, b, k, h, w, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, k, 3, 4, generator=generator)
    labels = torch.randint(0, k, (b, h, w), generator=generator)
    labels[torch.rand(b, h, w, generator=generator) < 0.3 * (seed % 4)] = 255
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    found = F.lovasz_softmax(leaf, labels, from_logits=True, backend=backend)
    truth = F.lovasz_softmax(other, labels, from_logits=True, backend="reference")
    assert abs(found.item() - truth.item()) < 1e-5
    grads = torch.autograd.grad(found, leaf)[0], torch.autograd.grad(truth, other)[0]
    assert torch.allclose(grads[0].double(), grads[1], atol=1e-5)
