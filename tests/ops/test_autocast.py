"""Every operator under torch.autocast: dtypes of results and gradients, and errors no larger than eager PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import ops, reference
from tests.kernels.gradients import seed
from tests.ops.samples import SAMPLES, sample
from tests.tolerances import assert_close

BF16 = torch.bfloat16
# What ends in a residual keeps the residual stream's dtype.
RESULT = {name: torch.float32 if name in ("linear_residual", "self_attention", "mlp") else BF16 for name in SAMPLES}


def run(function: Callable[..., Tensor], name: str, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """The result, and the gradient of every tensor, each in its own dtype."""
    tensors, options = sample(name, dtype)
    leaves = {key: t.requires_grad_() for key, t in tensors.items()}
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = function(**leaves, **options)
    out.backward(seed(*out.shape).to(out.dtype))
    return {"result": out, **{key: t.grad for key, t in leaves.items() if t.grad is not None}}


@pytest.mark.parametrize("name", SAMPLES)
def test_results_and_gradients(name: str) -> None:
    plain = getattr(reference, name)
    truth, eager = run(plain, name, torch.float64, False), run(plain, name, torch.float32, True)
    actual = run(getattr(ops, name), name, torch.float32, True)
    assert actual["result"].dtype == RESULT[name]
    assert actual.keys() == truth.keys()
    for key, mine in actual.items():
        assert key == "result" or mine.dtype == torch.float32, key
        # In bfloat16 by computation, if not by type.
        assert_close(mine.to(BF16), truth[key], eager=eager[key].to(BF16))


@pytest.mark.parametrize("name", SAMPLES)
def test_disabled_inside(name: str) -> None:
    tensors, options = sample(name, torch.float32)
    function: Any = getattr(ops, name)
    expected = function(**tensors, **options)
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", enabled=False):
            actual = function(**tensors, **options)
        assert function(**tensors, **options).dtype == RESULT[name]
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_compiled(name: str) -> None:
    """Autocast around the compiled call and inside it: the same results and gradients, bit for bit."""
    function = getattr(ops, name)

    def inside(**arguments: Any) -> Tensor:
        with torch.autocast("cpu", BF16):
            return function(**arguments)

    expected = run(function, name, torch.float32, True)
    for compiled, around in ((function, True), (inside, False)):
        torch._dynamo.reset()
        actual = run(torch.compile(compiled, backend="aot_eager", fullgraph=True), name, torch.float32, around)
        assert actual.keys() == expected.keys()
        for key, mine in actual.items():
            assert torch.equal(mine, expected[key]), key
    torch._dynamo.reset()


def test_float64_is_left_alone() -> None:
    tensors, options = sample("mlp", torch.float64)
    expected = ops.mlp(**tensors, **options)
    with torch.autocast("cpu", BF16):
        assert torch.equal(ops.mlp(**tensors, **options), expected)
