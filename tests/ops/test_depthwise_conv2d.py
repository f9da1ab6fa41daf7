"""depthwise_conv2d: torch's convolution in float64, every backend's error, layouts and faults."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget

BACKENDS = cpu_backends("depthwise_conv2d")


def case(batch, channels, size, kernel, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(batch, channels, *size), normal(channels, 1, *kernel), normal(channels)


def run(function, given):
    """The result, and the gradients of all that is given."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 7, 16, 33, 72, 128]),
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    st.integers(1, 3),
    st.integers(0, 7),
    st.integers(1, 5),
    st.integers(1, 2),
)
def test_any_size_is_the_convolution(
    backend, batch, channels, size, kernel, stride, padding, dilation, given
):
    assume(all(n + 2 * padding > dilation * (k - 1) for n, k in zip(size, kernel, strict=True)))
    options = dict(stride=stride, padding=padding, dilation=dilation)
    tensors = case(batch, channels, size, kernel)[: given + 1]
    found = run(lambda *t: F.depthwise_conv2d(*t, **options, backend=backend), tensors)
    wanted = run(lambda *t: nnf.conv2d(*t, **options, groups=channels), tensors)
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "dilation"),
    [(83, (21, 34), 3, 1, 4), (128, (16, 9), 5, 2, 1), (40, (97, 63), 3, 2, 1), (70, (40, 24), 3, 1, 18)],
)
def test_error_budget(backend, dtype, channels, size, kernel, stride, dilation):
    given = [x.to(dtype) for x in case(2, channels, size, (kernel, kernel))]
    options = dict(stride=stride, padding=dilation * (kernel // 2), dilation=dilation)

    def of(name, work):
        return run(lambda *t: F.depthwise_conv2d(*t, **options, backend=name), [x.to(work) for x in given])

    results = of(backend, dtype), of("reference", dtype), of("reference", torch.float64)
    for name, *three in zip(("value", "x", "weight", "bias"), *results, strict=True):
        assert three[0].dtype == dtype
        within_budget(*three, name, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "strided"])
def test_any_layout(backend, layout):
    x, weight, bias = (t.float() for t in case(2, 20, (9, 12), (3, 3)))
    wanted = run(lambda *t: nnf.conv2d(*t, padding=2, dilation=2, groups=20), (x, weight, bias))
    if layout == "channels last":
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    elif layout == "strided":
        x, weight = x.repeat_interleave(2, 3)[..., ::2], weight.transpose(2, 3).contiguous().transpose(2, 3)
        bias = bias.repeat_interleave(3)[::3]
    found = run(lambda *t: F.depthwise_conv2d(*t, padding=2, dilation=2, backend=backend), (x, weight, bias))
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_it_casts_as_a_convolution(backend):
    given = [t.float() for t in case(2, 40, (13, 10), (3, 3))]
    options = dict(padding=4, dilation=4, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(lambda *t: F.depthwise_conv2d(*t, **options), given)
    assert found[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found[1:])
    for one, two in zip(found, run(lambda *t: F.depthwise_conv2d(*t, **options), given), strict=True):
        assert (one - two).abs().max() <= 0.02 * two.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_may_be_changed_in_place(backend):
    x, weight, bias = case(1, 4, (5, 6), (3, 3))
    wanted = run(lambda *t: nnf.conv2d(*t, padding=1, groups=4).relu(), (x, weight, bias))
    found = run(lambda *t: F.depthwise_conv2d(*t, padding=1, backend=backend).relu_(), (x, weight, bias))
    assert all(torch.allclose(one, two, atol=1e-11) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_images(backend):
    x, weight, bias = case(0, 5, (4, 6), (3, 3))
    found = run(lambda *t: F.depthwise_conv2d(*t, padding=1, stride=2, backend=backend), (x, weight, bias))
    assert found[0].shape == (0, 5, 2, 3) and found[1].shape == x.shape
    assert (found[2] == 0).all() and (found[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    x, weight, bias = (t.requires_grad_() for t in case(2, 5, (6, 7), (3, 3)))

    def op(*tensors):
        return F.depthwise_conv2d(*tensors, stride=2, padding=3, dilation=2, backend=backend)

    assert torch.autograd.gradcheck(op, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda w: op(x.detach(), w), weight)
