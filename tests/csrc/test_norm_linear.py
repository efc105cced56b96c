from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close


def check(m: int, n: int, k: int, dtype: torch.dtype, activation: str = "none", norm: str = "layer", **options) -> None:
    x, w, b = nasty.tokens(m, k, offset=0.5), nasty.weight(n, k), nasty.vector(n)
    g, s = (None, None) if norm == "none" else (nasty.vector(k, 3, mean=1.0), nasty.vector(k, 4))
    x, w, b, g, s = plain.cast(dtype, x, w, b, g, s)
    actual = call.norm_linear(
        x, w, b, norm=norm, norm_weight=g, norm_bias=s, activation=activation, compute=dtype, **options
    )

    def by_torch(precision: torch.dtype) -> torch.Tensor:
        xx, ww, bb, gg, ss = plain.cast(precision, x, w, b, g, s)
        return plain.activated(F.linear(plain.normed(xx, norm, gg, ss), ww, bb), activation)

    assert_close(actual, by_torch(torch.float64), eager=by_torch(dtype))


@pytest.mark.parametrize("norm", call.NORMS)
@pytest.mark.parametrize("activation", call.ACTIVATIONS)
def test_every_norm_and_activation(isa: str, dtype: torch.dtype, norm: str, activation: str) -> None:
    check(50, 74, 72, dtype, activation, norm)


@pytest.mark.parametrize("m", nasty.TOKEN_COUNTS)
def test_token_counts(isa: str, dtype: torch.dtype, m: int) -> None:
    check(m, 72, 37, dtype)


@pytest.mark.parametrize("n,k", [(1, 1), (37, 588), (588, 37), (64, 64), (72, 2730), (192, 4304), (130, 3420)])
def test_widths(isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    check(23, n, k, dtype)


def test_long_rows(isa: str, dtype: torch.dtype) -> None:
    # By AMX tiles the chunks of k come first here: several, of several sets of rows.
    check(700, 40, 2600, dtype)


@pytest.mark.parametrize("hidden", [1, 16, 37, 96, 100])
def test_swiglu_widths(isa: str, dtype: torch.dtype, hidden: int) -> None:
    check(77, 2 * hidden, 65, dtype, "swiglu")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_counts(isa: str, dtype: torch.dtype, threads: int) -> None:
    check(201, 200, 100, dtype, threads=threads)


def test_rows_beyond_one_block(isa: str) -> None:
    # 12,000 rows of 1,000 f32 do not fit the row buffer: several blocks, and the weights packed again for each.
    check(12_000, 17, 1000, torch.float32)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(
    isa: str, dtype: torch.dtype, x_dtype: torch.dtype, w_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x, w, b = nasty.tokens(50, 100).to(x_dtype), nasty.weight(72, 100).to(w_dtype), nasty.vector(72).to(w_dtype)
    g, s = nasty.vector(100, 3, mean=1.0).to(w_dtype), nasty.vector(100, 4).to(w_dtype)
    options = {"norm": "layer", "norm_weight": g, "norm_bias": s}
    actual = call.norm_linear(x, w, b, compute=dtype, out_dtype=out_dtype, **options)

    def by_torch(norm: torch.dtype, product: torch.dtype) -> torch.Tensor:
        (xx, gg, ss), (ww, bb) = plain.cast(norm, x, g, s), plain.cast(product, w, b)
        return F.linear(plain.normed(xx, "layer", gg, ss).to(product), ww, bb)

    eager = plain.as_eager(by_torch(torch.float32, dtype), dtype, out_dtype)
    assert_close(actual, by_torch(torch.float64, torch.float64), eager=eager)


@pytest.mark.parametrize("kind", ["contiguous", "sliced"])
def test_row_strides(isa: str, dtype: torch.dtype, kind: str) -> None:
    x, w = nasty.tokens(19, 70).to(dtype), nasty.weight(33, 70).to(dtype)
    expected = call.norm_linear(x, w, norm="layer", compute=dtype)
    assert torch.equal(call.norm_linear(nasty.strided(x, kind), w, norm="layer", compute=dtype), expected)


@pytest.mark.parametrize("offset", [100.0, 3000.0])
def test_mean_far_above_the_deviation(isa: str, offset: float) -> None:
    x = (nasty.tokens(20, 768, massive=0) + offset).float()
    w = nasty.weight(48, 768).float()
    truth = F.linear(F.layer_norm(x.double(), (768,), eps=1e-6), w.double())
    assert_close(call.norm_linear(x, w, norm="layer"), truth)


@pytest.mark.parametrize("activation", call.ACTIVATIONS[1:6])
def test_activations_over_their_whole_range(isa: str, activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -200.0, -0.0, 200.0, 1e4])])[:, None]
    y = call.norm_linear(x, torch.ones(1, 1), activation=activation)
    truth = plain.activated(x.double(), activation)
    # An absolute error below 2e-7 |x|: the tails go to zero and to x.
    assert ((y - truth).abs() <= 2e-7 * x.double().abs().clamp(min=1e-3)).all()
    # What bfloat16 asks for is a hundredth of its rounding.
    x = x.bfloat16()
    y = call.norm_linear(x, torch.ones(1, 1), activation=activation, compute=torch.bfloat16, out_dtype=torch.float32)
    truth = plain.activated(x.double(), activation)
    assert ((y - truth).abs() <= 2e-5 * x.double().abs().clamp(min=1e-3)).all()


def test_no_rows(isa: str, dtype: torch.dtype) -> None:
    assert call.norm_linear(torch.empty(0, 8, dtype=dtype), torch.ones(4, 8), compute=dtype).shape == (0, 4)


def test_nan_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    x, w = nasty.tokens(18, 40).to(dtype), nasty.weight(20, 40).to(dtype)
    clean = call.norm_linear(x, w, norm="layer", compute=dtype)
    x[3, 7] = float("nan")
    y = call.norm_linear(x, w, norm="layer", compute=dtype)
    assert torch.isnan(y[3]).all()
    rest = torch.arange(18) != 3
    assert torch.equal(y[rest], clean[rest])
