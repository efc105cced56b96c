from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(b, t, d, h, *, norm="layer", activation="gelu", vectors=True):
    rows = 2 * h if activation == "swiglu" else h
    args = nasty.tokens(b, t, d), nasty.weight(rows, d), nasty.vector(rows), nasty.weight(d, h), nasty.vector(d, 5)
    kwargs = {"norm": norm, "activation": activation}
    if norm != "none":
        kwargs["norm_weight"] = nasty.vector(d, seed=3, mean=1.0)
    if norm == "layer":
        kwargs["norm_bias"] = nasty.vector(d, seed=4)
    if vectors:
        # drop_path in halves: exact in every dtype.
        kwargs |= {"layer_scale": nasty.vector(d, seed=6), "drop_path": torch.arange(b, dtype=torch.float64) * 0.5}
    return args, kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_matches_float64(tokens, backend, dtype):
    args, kwargs = arguments(2, tokens, 72, 200)
    check("mlp", *args, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu"])
def test_norms_and_activations(activation, norm, dtype):
    args, kwargs = arguments(2, 29, 96, 173, norm=norm, activation=activation)
    # A thousandth of the size: massive channels, un-normed, leave nothing of the branch in bf16's residual.
    args = (args[0] * 1e-3, *args[1:])
    check("mlp", *args, **kwargs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", nasty.MLP_WIDTHS)
def test_odd_widths(width, dtype):
    args, kwargs = arguments(1, 29, 88, width)
    check("mlp", *args, **kwargs, dtype=dtype)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_more_rows_than_one_block(activation):
    """Blocks of rows begin amid samples: DropPath must still find each row's factor."""
    args, kwargs = arguments(37, 197, 16, 2048, activation=activation)
    check("mlp", *args, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("missing", ["fc1_bias", "fc2_bias", "norm_weight", "norm_bias", "layer_scale", "drop_path"])
def test_optional_vectors(missing):
    args, kwargs = arguments(3, 5, 40, 24)
    if missing in kwargs:
        kwargs[missing] = None
    names = ("x", "w", "fc1_bias", "w", "fc2_bias")
    args = [None if name == missing else a for name, a in zip(names, args, strict=True)]
    check("mlp", *args, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kind, dtype):
    (x, w1, b1, w2, b2), kwargs = arguments(2, 7, 64, 48)
    args = x, nasty.strided(w1, kind), b1, nasty.strided(w2, kind), b2
    check("mlp", *args, **kwargs, dtype=dtype, layout=lambda t: nasty.strided(t, kind))


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (0, 16)])
def test_empty(shape):
    x = torch.empty(shape)
    assert ops.mlp(x, torch.zeros(24, 16), None, torch.zeros(16, 24), None).shape == shape


@settings(deadline=None, max_examples=30)
@given(t=st.integers(1, 70), d=st.integers(2, 200), h=st.integers(1, 300), gated=st.booleans(), bf16=st.booleans())
def test_any_shape(t, d, h, gated, bf16):
    assume(t * d >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    assume(d >= 8 or not bf16)  # a norm over few channels leaves few different rows, whose errors don't average
    args, kwargs = arguments(1, t, d, h, activation="swiglu" if gated else "gelu", vectors=False)
    check("mlp", *args, **kwargs, dtype=torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients(activation):
    args, kwargs = arguments(2, 5, 24, 32, activation=activation)
    check_gradients("mlp", *args, **kwargs)


def test_is_the_two_operators_that_it_is_made_of():
    args, kwargs = arguments(2, 50, 96, 384)
    x, w1, b1, w2, b2 = (a.float() for a in args)
    kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    ends = {k: kwargs[k] for k in ("layer_scale", "drop_path")}
    starts = {k: v for k, v in kwargs.items() if k not in ends}
    two = ops.linear_residual(ops.norm_linear(x, w1, b1, **starts), w2, b2, residual=x, **ends)
    assert torch.equal(ops.mlp(x, w1, b1, w2, b2, **kwargs), two)


def test_autocast_keeps_the_residual_wide():
    args, kwargs = arguments(2, 9, 96, 80, vectors=False)
    args = [a.float() for a in args]
    kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.mlp(*args, **kwargs)
        with ops.use_backend("reference"):
            eager = ops.mlp(*args, **kwargs)
    assert actual.dtype == eager.dtype == torch.float32
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    truth = ops.mlp(*(a.double() for a in args), **double)
    assert_close(actual.bfloat16(), truth, eager=eager.bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 9)}, ValueError, "x: shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.long)}, TypeError, "x: dtype"),
        ({"x": torch.zeros(2, 8, dtype=torch.bfloat16)}, TypeError, "fc1_weight: dtype"),
        ({"fc1_weight": torch.zeros(4, 8)}, ValueError, r"fc1_weight: shape \(4, 8\).*accepted: \(6, 8\)"),
        ({"activation": "swiglu"}, ValueError, r"fc1_weight: shape \(6, 8\).*accepted: \(12, 8\)"),
        ({"fc2_weight": torch.zeros(8)}, ValueError, "fc2_weight: shape"),
        ({"fc1_bias": torch.zeros(5)}, ValueError, "fc1_bias: shape"),
        ({"fc2_bias": torch.zeros(5)}, ValueError, "fc2_bias: shape"),
        ({"norm": "batch"}, ValueError, "norm: 'batch'"),
        ({"activation": "tanh"}, ValueError, "activation: 'tanh'"),
        ({"layer_scale": torch.zeros(3)}, ValueError, "layer_scale: shape"),
        ({"drop_path": torch.zeros(3)}, ValueError, "drop_path: shape"),
        ({"x": torch.zeros(8), "drop_path": torch.ones(8)}, ValueError, "drop_path: given"),
        ({"fc2_weight": torch.zeros(8, 6, device="meta")}, ValueError, "fc2_weight: on meta"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": torch.zeros(2, 8), "fc1_weight": torch.zeros(6, 8), "fc1_bias": None}
    given |= {"fc2_weight": torch.zeros(8, 6), "fc2_bias": None, **change}
    with pytest.raises(error, match=message):
        ops.mlp(**given)
