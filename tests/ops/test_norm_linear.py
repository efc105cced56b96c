from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(m, k, n, norm="layer", *, offset=0.0, shape=None):
    x = nasty.tokens(*(shape or (m, k)), offset=offset)
    kwargs = {"norm": norm}
    if norm != "none":
        kwargs["norm_weight"] = nasty.vector(k, seed=3, mean=1.0)
    if norm == "layer":
        kwargs["norm_bias"] = nasty.vector(k, seed=4)
    return (x, nasty.weight(n, k), nasty.vector(n)), kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_matches_float64(tokens, norm, backend, dtype):
    args, kwargs = arguments(tokens, 96, 200, norm)
    check("norm_linear", *args, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu"])
def test_activations(activation, dtype):
    args, kwargs = arguments(50, 192, 346)
    check("norm_linear", *args, **kwargs, activation=activation, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", nasty.MLP_WIDTHS)
def test_odd_mlp_widths(width, dtype):
    args, kwargs = arguments(29, 88, width)
    check("norm_linear", *args, **kwargs, activation="gelu", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_a_long_batch(dtype):
    args, kwargs = arguments(0, 768, 130, shape=(4, 197, 768))
    check("norm_linear", *args, **kwargs, activation="gelu", dtype=dtype)


def test_mean_far_above_deviation():
    # The folded form loses its digits here when the column sums are not those of the rounded weights.
    args, kwargs = arguments(33, 256, 64, offset=99.0)
    check("norm_linear", *args, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(kind, dtype):
    args, kwargs = arguments(0, 64, 48, shape=(2, 7, 64))
    check("norm_linear", *args, **kwargs, dtype=dtype, layout=lambda t: nasty.strided(t, kind))


def test_weight_of_any_layout():
    (x, weight, bias), kwargs = arguments(9, 64, 48)
    check("norm_linear", x, nasty.strided(weight, "transposed"), bias, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("missing", ["bias", "norm_bias", "norm_weight"])
def test_optional_vectors(missing):
    (x, weight, bias), kwargs = arguments(9, 64, 48)
    kwargs["bias"] = bias
    check("norm_linear", x, weight, **{**kwargs, missing: None}, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (3, 0, 64)])
def test_empty(shape):
    (_, weight, bias), kwargs = arguments(1, 64, 48)
    kwargs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert ops.norm_linear(torch.empty(shape), weight.float(), bias.float(), **kwargs).shape == (*shape[:-1], 48)


def test_half_and_double_run_the_reference():
    args, kwargs = arguments(9, 64, 48)
    check("norm_linear", *args, **kwargs, dtype=torch.float16)
    check("norm_linear", *args, **kwargs, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 70), k=st.integers(1, 300), n=st.integers(1, 150), bf16=st.booleans())
def test_any_shape(m, k, n, bf16):
    assume(m * n >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    assume(k >= 8 or not bf16)  # a norm over few channels leaves few different rows, whose errors don't average
    args, kwargs = arguments(m, k, n)
    check("norm_linear", *args, **kwargs, activation="gelu", dtype=torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_gradients(activation):
    args, kwargs = arguments(0, 24, 32, shape=(2, 5, 24))
    check_gradients("norm_linear", *args, **kwargs, activation=activation)


def test_autocast_computes_as_eager_does():
    args, kwargs = arguments(0, 96, 80, shape=(2, 9, 96))
    x, weight, bias = (a.float() for a in args)
    norm = {k: kwargs[k].float() for k in ("norm_weight", "norm_bias")}
    truth = ops.norm_linear(x.double(), weight.double(), bias.double(), **{k: v.double() for k, v in norm.items()})
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.norm_linear(x, weight, bias, **norm)
        normed = torch.nn.functional.layer_norm(x, (96,), norm["norm_weight"], norm["norm_bias"], 1e-6)
        eager = torch.nn.functional.linear(normed, weight, bias)
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_close(actual, truth, eager=eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": "batch"}, ValueError, "norm: 'batch'"),
        ({"activation": "tanh"}, ValueError, "activation: 'tanh'"),
        ({"activation": "swiglu", "n": 3}, ValueError, "swiglu"),
        ({"x": torch.zeros(2, 9)}, ValueError, "x: shape"),
        ({"x": torch.zeros(2, 8, dtype=torch.long)}, TypeError, "x: dtype"),
        ({"x": torch.zeros(2, 8, dtype=torch.bfloat16)}, TypeError, "weight: dtype"),
        ({"bias": torch.zeros(5)}, ValueError, "bias: shape"),
        ({"norm_weight": torch.zeros(5)}, ValueError, "norm_weight: shape"),
        ({"norm": "rms", "norm_bias": torch.zeros(8)}, ValueError, "norm_bias"),
        ({"norm": "none", "norm_weight": torch.zeros(8)}, ValueError, "norm: 'none'"),
        ({"weight": torch.zeros(3, 8, 1)}, ValueError, "weight: shape"),
        ({"x": None}, TypeError, "x: NoneType"),
        ({"x": torch.zeros(2, 8).to_sparse()}, TypeError, "x: layout"),
        ({"x": torch.zeros(2, 8, dtype=torch.float8_e4m3fn)}, TypeError, "x: dtype"),
        ({"weight": None}, TypeError, "weight: NoneType"),
        ({"weight": "fc1"}, TypeError, "weight: str"),
        ({"bias": 1.0}, TypeError, "bias: float"),
        ({"eps": None}, TypeError, "eps: NoneType"),
        ({"weight": torch.zeros(3, 8, device="meta")}, ValueError, "weight: on meta"),
    ],
)
def test_bad_arguments(change, error, message):
    change = dict(change)
    given = {"x": torch.zeros(2, 8), "weight": torch.zeros(change.pop("n", 4), 8), **change}
    with pytest.raises(error, match=message):
        ops.norm_linear(given.pop("x"), given.pop("weight"), **given)


def test_a_forced_backend_never_falls_back():
    with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="forced"):
        ops.norm_linear(torch.zeros(2, 8).double(), torch.zeros(4, 8).double())
    with pytest.raises(ValueError, match="'cuda'"), ops.use_backend("cuda"):
        pass
