"""quantize="int8": what the operators compute with it, and the cache of int8 weights behind them."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from fastvit import ops, reference
from fastvit.ops import _backend, _int8
from tests import nasty
from tests.ops import test_mlp, test_self_attention
from tests.ops.harness import BACKENDS, convert
from tests.tolerances import INT8, INT8_TIES, assert_close, relative_l2

needs_extension = pytest.mark.skipif(_backend.extension() is None, reason="needs the C++ extension")


def norm_linear(d=96, n=56):
    norm = {"norm_weight": nasty.vector(d, 3, 1.0), "norm_bias": nasty.vector(d, 4), "activation": "gelu"}
    return (nasty.tokens(2, 29, d), nasty.weight(n, d), nasty.vector(n)), norm


def linear_residual(k=200, n=72):
    ends = {"residual": nasty.tokens(2, 29, n, seed=5, massive=0) * 0.1, "layer_scale": nasty.vector(n, 6, 1.0)}
    return (nasty.tokens(2, 29, k), nasty.weight(n, k), nasty.vector(n)), ends


def mlp():
    (x, *weights), kwargs = test_mlp.arguments(2, 29, 72, 200, activation="swiglu")
    return (x * 1e-3, *weights), kwargs


def self_attention():
    args, kwargs = test_self_attention.arguments(2, 29, 3, 24)
    return (args[0] * 1e-3, *args[1:]), kwargs


SAMPLES = {f.__name__: f for f in (norm_linear, linear_residual, mlp, self_attention)}


def cast(sample, dtype):
    args, kwargs = sample
    return [convert(a, dtype) for a in args], {k: convert(v, dtype) for k, v in kwargs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", SAMPLES)
def test_near_float64_on_every_backend_and_dtype(name, backend, dtype):
    args, kwargs = cast(SAMPLES[name](), dtype)
    truth_args, truth_kwargs = cast((args, kwargs), torch.float64)
    truth = getattr(reference, name)(*truth_args, **truth_kwargs)
    with ops.use_backend(backend):
        actual = getattr(ops, name)(*args, **kwargs, quantize="int8")
        unquantized = getattr(ops, name)(*args, **kwargs)
    assert actual.dtype == dtype
    assert relative_l2(unquantized, truth) < relative_l2(actual, truth) < INT8


@pytest.mark.parametrize("name", ["mlp", "self_attention"])
@pytest.mark.parametrize("pair", [("int8", None), (None, "int8"), ("int8", "int8")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_are_the_operators_that_the_half_is_made_of(name, pair, backend):
    args, kwargs = cast(SAMPLES[name](), torch.float32)
    with ops.use_backend(backend):
        actual = getattr(ops, name)(*args, **kwargs, quantize=pair)
    expected = getattr(reference, name)(*args, **kwargs, quantize=pair)
    assert relative_l2(actual, expected) < INT8_TIES
    if pair == ("int8", "int8"):
        assert torch.equal(actual, getattr(ops, name)(*args, **kwargs, quantize="int8")) or backend == "reference"
    else:
        assert relative_l2(actual, getattr(reference, name)(*args, **kwargs)) > INT8_TIES


@pytest.mark.parametrize("name", SAMPLES)
def test_gradients_are_those_of_the_float_product(name):
    args, kwargs = cast(SAMPLES[name](), torch.float32)

    def gradients(**quantize):
        leaves = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args]
        out = getattr(ops, name)(*leaves, **kwargs, **quantize)
        out.backward(torch.ones_like(out))
        return [t.grad for t in leaves if isinstance(t, torch.Tensor)]

    for mine, expected in zip(gradients(quantize="int8"), gradients(), strict=True):
        assert_close(mine, expected)


@needs_extension
def test_large_samples_are_composed(monkeypatch):
    args, kwargs = cast(self_attention(), torch.float32)
    whole = ops.self_attention(*args, **kwargs, quantize="int8")
    monkeypatch.setattr(sys.modules["fastvit.ops.self_attention"], "MOST_SCRATCH", 0)
    assert relative_l2(ops.self_attention(*args, **kwargs, quantize="int8"), whole) < INT8_TIES


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(name, backend):
    args, kwargs = cast(SAMPLES[name](), torch.float32)
    double_args, double_kwargs = cast((args, kwargs), torch.float64)
    truth = getattr(reference, name)(*double_args, **double_kwargs)
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend(backend):
        actual = getattr(ops, name)(*args, **kwargs, quantize="int8")
        plain = getattr(ops, name)(*args, **kwargs)
    assert actual.dtype == plain.dtype
    assert relative_l2(actual, truth) < INT8


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape):
    assert ops.norm_linear(torch.empty(shape), torch.ones(4, 8), quantize="int8").shape == (*shape[:-1], 4)


def test_no_channels():
    out = ops.norm_linear(torch.empty(3, 0), torch.empty(4, 0), torch.ones(4), norm="none", quantize="int8")
    assert torch.equal(out, torch.ones(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_never_a_quietly_wrong_number(backend):
    (x, w, b), kwargs = cast(norm_linear(), torch.float32)
    x[0, 3, 5], x[1, 2, 0] = float("nan"), float("inf")
    with ops.use_backend(backend):
        out = ops.norm_linear(x, w, b, **kwargs, quantize="int8")
    assert out[0, 3].isnan().all()
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 2 * out.shape[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.norm_linear(x, w, quantize="int4"), "quantize: 'int4' is not known; accepted: 'int8' or"),
        (lambda x, w: ops.linear_residual(x, w, residual=x, quantize="fp8"), "quantize: 'fp8'"),
        (lambda x, w: ops.mlp(x, w, None, w, None, quantize=("int8", "int3")), "quantize: 'int3'"),
        (lambda x, w: ops.mlp(x, w, None, w, None, quantize=("int8",)), r"quantize: \('int8',\) has 1 entries.*fc1"),
        (lambda x, w: torch.ops.fastvit.linear_residual(x, w, None, x, *[None] * 3, "int3"), "quantize: 'int3'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 8), torch.zeros(8, 8))


# ---- The cache ------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """How often a weight was quantised."""
    calls = []
    original = _int8._quantized
    monkeypatch.setattr(_int8, "_quantized", lambda weight: calls.append(weight.shape) or original(weight))
    return calls


@pytest.fixture
def linear():
    return nasty.randomize(nn.Linear(96, 56))


def apply(x, linear):
    with torch.set_grad_enabled(not linear.weight.is_inference()):
        return ops.norm_linear(x, linear.weight, linear.bias, quantize="int8")


def _in_place(w):
    w.mul_(1.5)


def _through_data(w):
    w.data.mul_(1.5)


def _some_rows_through_data(w):
    w.data[:3].zero_()


def _new_data(w):
    w.data = w.data * 1.5


def _transposed(w):
    w.data = w.data.t().contiguous().t() * 2.0


def _from_numpy(w):
    w.detach().numpy()[:] *= 1.5


CHANGES = [_in_place, _through_data, _some_rows_through_data, _new_data, _transposed, _from_numpy]


@needs_extension
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_changed_weight_is_seen(linear, made, change, inference):
    x = nasty.tokens(7, 96).float()
    if inference:
        with torch.inference_mode():
            linear = nasty.randomize(nn.Linear(96, 56))
    before = [apply(x, linear) for _ in range(3)][-1]
    assert len(made) == 1
    with torch.inference_mode() if inference else torch.no_grad():
        change(linear.weight)
    for _ in range(2):
        after = apply(x, linear)
    assert len(made) == 2
    assert relative_l2(after, before) > 0.01
    assert torch.equal(after, apply(x, copy.deepcopy(linear)))


@needs_extension
def test_load_state_dict_optimizer_and_to(linear, made):
    x = nasty.tokens(7, 96).float()
    steps = [
        lambda: linear.load_state_dict(nasty.randomize(nn.Linear(96, 56), seed=7).state_dict()),
        lambda: torch.optim.SGD(linear.parameters(), lr=0.1).step(),
        lambda: linear.bfloat16().float(),
    ]
    apply(x, linear).square().sum().backward()
    for i, step in enumerate(steps):
        step()
        apply(x, linear)
        assert len(made) == i + 2
    assert torch.equal(apply(x, linear), apply(x, copy.deepcopy(linear)))


@needs_extension
def test_an_entry_goes_with_its_weight():
    x, linear = nasty.tokens(7, 96).float(), nn.Linear(96, 56)
    apply(x, linear)
    values = weakref.ref(_int8._entries[linear.weight].form[0])
    gc.disable()
    try:
        del linear
        assert values() is None
    finally:
        gc.enable()


@needs_extension
def test_forget(linear, made):
    x = nasty.tokens(7, 96).float()
    apply(x, linear)
    _int8.forget(linear.weight)
    _int8.forget(linear.weight)
    apply(x, linear)
    assert len(made) == 2


@needs_extension
@pytest.mark.parametrize("kind", ["sliced", "transposed"])
def test_strides(kind, made):
    (x, w, b), kwargs = cast(norm_linear(), torch.float32)
    expected = ops.norm_linear(x, w, b, **kwargs, quantize="int8")
    strided = nasty.strided(w, kind)
    for _ in range(2):
        actual = ops.norm_linear(nasty.strided(x, kind), strided, b, **kwargs, quantize="int8")
    assert torch.equal(actual, expected)
    assert len(made) == 2


@needs_extension
def test_an_entry_of_inference_mode_serves_training(linear):
    x = nasty.tokens(7, 96).float()
    with torch.inference_mode():
        first = apply(x, linear)
    out = apply(x, linear)
    assert torch.equal(out, first)
    out.sum().backward()
    assert linear.weight.grad is not None


@needs_extension
def test_threads_share_the_cache(linear):
    x = nasty.tokens(7, 96).float()
    results: list[list[torch.Tensor]] = [[] for _ in range(4)]
    barrier = threading.Barrier(4)

    def work(mine):
        for _ in range(10):
            barrier.wait()
            mine.append(apply(x, linear).detach())
            barrier.wait()
            _int8.forget(linear.weight)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = apply(x, linear)
    assert all(len(mine) == 10 and all(torch.equal(r, expected) for r in mine) for mine in results)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nasty.randomize(nn.Linear(96, 56))

    def forward(self, x):
        return ops.norm_linear(x, self.fc.weight, self.fc.bias, activation="gelu", quantize="int8")


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad, made):
    net, x = Net(), nasty.tokens(7, 96).float()
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert len(made) <= 2  # not once for each call
    with torch.no_grad():
        net.fc.weight.mul_(1.5)
    assert torch.equal(compiled(x), net(x))
    assert not torch.equal(compiled(x), expected)
    torch._dynamo.reset()


def test_export_has_float_parameters_and_the_setting():
    net, x = Net(), nasty.tokens(7, 96).float()
    exported = torch.export.export(net, (x,))
    assert list(exported.state_dict) == ["fc.weight", "fc.bias"]
    assert all(t.dtype == torch.float32 for t in exported.state_dict.values())
    (node,) = [n for n in exported.graph.nodes if "fastvit" in str(n.target)]
    assert node.args[-1] == "int8"
    assert torch.equal(exported.module()(x), net(x))
