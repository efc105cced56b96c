"""The operators as the rest of torch sees them: opcheck, torch.compile, torch.export, FX, autograd in training."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from fastvit import ops
from fastvit.nn import Block
from tests import nasty
from tests.tolerances import assert_close

SAMPLES = {
    "norm_linear": lambda: (
        torch.randn(2, 5, 8),
        torch.randn(6, 8),
        None,
        torch.randn(8),
        None,
        "layer",
        1e-6,
        "gelu",
        None,
        "int8",
    ),
    "attention": lambda: (
        *(torch.randn(2, 5, 3, 8) for _ in range(3)),
        0.3,
        torch.randn(5, 5),
        *(None, None, None, None, False),
        *("none", None, None, None, None, 1e-6),
        *(None, None, None, None, None, None, [0, 0]),
        *(0.0, None, False, None),
    ),
    "linear_residual": lambda: (
        torch.randn(2, 5, 8),
        torch.randn(6, 8),
        torch.randn(6),
        torch.randn(2, 5, 6),
        None,
        torch.tensor([0.0, 2.0]),
        None,
        None,
    ),
    "patch_embed": lambda: (
        torch.randn(2, 3, 8, 8),
        torch.randn(6, 3, 4, 4),
        None,
        torch.randn(4, 6),
        torch.randn(1, 6),
        [0.5, 0.5, 0.5],
        None,
        None,
        "NCHW",
    ),
    "mlp": lambda: (
        torch.randn(2, 5, 8),
        torch.randn(12, 8),
        torch.randn(12),
        torch.randn(8, 6),
        None,
        torch.randn(8),
        None,
        "rms",
        1e-6,
        "swiglu",
        torch.randn(8),
        torch.tensor([0.0, 2.0]),
        None,
        None,
        "int8",
    ),
    "self_attention": lambda: (
        torch.randn(2, 5, 8),
        *(t for _ in range(3) for t in (torch.randn(8, 8), torch.randn(8))),
        torch.randn(8, 8),
        None,
        2,
        0.3,
        torch.randn(5, 5),
        torch.randn(4, 4),
        torch.randn(4, 4),
        True,
        torch.randn(8),
        None,
        "layer",
        1e-6,
        torch.randn(8),
        torch.tensor([0.0, 2.0]),
        None,
        "int8",
        "int8",
    ),
    "pool": lambda: (torch.randn(2, 5, 8), "avg", 1, "layer", None, None, 1e-6, torch.randn(3, 8), None, None),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(name, training):
    args = SAMPLES[name]()
    if training:
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(getattr(torch.ops.fastvit, name).default, args)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels, and the reference behind them
def test_fake_strides_of_transposed_inputs(name, dtype):
    def transposed(value):
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(dtype)
        return value if value.ndim < 2 else nasty.strided(value, "transposed")

    args = tuple(map(transposed, SAMPLES[name]()))
    torch.library.opcheck(getattr(torch.ops.fastvit, name).default, args, test_utils="test_faketensor")


def make_block() -> Block:
    block = Block(64, 2, qkv_bias=True, init_values=0.1)
    return nasty.randomize(block)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    block = make_block().eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (50, 5):
        x = torch.randn(2, tokens, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x), block(x))


def test_compiled_training_step_has_the_same_gradients():
    block = make_block()
    x = torch.randn(2, 5, 64)
    block(x).square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for p, e in zip(block.parameters(), expected, strict=True):
        assert_close(p.grad, e.double())


def test_a_training_step_compiles_once_for_any_batch():
    block = make_block()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for batch in (2, 5, 3):
        grads = []
        for module in (compiled, block):
            x = torch.randn(batch, 5, 64, generator=nasty.generator()).requires_grad_()
            torch._dynamo.mark_dynamic(x, 0)
            block.zero_grad()
            module(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in block.parameters())])
        for mine, expected in zip(*grads, strict=True):
            assert_close(mine, expected.double())
    assert counter.frame_count == 1


def test_export_of_any_batch_with_gradients():
    block = make_block().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(block, (torch.randn(2, 5, 64),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 7):
        x = torch.randn(size, 5, 64)
        assert torch.equal(exported(x), block(x))
    parameters = list(block.parameters())  # the exported module's too
    mine, expected = (torch.autograd.grad(module(x).square().sum(), parameters) for module in (exported, block))
    for grad, truth in zip(mine, expected, strict=True):
        assert_close(grad, truth.double())


def test_export():
    block = make_block().eval()
    x = torch.randn(2, 50, 64)
    exported = torch.export.export(block, (x,))
    assert torch.equal(exported.module()(x), block(x))
    called = [str(n.target) for n in exported.graph.nodes if "fastvit" in str(n.target)]
    assert [c.split(".")[1] for c in called] == ["self_attention", "mlp"]


def test_fx_trace_sees_the_operators_as_leaves():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return ops.norm_linear(x, self.weight, activation="gelu")

    net = Net()
    traced = torch.fx.symbolic_trace(net)
    x = torch.randn(3, 8)
    assert torch.equal(traced(x), net(x))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [ops.norm_linear]


def test_inference_mode_and_autograd_agree():
    block = make_block().eval()
    x = torch.randn(1, 50, 64)
    with torch.inference_mode():
        without = block(x)
    assert torch.equal(block(x).detach(), without)
