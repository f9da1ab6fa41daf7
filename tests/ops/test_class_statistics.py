"""class_statistics on every backend against float64, and what only a fused pass can get wrong."""

import pytest
import torch

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget

BACKENDS = cpu_backends("class_statistics")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "width", "classes"), [(0, 3, 2), (1, 1, 1), (63, 97, 5), (1500, 33, 19)])
def test_error_budget(backend, dtype, n, width, classes):
    generator = torch.Generator().manual_seed(n)
    x = (torch.randn(n, width, generator=generator, dtype=torch.float64) + 3).to(dtype)
    labels = torch.randint(-1, classes + 2, (n,), generator=generator)
    labels[::7] = 255
    found, plain = (F.class_statistics(x, labels, classes, backend=name) for name in (backend, "reference"))
    truth = F.class_statistics(x.double(), labels, classes, backend="reference")
    for name in ("count", "mean", "variance"):
        three = [getattr(run, name) for run in (found, plain, truth)]
        work = torch.float64 if dtype == torch.float64 else torch.float32
        assert three[0].dtype == work
        within_budget(*three, name, work)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_common_mean_and_strides(backend):
    x = torch.randn(8, 1500).T * 0.01 + 100
    found = F.class_statistics(x, torch.zeros(1500, dtype=torch.int64), 1, backend=backend)
    assert torch.allclose(found.variance[0], x.double().var(0, unbiased=False).float(), rtol=1e-3)
