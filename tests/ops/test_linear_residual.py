from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(b, t, k, n, *, layer_scale=True, drop_path=True):
    kwargs = {"residual": nasty.tokens(b, t, n, seed=5)}
    if layer_scale:
        kwargs["layer_scale"] = nasty.vector(n, seed=6)
    if drop_path:
        # Halves: exact in every dtype.
        kwargs["drop_path"] = torch.arange(b, dtype=torch.float64) * 0.5
    return (nasty.tokens(b, t, k), nasty.weight(n, k), nasty.vector(n)), kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_matches_float64(tokens, backend, dtype):
    args, kwargs = arguments(2, tokens, 80, 72)
    check("linear_residual", *args, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", nasty.MLP_WIDTHS)
def test_odd_mlp_widths(width, dtype):
    args, kwargs = arguments(1, 29, width, 88)
    check("linear_residual", *args, **kwargs, dtype=dtype)


@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("drop_path", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_optional_vectors(layer_scale, drop_path, bias):
    (x, weight, b), kwargs = arguments(3, 5, 40, 24, layer_scale=layer_scale, drop_path=drop_path)
    check("linear_residual", x, weight, b if bias else None, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
def test_strides(kind):
    args, kwargs = arguments(2, 7, 64, 48)
    kwargs["residual"] = nasty.strided(kwargs["residual"], kind)
    check("linear_residual", *args, **kwargs, dtype=torch.float32, layout=lambda t: nasty.strided(t, kind))


def test_dropped_branch_is_the_residual_bit_for_bit():
    (x, weight, bias), kwargs = arguments(2, 7, 64, 48)
    kwargs["drop_path"] = torch.zeros(2)
    kwargs = {k: v.float() for k, v in kwargs.items()}
    out = ops.linear_residual(x.float(), weight.float(), bias.float(), **kwargs)
    assert torch.equal(out, kwargs["residual"])


def test_residual_is_not_written():
    (x, weight, bias), kwargs = arguments(2, 7, 64, 48)
    kwargs = {k: v.float() for k, v in kwargs.items()}
    before = kwargs["residual"].clone()
    ops.linear_residual(x.float(), weight.float(), bias.float(), **kwargs)
    assert torch.equal(kwargs["residual"], before)


def test_empty():
    out = ops.linear_residual(torch.empty(0, 5, 8), torch.zeros(4, 8), residual=torch.empty(0, 5, 4))
    assert out.shape == (0, 5, 4)


def test_wider_residual_stream():
    args, kwargs = arguments(2, 9, 96, 80)
    low = [a.bfloat16() for a in args]
    residual = kwargs["residual"].float()
    actual = ops.linear_residual(*low, residual=residual)
    eager = residual + torch.nn.functional.linear(*low)
    truth = residual.double() + torch.nn.functional.linear(*(a.double() for a in low))
    assert actual.dtype == torch.float32
    assert_close(actual, truth, eager=eager.bfloat16())


def test_autocast_keeps_the_residual_stream():
    args, kwargs = arguments(2, 9, 96, 80, drop_path=False)
    x, weight, bias = (a.float() for a in args)
    kwargs = {k: v.float() for k, v in kwargs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.linear_residual(x, weight, bias, **kwargs)
        eager = kwargs["residual"] + kwargs["layer_scale"] * torch.nn.functional.linear(x, weight, bias)
    branch = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    truth = kwargs["residual"].double() + kwargs["layer_scale"].double() * branch
    assert actual.dtype == eager.dtype == torch.float32
    assert_close(actual, truth, eager=eager.bfloat16())


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 70), k=st.integers(1, 300), n=st.integers(1, 150), bf16=st.booleans())
def test_any_shape(t, k, n, bf16):
    assume(t * n >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    args, kwargs = arguments(2, t, k, n)
    check("linear_residual", *args, **kwargs, dtype=torch.bfloat16 if bf16 else torch.float32)


def test_gradients():
    args, kwargs = arguments(3, 5, 24, 32)
    check_gradients("linear_residual", *args, **kwargs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": torch.zeros(2, 3, 5)}, ValueError, "residual: shape"),
        ({"layer_scale": torch.zeros(5)}, ValueError, "layer_scale: shape"),
        ({"drop_path": torch.zeros(3)}, ValueError, "drop_path: shape"),
        ({"x": torch.zeros(8), "residual": torch.zeros(4), "drop_path": torch.ones(4)}, ValueError, "drop_path: given"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: shape"),
        ({"x": torch.zeros(2, 3, 7)}, ValueError, "x: shape"),
        ({"weight": torch.zeros(4, 8).double()}, TypeError, "weight: dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": torch.zeros(2, 3, 8), "weight": torch.zeros(4, 8), "residual": torch.zeros(2, 3, 4), **change}
    with pytest.raises(error, match=message):
        ops.linear_residual(given.pop("x"), given.pop("weight"), **given)
