from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastvit import ops, reference
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close


def arguments(b, nq, h, d, nk=None):
    nk = nq if nk is None else nk
    return tuple(nasty.tokens(b, n, h, d, seed=i, massive=0) * 2.0 for i, n in enumerate((nq, nk, nk)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_token_counts(tokens, backend, dtype):
    check("attention", *arguments(2, tokens, 3, 64), dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", nasty.HEAD_DIMS)
def test_head_dims(head_dim, dtype):
    check("attention", *arguments(1, 50, 2, head_dim), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nq", "nk"), [(1, 196), (5, 577), (70, 3)])
def test_cross_attention(nq, nk, dtype):
    check("attention", *arguments(2, nq, 2, 72, nk), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequence(dtype):
    check("attention", *arguments(1, 1370, 1, 64), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 50, 50), (1, 3, 50, 50), (2, 1, 1, 50), (50, 50), (1,)])
def test_bias(shape, dtype):
    bias = torch.randn(shape, generator=nasty.generator(7), dtype=torch.float64)
    check("attention", *arguments(2, 50, 3, 32), bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_and_rows(dtype):
    bias = torch.zeros(2, 1, 50, 50, dtype=torch.float64)
    bias[0, :, :, 37:] = float("-inf")
    bias[1, :, 11] = float("-inf")
    out = check("attention", *arguments(2, 50, 3, 32), bias=bias, dtype=dtype)
    assert (out[1, 11] == 0).all()


def test_scale():
    check("attention", *arguments(1, 50, 2, 64), scale=0.3, dtype=torch.float32)


def test_logits_beyond_exp():
    # Scores of +-2000 overflow exp in float32 unless the row's maximum is taken off first.
    q, k, v = arguments(1, 50, 1, 64)
    check("attention", q * 40, k * 2, v, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_qkv_is_read_in_place(dtype):
    qkv = nasty.tokens(2, 197, 3 * 4 * 32, massive=0)
    out = check("attention_qkvpacked", qkv, 4, dtype=dtype)
    q, k, v = qkv.to(dtype).view(2, 197, 3, 4, 32).unbind(2)
    assert torch.equal(out, ops.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_first_layout(dtype):
    # (B, H, N, D) storage, as transformers makes it, seen as (B, N, H, D).
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments(2, 50, 3, 64))
    check("attention", q, k, v, dtype=dtype)


def test_last_dimension_with_a_stride():
    check("attention", *arguments(1, 9, 2, 32), dtype=torch.float32, layout=lambda t: nasty.strided(t, "transposed"))


def test_empty():
    q = torch.empty(0, 5, 2, 8)
    assert ops.attention(q, q, q).shape == (0, 5, 16)


@settings(deadline=None, max_examples=30)
@given(nq=st.integers(1, 80), nk=st.integers(1, 300), h=st.integers(1, 3), d=st.integers(1, 130), bf16=st.booleans())
def test_any_shape(nq, nk, h, d, bf16):
    assume(nq * h * d >= 16)  # fewer may cancel to nearly nothing, and relative error with them
    check("attention", *arguments(1, nq, h, d, nk), dtype=torch.bfloat16 if bf16 else torch.float32)


def test_gradients():
    bias = torch.randn(2, 1, 5, 7, generator=nasty.generator(7), dtype=torch.float64)
    check_gradients("attention", *arguments(2, 5, 2, 8, 7), bias=bias)


def test_autocast():
    q, k, v = (t.float() for t in arguments(2, 50, 3, 64))
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.attention(q, k, v)
    eager = reference.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert_close(actual, reference.attention(q.double(), k.double(), v.double()), eager=eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 24)}, ValueError, "q: shape"),
        ({"k": torch.zeros(2, 5, 3, 9)}, ValueError, "k: shape"),
        ({"v": torch.zeros(2, 6, 3, 8)}, ValueError, "v: shape"),
        ({"k": torch.zeros(2, 0, 3, 8), "v": torch.zeros(2, 0, 3, 8)}, ValueError, "no keys"),
        ({"bias": torch.zeros(2, 3, 5, 4)}, ValueError, "bias: shape"),
        ({"bias": torch.zeros(5, 5, dtype=torch.bool)}, TypeError, "bias: dtype"),
        ({"k": torch.zeros(2, 5, 3, 8).double()}, TypeError, "k: dtype"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {name: torch.zeros(2, 5, 3, 8) for name in "qkv"} | change
    with pytest.raises(error, match=message):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("num_heads", [0, 5])
def test_bad_packed_heads(num_heads):
    with pytest.raises(ValueError, match="num_heads"):
        ops.attention_qkvpacked(torch.zeros(1, 4, 24), num_heads)
