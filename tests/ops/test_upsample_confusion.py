"""upsample_confusion against interpolate, argmax and counting."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends

BACKENDS = cpu_backends("upsample_confusion")


def literal(x, labels, align_corners):
    full = nnf.interpolate(x, size=labels.shape[1:], mode="bilinear", align_corners=align_corners)
    predicted = full.argmax(1)
    matrix = torch.zeros(x.shape[1], x.shape[1], dtype=torch.int64)
    for truth, guess in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if truth != 255:
            matrix[truth, guess] += 1
    return matrix, predicted


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 20),
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    high=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    align=st.booleans(),
    seed=st.integers(0, 50),
)
def test_definition(backend, k, low, high, align, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, k, *low, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, k, (2, *high), generator=generator)
    labels[:, ::3] = 255
    matrix, predicted = F.upsample_confusion(
        x, labels, align_corners=align, return_labels=True, backend=backend
    )
    wanted, classes = literal(x, labels, align)
    assert torch.equal(matrix, wanted) and torch.equal(predicted.long(), classes)
    assert predicted.dtype == torch.uint8 and matrix.dtype == torch.int64
    assert torch.equal(F.upsample_confusion(x, labels, align_corners=align, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prediction_scores_as_well_as_the_best(backend, dtype):
    x = torch.randn(1, 19, 12, 16).to(dtype)
    labels = torch.zeros(1, 90, 120, dtype=torch.int64)
    _, predicted = F.upsample_confusion(x, labels, return_labels=True, backend=backend)
    full = nnf.interpolate(x.double(), size=(90, 120), mode="bilinear", align_corners=False)
    short = full.amax(1) - full.gather(1, predicted[:, None].long())[:, 0]
    assert short.max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_class(backend):
    x = torch.zeros(1, 7, 3, 3)
    matrix = F.upsample_confusion(x, torch.full((1, 10, 10), 2), backend=backend)
    assert matrix[2, 0] == 100 and matrix.sum() == 100


def test_too_many_classes_for_the_label_map():
    with pytest.raises(ValueError, match="at most 255 classes"):
        F.upsample_confusion(torch.zeros(1, 256, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
