from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close

INF = float("inf")


def qkv(batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    q = nasty.tokens(batch, queries, heads, dim, massive=0)
    k = nasty.tokens(batch, keys, heads, dim, seed=1, massive=0)
    return plain.cast(dtype, q, k, nasty.tokens(batch, keys, heads, dim, seed=2))


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    return plain.attention(q, k, v, None if bias is None else bias.to(q.dtype), scale)


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dtype: torch.dtype, **options) -> None:
    scale = options.get("scale")
    truth = plain.attention(*plain.cast(torch.float64, q, k, v, bias), scale)
    actual = call.attention(q, k, v, bias, compute=dtype, **options)
    assert_close(actual, truth, eager=eager(q, k, v, bias, scale))


@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
def test_token_counts(isa: str, dtype: torch.dtype, tokens: int) -> None:
    check(*qkv(1, tokens, tokens, 2, 64, dtype), None, dtype)


@pytest.mark.parametrize("dim", [1, 5, 16, 33, *nasty.HEAD_DIMS])
def test_head_dims(isa: str, dtype: torch.dtype, dim: int) -> None:
    check(*qkv(2, 37, 50, 3, dim, dtype), None, dtype)


@pytest.mark.parametrize("queries,keys", [(1, 577), (577, 1), (7, 1031), (500, 16), (3, 2600), (70, 2600)])
def test_cross_attention_and_several_key_chunks(isa: str, dtype: torch.dtype, queries: int, keys: int) -> None:
    check(*qkv(1, queries, keys, 1, 128, dtype), None, dtype)


def test_packed_qkv_is_read_in_place(isa: str, dtype: torch.dtype) -> None:
    packed = nasty.tokens(2, 50, 3, 4, 40, massive=0).to(dtype)
    check(*packed.unbind(2), None, dtype)


def test_any_outer_strides(isa: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 21, 21, 3, 24, dtype)
    expected = call.attention(q, k, v, compute=dtype)
    by_head = [t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (q, k, v)]
    assert torch.equal(call.attention(*by_head, compute=dtype), expected)


@pytest.mark.parametrize("shape", [(2, 3, 19, 70), (1, 3, 19, 70), (2, 1, 1, 70), (1, 1, 19, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_broadcasts(isa: str, dtype: torch.dtype, shape: tuple[int, ...], bias_dtype: torch.dtype) -> None:
    bias = (2 * nasty.tokens(*shape, massive=0)).to(bias_dtype).expand(2, 3, 19, 70)
    check(*qkv(2, 19, 70, 3, 32, dtype), bias, dtype)


@pytest.mark.parametrize("keys", [5, 70, 2600])
def test_masks(isa: str, dtype: torch.dtype, keys: int) -> None:
    q, k, v = qkv(1, 9, keys, 2, 128, dtype)
    bias = torch.zeros(1, 2, 9, keys)
    bias[..., 1::2] = -INF  # half of the keys
    bias[:, :, 2] = -INF  # a row that attends to nothing
    bias[:, :, 3, : keys - 1] = -INF  # a row that attends to the last key alone
    check(q, k, v, bias, dtype)
    assert (call.attention(q, k, v, bias, compute=dtype)[:, 2] == 0).all()


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scales(isa: str, dtype: torch.dtype, scale: float) -> None:
    check(*qkv(1, 11, 23, 2, 16, dtype), None, dtype, scale=scale)


def test_large_logits_do_not_overflow(isa: str) -> None:
    q, k, v = qkv(1, 13, 50, 1, 32, torch.float32)
    check(q * 30, k * 30, v, None, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_thread_counts(isa: str, dtype: torch.dtype, threads: int) -> None:
    check(*qkv(1, 198, 198, 1, 48, dtype), None, dtype, threads=threads)


@pytest.mark.parametrize("in_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(isa: str, dtype: torch.dtype, in_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 21, 21, 2, 40, in_dtype)
    truth = plain.attention(*plain.cast(torch.float64, q, k, v))
    reference = plain.as_eager(eager(*plain.cast(dtype, q, k, v)), dtype, out_dtype)
    assert_close(call.attention(q, k, v, compute=dtype, out_dtype=out_dtype), truth, eager=reference)


@pytest.mark.parametrize("shape", [(0, 5, 5, 2, 8), (2, 0, 5, 2, 8), (2, 5, 5, 0, 8)])
def test_nothing_to_do(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = qkv(*shape, dtype)
    assert call.attention(q, k, v, compute=dtype).shape == q.shape


def test_no_keys_give_zeros(isa: str, dtype: torch.dtype) -> None:
    assert (call.attention(*qkv(2, 5, 0, 2, 8, dtype), compute=dtype) == 0).all()
