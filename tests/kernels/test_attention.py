from __future__ import annotations

import pytest
import torch
from fastvit.kernels.attention import attention
from torch import Tensor

from tests import nasty
from tests.tolerances import assert_close

BATCH, HEADS = 2, 2


def plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """The definition, in the arguments' dtype: float64 for the truth, lower for what eager PyTorch would make of it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(-1)
    if bias is not None:
        weights = weights.masked_fill(torch.isneginf(logits).all(-1, keepdim=True), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def qkv(n: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of a packed projection with massive channels in v and peaked logits."""
    packed = nasty.tokens(BATCH, n, 3, HEADS, head_dim, seed=seed, massive=0)
    packed[:, :, 0] *= 2.0
    packed[:, :, 2] = nasty.tokens(BATCH, n, HEADS, head_dim, seed=seed + 1)
    q, k, v = packed.to(dtype).unbind(2)
    return q, k, v


def check(device: torch.device, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    double = {name: o.double() if isinstance(o, Tensor) else o for name, o in options.items()}
    truth = plain(q.double(), k.double(), v.double(), **double)
    eager = plain(q, k, v, **{name: o.to(q.dtype) if isinstance(o, Tensor) else o for name, o in options.items()})
    options = {name: o.to(device) if isinstance(o, Tensor) else o for name, o in options.items()}
    result = attention(q.to(device), k.to(device), v.to(device), **options).cpu()
    assert result.dtype == q.dtype
    assert_close(result, truth, eager=eager)


@pytest.mark.parametrize("n", [1, 5, 50, 77, 197, 257, 299])
def test_token_counts(device: torch.device, n: int) -> None:
    check(device, *qkv(n, 64, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 50, 299])
def test_other_dtypes(device: torch.device, n: int, dtype: torch.dtype) -> None:
    check(device, *qkv(n, 64, dtype))


@pytest.mark.parametrize("n", [101, 210])
@pytest.mark.parametrize("head_dim", [8, 20, *(d for d in nasty.HEAD_DIMS if d != 64), 160])
def test_head_dims(device: torch.device, head_dim: int, n: int) -> None:
    check(device, *qkv(n, head_dim, torch.float16))


@pytest.mark.parametrize("head_dim", nasty.HEAD_DIMS)
def test_head_dims_in_float32(device: torch.device, head_dim: int) -> None:
    check(device, *qkv(37, head_dim, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("nq", "nk"), [(1, 197), (70, 50)])
def test_cross_attention(device: torch.device, nq: int, nk: int, dtype: torch.dtype) -> None:
    q, _, _ = qkv(nq, 72, dtype)
    _, k, v = qkv(nk, 72, dtype, seed=3)
    check(device, q, k, v)


@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float32), (50, torch.float16), (150, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", ["full", "heads", "keys", "rows"])
def test_bias(device: torch.device, shape: str, n: int, dtype: torch.dtype) -> None:
    sizes = {"full": (BATCH, HEADS, n, n), "heads": (HEADS, n, n), "keys": (BATCH, 1, 1, n), "rows": (n, 1)}
    bias = torch.randn(sizes[shape], generator=nasty.generator(5), dtype=torch.float64).float()
    check(device, *qkv(n, 40, dtype), bias=bias)


@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float32), (50, torch.float16), (150, torch.float16)], ids=str)
def test_masked_keys(device: torch.device, n: int, dtype: torch.dtype) -> None:
    """Padded keys, keys that are masked in a whole block before others count, and a row without any key."""
    bias = torch.zeros(BATCH, 1, n, n)
    bias[0, :, :, n // 3 :] = float("-inf")
    bias[1, :, :, : n - 2] = float("-inf")
    bias[1, :, 3] = float("-inf")
    q, k, v = qkv(n, 64, dtype)
    check(device, q, k, v, bias=bias)
    assert not attention(q.to(device), k.to(device), v.to(device), bias=bias.to(device))[1, 3].any()


@pytest.mark.parametrize("n", [50, 280])
@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(device: torch.device, scale: float, n: int) -> None:
    check(device, *qkv(n, 32, torch.float16), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_outermost(device: torch.device, dtype: torch.dtype) -> None:
    """(B, H, N, D) seen as (B, N, H, D)."""
    check(device, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(70, 36, dtype)))


def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    check(device, *(nasty.strided(t, "transposed") for t in qkv(20, 32, torch.float32)))


def test_large_logits(device: torch.device) -> None:
    """exp of the logits themselves would overflow."""
    q, k, v = qkv(197, 64, torch.float16)
    check(device, q * 30, k * 3, v)
