from __future__ import annotations

import pytest
import torch

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients


def arguments(b=3, n=50, d=96, classes=37, norm="layer"):
    kwargs = {"norm": norm, "weight": nasty.weight(classes, d), "bias": nasty.vector(classes)}
    if norm != "none":
        kwargs["norm_weight"] = nasty.vector(d, seed=3, mean=1.0)
    if norm == "layer":
        kwargs["norm_bias"] = nasty.vector(d, seed=4)
    return nasty.tokens(b, n, d), kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_matches_float64(mode, norm, backend, dtype):
    x, kwargs = arguments(norm=norm)
    check("pool", x, mode=mode, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_without_a_head(mode, dtype):
    x, kwargs = arguments()
    check("pool", x, mode=mode, **{**kwargs, "weight": None, "bias": None}, dtype=dtype)


@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_prefix_tokens(prefix, mode):
    x, kwargs = arguments()
    check("pool", x, mode=mode, num_prefix_tokens=prefix, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("batch", [1, 2, 9, 33])
def test_batches(batch):
    x, kwargs = arguments(b=batch, n=5)
    check("pool", x, **kwargs, dtype=torch.float32)


def test_only_token_zero_counts():
    x, kwargs = arguments()
    x[:, 1:] = float("nan")
    low = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert torch.isfinite(ops.pool(x.float(), **low)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_is_no_view_of_the_tokens(backend):
    x = torch.randn(1, 1, 8)
    with ops.use_backend(backend):
        pooled = ops.pool(x, norm="none")
    assert torch.equal(pooled, x[:, 0])
    assert pooled.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
def test_strides(kind):
    x, kwargs = arguments()
    check("pool", x, **kwargs, mode="avg", dtype=torch.float32, layout=lambda t: nasty.strided(t, kind))


def test_empty():
    assert ops.pool(torch.empty(0, 5, 8), weight=torch.zeros(4, 8)).shape == (0, 4)


@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_gradients(mode):
    x, kwargs = arguments(b=2, n=5, d=16, classes=6)
    check_gradients("pool", x, mode=mode, **kwargs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(5, 8)}, ValueError, "x: shape"),
        ({"mode": "max"}, ValueError, "mode: 'max'"),
        ({"mode": "avg", "num_prefix_tokens": 5}, ValueError, "num_prefix_tokens: 5"),
        ({"x": torch.zeros(2, 0, 8)}, ValueError, "no token"),
        ({"weight": torch.zeros(4, 9)}, ValueError, "weight: shape"),
        ({"bias": torch.zeros(4)}, ValueError, "bias: given without weight"),
        ({"norm": "batch"}, ValueError, "norm: 'batch'"),
        ({"weight": torch.zeros(4, 8).double()}, TypeError, "weight: dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": torch.zeros(2, 5, 8), **change}
    with pytest.raises(error, match=message):
        ops.pool(given.pop("x"), **given)
