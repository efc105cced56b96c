from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close


def make(samples: int, tokens: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    m = samples * tokens
    x, w, b = nasty.tokens(m, k), nasty.weight(n, k), nasty.vector(n)
    return plain.cast(dtype, x, w, b, nasty.tokens(m, n, seed=5), nasty.vector(n, 6))


def by_torch(x, w, b, residual, layer_scale, row_scale=None, tokens: int = 1) -> torch.Tensor:
    y = F.linear(x, w, b)
    y = y if layer_scale is None else y * layer_scale
    y = y if row_scale is None else y * row_scale.repeat_interleave(tokens)[:, None].to(y.dtype)
    return residual + y


@pytest.mark.parametrize("tokens", nasty.TOKEN_COUNTS)
@pytest.mark.parametrize("scales", ["none", "layer_scale", "both"])
def test_scales(isa: str, dtype: torch.dtype, tokens: int, scales: str) -> None:
    samples, n, k = 3 if tokens < 60 else 1, 72, 37
    x, w, b, r, gamma = make(samples, tokens, n, k, dtype)
    gamma = None if scales == "none" else gamma
    drop = torch.tensor([1.25, 0.0, 1.25])[:samples] if scales == "both" else None
    actual = call.linear_residual(x, w, b, r, gamma, drop, rows_per_sample=tokens, compute=dtype)
    truth = by_torch(*plain.cast(torch.float64, x, w, b, r, gamma, drop), tokens)
    assert_close(actual, truth, eager=by_torch(x, w, b, r, gamma, drop, tokens))


# Rows of 2,048 elements are whole pages apart, where a cache of few ways can't hold them side by side.
@pytest.mark.parametrize("n,k", [(1, 3), (37, 588), (588, 37), (72, 4304), (192, 2730), (40, 2048)])
def test_widths_in_place(isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    x, w, b, r, gamma = make(1, 23, n, k, dtype)
    truth = by_torch(*plain.cast(torch.float64, x, w, b, r, gamma))
    eager = by_torch(x, w, b, r, gamma)
    actual = call.linear_residual(x, w, b, r, gamma, out=r, compute=dtype)
    assert actual is r
    assert_close(r, truth, eager=eager)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(
    isa: str, dtype: torch.dtype, residual_dtype: torch.dtype, x_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    x, w, b, r, gamma = make(2, 9, 40, 50, torch.float32)
    x, r = x.to(x_dtype), r.to(residual_dtype)
    w, b, gamma = plain.cast(w_dtype, w, b, gamma)
    truth = by_torch(*plain.cast(torch.float64, x, w, b, r, gamma))
    eager = plain.as_eager(by_torch(*plain.cast(dtype, x, w, b), r, gamma.to(dtype)), dtype, residual_dtype)
    assert_close(call.linear_residual(x, w, b, r, gamma, compute=dtype), truth, eager=eager)


def test_strided_residual_and_output(isa: str, dtype: torch.dtype) -> None:
    x, w, b, r, gamma = make(1, 19, 70, 33, dtype)
    expected = call.linear_residual(x, w, b, r, gamma, compute=dtype)
    room = call.blank(19, 80, dtype=dtype)
    call.linear_residual(x, w, b, nasty.strided(r, "sliced"), gamma, out=room[:, :70], compute=dtype)
    assert torch.equal(room[:, :70], expected)
    assert torch.isnan(room[:, 70:]).all()


@pytest.mark.parametrize("k", [33, 64, 770])
@pytest.mark.parametrize("m", [1, 19, 40])
def test_strided_rows(isa: str, dtype: torch.dtype, m: int, k: int) -> None:
    # Rows of the product's dtype are read where they lie: nothing of what lies between them.
    x, w, b, r, gamma = make(1, m, 70, k, dtype)
    expected = call.linear_residual(x, w, b, r, gamma, compute=dtype)
    room = call.blank(m, k + 7, dtype=dtype)
    room[:, 3 : k + 3] = x
    assert torch.equal(call.linear_residual(room[:, 3 : k + 3], w, b, r, gamma, compute=dtype), expected)


def test_without_bias(isa: str) -> None:
    x, w, _, r, _ = make(1, 5, 24, 24, torch.float32)
    truth = by_torch(x.double(), w.double(), None, r.double(), None)
    assert_close(call.linear_residual(x, w, None, r), truth)


def test_no_rows(isa: str, dtype: torch.dtype) -> None:
    x, w, b, r, gamma = make(0, 5, 24, 24, dtype)
    assert call.linear_residual(x, w, b, r, gamma, compute=dtype).shape == (0, 24)
