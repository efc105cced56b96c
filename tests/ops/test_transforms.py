"""The operators where nothing is computed (meta tensors), and where something looks inside them (torch.func, autograd
of autograd, make_fx)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastvit import ops, reference
from fastvit.nn import Block
from fastvit.ops import _backend
from tests import nasty
from tests.ops.samples import SAMPLES, sample
from tests.tolerances import assert_close


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SAMPLES)
def test_meta(name: str, autocast: bool) -> None:
    """Shapes and dtypes as on a device; autocast does not know this one, and leaves it alone."""
    tensors, options = sample(name, torch.float32)
    expected = getattr(ops, name)(**tensors, **options)
    leaves = {key: t.to("meta").requires_grad_() for key, t in tensors.items()}
    options = {key: o.to("meta") if isinstance(o, Tensor) else o for key, o in options.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = getattr(ops, name)(**leaves, **options)
    assert out.is_meta
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    out.sum().backward()
    for key, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.is_meta, key
        assert leaf.grad.shape == leaf.shape


def gradient_penalty(library: object, name: str, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of |d result / d first tensor|^2, added to the result itself."""
    tensors, options = sample(name, dtype)
    leaves = [t.requires_grad_() for t in tensors.values()]
    # A weight that depends on the input: gradients of gradients may not follow that path twice.
    mixed = [leaves[0], *(t + leaves[0].mean() * 1e-3 for t in leaves[1:])]
    out = getattr(library, name)(**dict(zip(tensors, mixed, strict=True)), **options)
    first = torch.autograd.grad(out.square().mean(), leaves[0], create_graph=True)[0]
    loss = first.square().sum() * 10.0 + out.mean()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("name", SAMPLES)
def test_differentiated_twice(name: str) -> None:
    expected = gradient_penalty(reference, name, torch.float64)
    for mine, truth in zip(gradient_penalty(ops, name, torch.float32), expected, strict=True):
        assert_close(mine, truth)


@pytest.mark.skipif(not _backend.has_triton(), reason="needs triton")
@pytest.mark.parametrize("name", ["norm_linear", "mlp"])
def test_differentiated_twice_where_the_first_backward_is_a_kernel(name: str) -> None:
    expected = gradient_penalty(reference, name, torch.float64)
    with ops.use_backend("triton"):
        actual = gradient_penalty(ops, name, torch.float32)
    for mine, truth in zip(actual, expected, strict=True):
        assert_close(mine, truth)


@pytest.mark.parametrize("name", SAMPLES)
def test_func(name: str) -> None:
    """grad, jvp and vmap see the plain torch that the operator means."""

    def transformed(library: object, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors, options = sample(name, dtype)
        first = next(iter(tensors))

        def loss(tensors: dict[str, Tensor]) -> Tensor:
            return getattr(library, name)(**tensors, **options).square().mean()

        def of_first(x: Tensor) -> Tensor:
            return getattr(library, name)(**{**tensors, first: x}, **options)

        _, tangent = torch.func.jvp(of_first, (tensors[first],), (tensors[first].cos(),))
        two = torch.stack([tensors[first], tensors[first].flip(0)])
        return {**torch.func.grad(loss)(tensors), "jvp": tangent, "vmap": torch.vmap(of_first)(two)}

    expected, actual = transformed(reference, torch.float64), transformed(ops, torch.float32)
    assert actual.keys() == expected.keys()
    for key, mine in actual.items():
        assert_close(mine, expected[key])


@pytest.mark.parametrize("name", ["linear_residual", "attention"])
def test_compiled_jvp_and_vmap(name: str) -> None:
    tensors, options = sample(name, torch.float32)
    first = next(iter(tensors))

    def of_first(x: Tensor) -> Tensor:
        return getattr(ops, name)(**{**tensors, first: x}, **options)

    def transformed(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(of_first, (x,), (x.cos(),))[1], torch.vmap(of_first)(torch.stack([x, x.flip(0)]))

    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(compiled(tensors[first]), transformed(tensors[first]), strict=True):
        assert_close(mine, expected.double())
    torch._dynamo.reset()


def test_func_checks_arguments_too() -> None:
    with pytest.raises(ValueError, match=r"weight: shape|x: shape"):
        torch.func.grad(lambda x: ops.norm_linear(x, torch.randn(6, 9)).sum())(torch.randn(5, 8))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_a_training_step(mode: str) -> None:
    block = nasty.randomize(Block(32, 2, qkv_bias=True, init_values=0.1))
    parameters = {key: p.detach().requires_grad_() for key, p in block.named_parameters()}

    def step(parameters: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        out = torch.func.functional_call(block, parameters, (x,))
        return list(torch.autograd.grad(out.square().mean(), list(parameters.values())))

    x = torch.randn(2, 5, 32)
    graph = make_fx(step, tracing_mode=mode)(parameters, x)
    called = {str(node.target) for node in graph.graph.nodes}
    assert {"fastvit.self_attention.default", "fastvit.mlp.default"} <= called
    for mine, expected in zip(graph(parameters, x), step(parameters, x), strict=True):
        assert_close(mine, expected.double())


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAMPLES)
def test_what_watches_sees_each_operator(name: str) -> None:
    """In inference on a CPU nobody else is concerned, and the dispatcher is left out; but for these."""
    tensors, options = sample(name, torch.float32)

    def call() -> Tensor:
        return getattr(ops, name)(**tensors, **options)

    with torch.no_grad():
        expected = call()
        with Watch() as watch:
            assert torch.equal(call(), expected)
        operator = f"fastvit::{name.removesuffix('_qkvpacked')}"
        assert any(seen.startswith(operator) for seen in watch.seen)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(call(), expected)
    assert any(event.key.startswith(operator) for event in profile.key_averages())


def test_jit_trace_records_the_operator() -> None:
    x, w = nasty.tokens(2, 5, 24).float(), nasty.weight(16, 24).float()
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: ops.norm_linear(x, w), x)
        assert "fastvit::norm_linear" in str(traced.graph)
        assert torch.equal(traced(x * 2), ops.norm_linear(x * 2, w))


@pytest.mark.parametrize("name", SAMPLES)
def test_checks_that_passed_are_made_anew_of_other_arguments(name):
    """Operators remember what passed (`_checks.remembered`)."""
    tensors, options = sample(name, torch.float32)
    operator = getattr(ops, name)
    with torch.no_grad():
        expected = operator(**tensors, **options)
        assert torch.equal(operator(**tensors, **options), expected)
        for key, t in tensors.items():
            for wrong in (t[..., :-1], t.to(torch.int64)):
                with pytest.raises((TypeError, ValueError)):
                    operator(**{**tensors, key: wrong}, **options)
        with torch.device("meta"):  # where new tensors go, but no results
            assert torch.equal(operator(**tensors, **options), expected)
