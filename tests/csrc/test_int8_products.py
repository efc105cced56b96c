"""The product of integers is exact: whatever instructions a level has for it, only the scaling rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import nasty
from tests.csrc import call

# Three roundings of float32: the sum of integers becomes one, the scales of row and column are multiplied, and both.
ROUNDING = 4 * 2.0**-24


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = torch.full(x.shape, 99, dtype=torch.int8), call.blank(x.shape[0], dtype=torch.float32)
    call.kernels.quantize_rows(values, scale, x, 1)
    return values, scale


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, an int8 weight of the largest integers too, and its scales. k: a width that rotation need not pad."""
    weight = torch.randint(-127, 128, (n, k), generator=nasty.generator(1), dtype=torch.int8)
    weight[0], weight[-1] = 127, -127
    return nasty.tokens(m, k).float(), weight, torch.rand(n, generator=nasty.generator(2)) + 0.5


def product(x: Tensor, weight: Tensor, scale: Tensor, activation: str = "none", threads: int = 1) -> Tensor:
    out = call.blank(x.shape[0], weight.shape[0] // (2 if activation == "swiglu" else 1), dtype=torch.float32)
    codes = (call.NORMS.index("none"), 1e-6, call.ACTIVATIONS.index(activation), call.compute_code(x.dtype), threads)
    call.kernels.norm_linear(out, x, weight, scale, None, None, None, *codes)
    return out


def exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    values, row_scale = quantized(x)
    return (values.double() @ weight.double().T) * row_scale.double()[:, None] * scale.double()


@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 1, 16),
        (6, 64, 64),
        (7, 65, 48),
        (19, 65, 48),
        (31, 17, 272),
        (33, 49, 16),
        (38, 130, 176),
        (16, 24, 256),
    ],
)
def test_products_are_exact(isa: str, m: int, n: int, k: int) -> None:
    tensors = operands(m, n, k)
    torch.testing.assert_close(product(*tensors).double(), exact(*tensors), rtol=ROUNDING, atol=0.0)


def test_sums_of_several_chunks_of_k_stay_exact(isa: str) -> None:
    tensors = operands(35, 33, 14_848)  # a panel of so many rows fills any L2
    torch.testing.assert_close(product(*tensors).double(), exact(*tensors), rtol=ROUNDING, atol=0.0)


@pytest.mark.parametrize("hidden", [5, 40])
@pytest.mark.parametrize("m", [4, 39])
def test_gated_panels(isa: str, m: int, hidden: int) -> None:
    tensors = operands(m, 2 * hidden, 80)
    gate, value = exact(*tensors).chunk(2, dim=1)
    actual = product(*tensors, activation="swiglu").double()
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate) * value, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing(isa: str) -> None:
    tensors = operands(150, 70, 64)
    expected = product(*tensors)
    assert all(torch.equal(product(*tensors, threads=threads), expected) for threads in (2, 3))
