"""Products of few rows read the weight where it lies (csrc/cpu/few_rows.h); more rows, and it is packed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close

MOST = 16  # FewRows::kMost


@pytest.mark.parametrize("m", [*range(1, MOST + 2), 31])
def test_every_number_of_rows(isa: str, dtype: torch.dtype, m: int) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(m, 130), nasty.weight(75, 130), nasty.vector(75))
    truth = F.linear(*plain.cast(torch.float64, x, w, b))
    assert_close(call.norm_linear(x, w, b, compute=dtype), truth, eager=F.linear(x, w, b))


@pytest.mark.parametrize("m", [1, 2, 5, 12])
@pytest.mark.parametrize("hidden", [1, 16, 37, 64])
def test_gated_units(isa: str, dtype: torch.dtype, m: int, hidden: int) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(m, 50), nasty.weight(2 * hidden, 50), nasty.vector(2 * hidden))
    actual = call.norm_linear(x, w, b, activation="swiglu", compute=dtype)
    truth = plain.activated(F.linear(*plain.cast(torch.float64, x, w, b)), "swiglu")
    assert_close(actual, truth, eager=plain.activated(F.linear(x, w, b), "swiglu"))


@pytest.mark.parametrize("k", [1, 3, 16, 31, 64, 97, 129])
@pytest.mark.parametrize("n", [1, 17, 64, 70])
def test_nothing_beside_the_weight_is_read(isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    x, w = plain.cast(dtype, nasty.tokens(3, k), nasty.weight(n, k))
    room = call.blank(n + 2, k + 3, dtype=dtype)
    room[1:-1, 1 : k + 1] = w
    for m in (1, 2, 3):
        expected = call.norm_linear(x[:m], w, compute=dtype)
        assert torch.equal(call.norm_linear(x[:m], room[1:-1, 1 : k + 1], compute=dtype), expected)
        assert torch.isfinite(expected).all()


def test_rows_of_the_products_own_dtype(isa: str, dtype: torch.dtype) -> None:
    # linear_residual and the second half of mlp read such rows where they lie, and here copy them.
    room = call.blank(9, 110, dtype=dtype)
    room[:, 4:104] = nasty.tokens(9, 100)
    x, w, r = room[:, 4:104], nasty.weight(40, 100).to(dtype), nasty.tokens(9, 40, seed=5).to(dtype)
    for m in (1, 4, 9):
        truth = r[:m].double() + F.linear(x[:m].double(), w.double())
        assert_close(
            call.linear_residual(x[:m], w, None, r[:m], compute=dtype), truth, eager=r[:m] + F.linear(x[:m], w)
        )


def test_a_row_does_not_depend_on_its_threads_or_its_neighbours_values(isa: str, dtype: torch.dtype) -> None:
    x, w = plain.cast(dtype, nasty.tokens(7, 100), nasty.weight(150, 100))
    expected = call.norm_linear(x, w, compute=dtype, threads=1)
    assert all(torch.equal(call.norm_linear(x, w, compute=dtype, threads=n), expected) for n in (2, 3, 5))
    x[2] = float("nan")
    others = torch.arange(7) != 2
    actual = call.norm_linear(x, w, compute=dtype)
    assert torch.isnan(actual[2]).all()
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("k", [16, 88, 272])
def test_sums_of_integers_are_those_of_packed_weights(isa: str, dtype: torch.dtype, k: int, activation: str) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(MOST + 4, k), nasty.weight(74, k), nasty.vector(74))
    int8 = call.quantized(w)

    def rows(x: Tensor) -> Tensor:
        return call.norm_linear(x, int8, b, norm="layer", activation=activation, compute=dtype)

    packed = rows(x)
    for m in (*range(1, 8), MOST):
        assert torch.equal(rows(x[:m]), packed[:m])
