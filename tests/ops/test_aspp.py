"""aspp: the definition, every backend's error, what it leaves out and where it does not fit."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget

BACKENDS = cpu_backends("aspp")
PUBLISHED = (6, 12, 18, 24)


def case(batch, channels, size, classes, branches, seed=0, dtype=torch.float64):
    """Features, weights, biases, and what the gradient of the logits is."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(classes, channels, 3, 3) / (3 * channels**0.5) for _ in range(branches)]
    biases = [normal(classes) for _ in range(branches)]
    return normal(batch, channels, *size), weights, biases, normal(batch, classes, *size)


def literal(features, weights, dilations, biases):
    """Every tap of every branch, shifted and added by hand."""
    h, w = features.shape[2:]
    edge = max(dilations)
    wide = nnf.pad(features, [edge] * 4)
    out = 0
    for weight, d, bias in zip(weights, dilations, biases or [None] * len(weights), strict=True):
        for i in range(3):
            for j in range(3):
                y, x = edge + (i - 1) * d, edge + (j - 1) * d
                out = out + torch.einsum("kc,bchw->bkhw", weight[:, :, i, j], wide[..., y : y + h, x : x + w])
        out = out if bias is None else out + bias[:, None, None]
    return out


def op(dilations, backend):
    return lambda x, w, b: F.aspp(x, w, dilations=dilations, biases=b, backend=backend)


def run(function, features, weights, biases, weight):
    """The result, and the gradients of all that has one."""
    leaves = [x.detach().clone().requires_grad_() for x in (features, *weights, *(biases or ()))]
    count = len(weights)
    out = function(leaves[0], leaves[1 : count + 1], leaves[count + 1 :] or None)
    return out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.integers(1, 7),
    st.lists(st.integers(1, 26), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 50),
)
def test_any_size_is_the_definition(backend, batch, channels, size, classes, dilations, with_bias, seed):
    """Equal dilations, too, and those larger than the image."""
    features, weights, biases, weight = case(batch, channels, size, classes, len(dilations), seed)
    biases = biases if with_bias else None
    found = run(op(dilations, backend), features, weights, biases, weight)
    wanted = run(lambda x, w, b: literal(x, w, dilations, b), features, weights, biases, weight)
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "channels", "classes", "branches"),
    [((16, 28), 130, 11, 4), ((61, 97), 48, 19, 4), ((33, 5), 200, 2, 2)],
)
def test_error_budget(backend, dtype, size, channels, classes, branches):
    given = case(2, channels, size, classes, branches, dtype=dtype)
    dilations = PUBLISHED[:branches]

    def of(name, dtype):
        features, weights, biases, weight = given
        features, weights, biases = (
            features.to(dtype),
            [w.to(dtype) for w in weights],
            [b.to(dtype) for b in biases],
        )
        return run(op(dilations, name), features, weights, biases, weight)

    found, plain, truth = of(backend, dtype), of("reference", dtype), of("reference", torch.float64)
    for k, three in enumerate(zip(found, plain, truth, strict=True)):
        assert three[0].dtype == dtype
        within_budget(*three, "value" if not k else f"gradient {k}", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "strided"])
def test_any_layout(backend, layout):
    features, weights, _, weight = case(2, 9, (14, 11), 3, 2, dtype=torch.float32)
    wanted = run(lambda x, w, b: literal(x, w, (6, 12), b), features, weights, None, weight)
    if layout == "channels last":
        features, weights = (
            features.contiguous(memory_format=torch.channels_last),
            [w.contiguous(memory_format=torch.channels_last) for w in weights],
        )
    elif layout == "strided":
        features = features.repeat_interleave(2, 3)[..., ::2]
        weights = [w.transpose(2, 3).contiguous().transpose(2, 3) for w in weights]
        weight = weight.repeat_interleave(3, 0)[::3]

    def strided(x, w, b):
        out = F.aspp(x, w, dilations=(6, 12), biases=b, backend=backend)
        assert out.is_contiguous(memory_format=torch.channels_last) == (layout == "channels last")
        return out

    for one, two in zip(run(strided, features, weights, None, weight), wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_has_a_gradient(backend):
    features, weights, biases, weight = case(1, 4, (5, 6), 2, 2)
    whole = run(op((1, 2), backend), features, weights, biases, weight)
    features.requires_grad_()
    out = F.aspp(features, weights, dilations=(1, 2), biases=biases, backend=backend)
    assert torch.allclose(torch.autograd.grad(out, features, weight)[0], whole[1])
    features.requires_grad_(False)
    weights[1].requires_grad_()
    out = F.aspp(features, weights, dilations=(1, 2), backend=backend)
    assert torch.allclose(torch.autograd.grad(out, weights[1], weight)[0], whole[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_it_casts_as_a_convolution(backend):
    features, weights, biases, weight = case(2, 30, (9, 12), 5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(op(PUBLISHED, backend), features, weights, biases, weight)
    assert found[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found[1:])
    exact = run(lambda x, w, b: literal(x, w, PUBLISHED, b), features, weights, biases, weight)
    for one, two in zip(found, exact, strict=True):
        assert (one - two).abs().max() <= 0.02 * two.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_images(backend):
    features, weights, biases, weight = case(0, 4, (5, 6), 2, 2)
    found = run(op((1, 2), backend), features, weights, biases, weight)
    assert found[0].shape == (0, 2, 5, 6) and found[1].shape == features.shape
    assert all((g == 0).all() for g in found[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend):
    features, weights, biases, _ = case(2, 6, (7, 9), 3, 3)

    def of_all(x, *rest):
        return F.aspp(x, rest[:3], dilations=[1, 4, 8], biases=rest[3:], backend=backend)

    assert torch.autograd.gradcheck(of_all, [x.requires_grad_() for x in (features, *weights, *biases)])
