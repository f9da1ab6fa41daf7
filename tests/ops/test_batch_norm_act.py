"""batch_norm_act: torch's norm and activation in float64, every backend's error, statistics, layouts."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastuda.ops as F
from tests.helpers import cpu_backends, within_budget

BACKENDS = cpu_backends("batch_norm_act")
ACTIVATIONS = {"none": lambda y: y, "relu": nnf.relu, "relu6": nnf.relu6}


def case(batch, channels, size, seed=0):
    """Features with a mean, weight, bias and running statistics."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(batch, channels, *size) * 3 + normal(channels, 1, 1)
    return x, normal(channels), normal(channels), normal(channels), normal(channels).square() + 0.1


def literal(x, weight, bias, running_mean, running_var, *, training, momentum=0.1, eps=1e-5, activation):
    """By torch, which writes the statistics."""
    y = nnf.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](y)


def run(function, given):
    """The result, the gradients of x, weight and bias, and the running statistics afterwards."""
    leaves = [x.detach().clone().requires_grad_() for x in given[:3]]
    statistics = [x.clone() for x in given[3:]]
    out = function(*leaves, *statistics)
    # not linear in the features, whose gradient would then be 0
    weight = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    value = out.detach().clone()
    return value, *torch.autograd.grad(out, leaves, weight), *statistics


NAMES = ("value", "x", "weight", "bias", "running mean", "running variance")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 3, 7, 16, 33, 64, 72, 130]),
    st.tuples(st.integers(1, 33), st.integers(1, 20)),
    st.booleans(),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_size_is_the_norm_and_its_activation(
    backend, batch, channels, size, training, activation, momentum
):
    assume(not training or batch * size[0] * size[1] > 1)
    tensors = case(batch, channels, size)
    options = dict(training=training, momentum=momentum, activation=activation)
    found = run(lambda *t: F.batch_norm_act(*t, **options, backend=backend), tensors)
    wanted = run(lambda *t: literal(*t, **options), tensors)
    for name, one, two in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(83, (21, 34)), (16, (96, 65)), (256, (40, 40))])
def test_error_budget(backend, dtype, training, channels, size):
    x, *rest = case(2, channels, size)
    x = x.to(dtype)

    def of(name, work):
        kind = torch.promote_types(work, torch.float32)
        tensors = [x.to(work), *(t.float().to(kind) for t in rest)]
        # without a clamp, at whose edges one rounding decides about a gradient
        return run(lambda *t: F.batch_norm_act(*t, training=training, backend=name), tensors)

    results = of(backend, dtype), of("reference", dtype), of("reference", torch.float64)
    for name, *three in zip(NAMES, *results, strict=True):
        within_budget(*three, name, dtype if name in ("value", "x") else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_costs_the_variance_no_digits(backend, dtype):
    x = (torch.randn(2, 8, 40, 40) / 16 + 1000).to(dtype)
    mean, var = torch.zeros(8), torch.zeros(8)
    options = dict(training=True, momentum=1.0, backend=backend)
    F.batch_norm_act(x, torch.ones(8), torch.zeros(8), mean, var, **options)
    truth = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(var.double(), truth[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), truth[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["channels last", "contiguous", "strided"])
def test_any_layout(backend, layout):
    x, *rest = (t.float() for t in case(2, 20, (9, 12)))
    options = dict(training=True, activation="relu6")
    wanted = run(lambda *t: literal(*t, **options), (x, *rest))
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.repeat_interleave(2, 3)[..., ::2]
    found = run(lambda *t: F.batch_norm_act(*t, **options, backend=backend), (x, *rest))
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_wanted_has_a_gradient(backend):
    x, weight, bias, *running = case(2, 5, (6, 7))
    for number, leaf in enumerate((x, weight, bias)):
        leaves = [t.detach() for t in (x, weight, bias)]
        leaves[number] = leaf.detach().requires_grad_()
        out = F.batch_norm_act(*leaves, *running, training=True, activation="relu", backend=backend)
        (found,) = torch.autograd.grad(out.square().sum(), leaves[number])
        every = [t.detach().requires_grad_() for t in (x, weight, bias)]
        wanted = torch.autograd.grad(
            literal(*every, *running, training=True, activation="relu").square().sum(), every
        )
        torch.testing.assert_close(found, wanted[number])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_gradient(backend, training):
    x, weight, bias, *running = case(2, 5, (6, 7))

    def op(*leaves):
        statistics = [t.clone() for t in running]
        return F.batch_norm_act(*leaves, *statistics, training=training, activation="relu6", backend=backend)

    assert torch.autograd.gradcheck(op, tuple(t.requires_grad_() for t in (x, weight, bias)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_writes_the_statistics(backend):
    torch._dynamo.reset()
    options = dict(training=True, activation="relu6", backend=backend)
    tensors = [t.float() for t in case(2, 8, (5, 6))]
    compiled = torch.compile(lambda *t: F.batch_norm_act(*t, **options), fullgraph=True, backend="aot_eager")
    for one, two in zip(
        run(compiled, tensors),
        run(lambda *t: literal(*t, training=True, activation="relu6"), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_may_be_changed_in_place(backend):
    x, *rest = case(1, 4, (5, 6))
    wanted = run(lambda *t: literal(*t, training=True, activation="relu6") * 2, (x, *rest))
    found = run(
        lambda *t: F.batch_norm_act(*t, training=True, activation="relu6", backend=backend).mul_(2),
        (x, *rest),
    )
    assert all(torch.allclose(one, two, atol=1e-9) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outside_of_training_a_pixel_has_a_gradient_of_its_own(backend, dtype):
    x, weight, bias, *running = (t.float() if dtype != torch.float64 else t for t in case(2, 20, (5, 6)))
    x = x.to(dtype)
    settings = dict(training=False, activation="relu6", backend=backend)
    wanted = torch.autograd.grad(
        F.batch_norm_act(x.requires_grad_(), weight, bias, *running, **settings).sum(), x
    )
    odd = x.detach().clone()
    odd[0, 3, 1, 1] = torch.inf  # the clamp lets no gradient through
    found = torch.autograd.grad(
        F.batch_norm_act(odd.requires_grad_(), weight, bias, *running, **settings).sum(), odd
    )
    assert found[0][0, 3, 1, 1] == 0
    found[0][0, 3, 1, 1] = wanted[0][0, 3, 1, 1]
    assert torch.equal(found[0], wanted[0])
