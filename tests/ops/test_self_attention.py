from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(b, t, heads, head_dim, *, d=None, norm="layer", vectors=True):
    d, inner = d or heads * head_dim, heads * head_dim
    args = nasty.tokens(b, t, d), nasty.weight(3 * inner, d), nasty.vector(3 * inner)
    args = *args, nasty.weight(d, inner, seed=8), nasty.vector(d, 5)
    kwargs = {"num_heads": heads, "norm": norm}
    if norm != "none":
        kwargs["norm_weight"] = nasty.vector(d, seed=3, mean=1.0)
    if norm == "layer":
        kwargs["norm_bias"] = nasty.vector(d, seed=4)
    if vectors:
        # drop_path in halves: exact in every dtype.
        kwargs |= {"layer_scale": nasty.vector(d, seed=6), "drop_path": torch.arange(b, dtype=torch.float64) * 0.5}
    return args, kwargs


def three(args):
    """The same arguments with q, k and v projected apart."""
    x, weight, bias, *proj = args
    return x, weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3), *proj


def in_dtype(args, kwargs, dtype):
    def convert(v):
        return tuple(map(convert, v)) if isinstance(v, tuple) else v.to(dtype) if isinstance(v, torch.Tensor) else v

    return [convert(a) for a in args], {k: convert(v) for k, v in kwargs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_matches_float64(tokens, backend, dtype):
    args, kwargs = arguments(2, tokens, 2, 40)
    check("self_attention", *args, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, *nasty.HEAD_DIMS])
def test_head_dims(head_dim, dtype):
    args, kwargs = arguments(2, 29, 3, head_dim, d=96)
    check("self_attention", *args, **kwargs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_norms(norm, dtype):
    (x, *rest), kwargs = arguments(2, 29, 3, 32, norm=norm)
    # Unnormed massive channels saturate the softmax, where bf16 means nothing.
    check("self_attention", x / 10, *rest, **kwargs, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_three_projections_are_the_packed_one(with_bias, dtype, backend):
    args, kwargs = in_dtype(*arguments(3, 50, 3, 32), dtype)
    if not with_bias:
        args[2] = None
    with ops.use_backend(backend):
        packed, apart = ops.self_attention(*args, **kwargs), ops.self_attention(*three(args), **kwargs)
    assert torch.equal(apart, packed)


def test_a_bias_on_some_of_three():
    args, kwargs = in_dtype(*arguments(2, 17, 2, 16), torch.float32)
    x, weights, (q, _, v), *proj = three(args)
    packed = torch.cat([q, torch.zeros_like(q), v])
    expected = ops.self_attention(args[0], args[1], packed, *proj, **kwargs)
    assert torch.equal(ops.self_attention(x, weights, (q, None, v), *proj, **kwargs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 21, 21), (1, 2, 21, 21), (3, 1, 1, 21), (21, 21)])
def test_bias_of_scores(shape, dtype):
    args, kwargs = arguments(3, 21, 2, 32)
    check("self_attention", *args, **kwargs, bias=nasty.vector(torch.Size(shape).numel()).view(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rope(prefix, interleaved, backend, dtype):
    args, kwargs = arguments(3, 21, 2, 20)
    rope = tuple(t.to(dtype) for t in angles(21 - prefix, 20))
    check("self_attention", *args, **kwargs, rope=rope, rope_interleaved=interleaved, dtype=dtype, backend=backend)


def angles(positions, head_dim):
    angle = nasty.tokens(positions, head_dim // 2, seed=7, massive=0)
    return tuple(torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))


@pytest.mark.parametrize("shape", [(3, 2, 21, 21), (21, 21)])
def test_rope_and_a_bias_of_scores(shape):
    args, kwargs = arguments(3, 21, 2, 32)
    bias = nasty.vector(torch.Size(shape).numel()).view(shape)
    rope = tuple(t.float() for t in angles(20, 32))
    check("self_attention", *args, **kwargs, bias=bias, rope=rope, dtype=torch.float32)


def test_rope_in_groups_of_samples():
    args, kwargs = arguments(45, 197, 4, 128, d=16)
    check("self_attention", *args, **kwargs, rope=tuple(t.float() for t in angles(192, 128)), dtype=torch.float32)


def test_more_samples_than_one_group():
    """Groups begin at samples: DropPath's factors and the bias of scores must follow."""
    args, kwargs = arguments(45, 197, 4, 128, d=16)
    bias = nasty.vector(45 * 197).view(45, 1, 1, 197)
    check("self_attention", *args, **kwargs, bias=bias, dtype=torch.float32)


def test_a_sample_too_large_for_scratch(monkeypatch):
    module = sys.modules["fastvit.ops.self_attention"]
    args, kwargs = in_dtype(*arguments(2, 29, 2, 32), torch.float32)
    expected = ops.self_attention(*args, **kwargs)
    monkeypatch.setattr(module, "MOST_SCRATCH", 4 * 29 * 64 * 4 - 1)
    monkeypatch.setattr(ops._backend.extension(), "self_attention", None)
    assert torch.equal(ops.self_attention(*args, **kwargs), expected)


@pytest.mark.parametrize("missing", ["qkv_bias", "proj_bias", "norm_weight", "norm_bias", "layer_scale", "drop_path"])
def test_optional_vectors(missing):
    args, kwargs = arguments(3, 5, 2, 24)
    if missing in kwargs:
        kwargs[missing] = None
    names = ("x", "w", "qkv_bias", "w", "proj_bias")
    args = [None if name == missing else a for name, a in zip(names, args, strict=True)]
    check("self_attention", *args, **kwargs, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
def test_strides(kind):
    (x, qkv, b, proj, pb), kwargs = arguments(2, 7, 2, 32)
    args = x, nasty.strided(qkv, kind), b, nasty.strided(proj, kind), pb
    check("self_attention", *args, **kwargs, dtype=torch.float32, layout=lambda t: nasty.strided(t, kind))


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16)])
def test_empty(shape):
    x, proj = torch.empty(shape), torch.zeros(16, 16, requires_grad=True)
    out = ops.self_attention(x, torch.zeros(48, 16), None, proj, None, num_heads=2)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(proj.grad, torch.zeros(16, 16))


@settings(deadline=None, max_examples=30)
@given(
    b=st.integers(1, 3),
    t=st.integers(1, 70),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 90),
    d=st.integers(2, 120),
    bf16=st.booleans(),
)
def test_any_shape(b, t, heads, head_dim, d, bf16):
    assume(b * t * d >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    assume(d >= 8 or not bf16)  # a norm over few channels leaves few different rows, whose errors don't average
    args, kwargs = arguments(b, t, heads, head_dim, d=d, vectors=False)
    check("self_attention", *args, **kwargs, dtype=torch.bfloat16 if bf16 else torch.float32)


def test_gradients():
    args, kwargs = arguments(2, 5, 2, 12)
    check_gradients("self_attention", *args, **kwargs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_with_rope(interleaved):
    """Those of the tables, too."""
    args, kwargs = in_dtype(*arguments(2, 5, 2, 12), torch.float64)

    def run(x, cos, sin):
        return ops.self_attention(x, *args[1:], **kwargs, rope=(cos, sin), rope_interleaved=interleaved)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (args[0], *angles(4, 12))])


def test_gradients_of_three_projections():
    args, kwargs = in_dtype(*arguments(2, 5, 2, 12), torch.float32)
    leaves = [t.clone().requires_grad_() for t in args]
    grads = torch.autograd.grad(ops.self_attention(*three(leaves), **kwargs).square().sum(), leaves)
    expected = torch.autograd.grad(ops.self_attention(*leaves, **kwargs).square().sum(), leaves)
    for actual, truth in zip(grads, expected, strict=True):
        assert_close(actual, truth)


def test_autocast_keeps_the_residual_wide():
    args, kwargs = in_dtype(*arguments(2, 9, 2, 48, vectors=False), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.self_attention(*args, **kwargs)
        with ops.use_backend("reference"):
            eager = ops.self_attention(*args, **kwargs)
    assert actual.dtype == eager.dtype == torch.float32
    double_args, double_kwargs = in_dtype(args, kwargs, torch.float64)
    truth = ops.self_attention(*double_args, **double_kwargs)
    assert_close(actual.bfloat16(), truth, eager=eager.bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, "x: shape"),
        ({"x": torch.zeros(2, 3, 9)}, ValueError, "x: shape"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.long)}, TypeError, "x: dtype"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.bfloat16)}, TypeError, "qkv_weight: dtype"),
        ({"num_heads": 5}, ValueError, "num_heads: 5"),
        ({"num_heads": 0}, ValueError, "num_heads: 0"),
        ({"num_heads": 16}, ValueError, "num_heads: 16"),
        ({"num_heads": 2.0}, TypeError, "num_heads: float"),
        ({"proj_weight": torch.zeros(())}, ValueError, "proj_weight: shape"),
        ({"qkv_weight": torch.zeros(8, 8)}, ValueError, r"qkv_weight: shape \(8, 8\).*accepted: \(24, 8\)"),
        ({"qkv_weight": (torch.zeros(24, 8),) * 3}, ValueError, r"q_weight: shape \(24, 8\).*accepted: \(8, 8\)"),
        ({"qkv_weight": (torch.zeros(8, 8),) * 2}, ValueError, "qkv_weight: 2 tensors"),
        ({"qkv_bias": (torch.zeros(8),) * 3}, ValueError, "qkv_bias: a tuple of three"),
        ({"qkv_bias": torch.zeros(5)}, ValueError, "qkv_bias: shape"),
        ({"proj_bias": torch.zeros(5)}, ValueError, "proj_bias: shape"),
        ({"norm": "batch"}, ValueError, "norm: 'batch'"),
        ({"bias": torch.zeros(4, 4)}, ValueError, "bias: shape"),
        ({"rope": (torch.zeros(4, 4), torch.zeros(4, 4))}, ValueError, r"rope: shapes .* P <= 3"),
        ({"rope": (torch.zeros(2, 6), torch.zeros(2, 6))}, ValueError, r"accepted: two of \(P, 4\)"),
        ({"rope": (torch.zeros(2, 4), None)}, TypeError, "rope: None for one"),
        ({"rope": torch.zeros(2, 4)}, TypeError, "rope: Tensor"),
        ({"layer_scale": torch.zeros(3)}, ValueError, "layer_scale: shape"),
        ({"drop_path": torch.zeros(3)}, ValueError, "drop_path: shape"),
        ({"proj_weight": torch.zeros(8, 8, device="meta")}, ValueError, "proj_weight: on meta"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"x": torch.zeros(2, 3, 8), "qkv_weight": torch.zeros(24, 8), "qkv_bias": None, "num_heads": 2}
    given |= {"proj_weight": torch.zeros(8, 8), "proj_bias": None, **change}
    with pytest.raises(error, match=message):
        ops.self_attention(**given)
