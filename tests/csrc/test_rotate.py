from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit.reference.ops import rotate
from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close


def tables(positions: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin that belong to no angle: each is used by itself.  Halves of one tensor, as timm has them."""
    cos, sin = nasty.tokens(positions, 2 * dim, seed=3, massive=0).to(dtype).chunk(2, -1)
    return cos, sin


def check(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, threads: int = 2) -> None:
    truth = rotate(*plain.cast(torch.float64, x, cos, sin), interleaved=interleaved)
    # What no position turns keeps its bits.
    prefix = x[:, : x.shape[1] - cos.shape[0]].clone()
    eager = rotate(x, cos, sin, interleaved=interleaved)
    call.rotate(x, cos, sin, interleaved, threads=threads)
    assert_close(x, truth, eager=eager)
    assert torch.equal(x[:, : prefix.shape[1]], prefix)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 10, 34, *nasty.HEAD_DIMS])
def test_head_dims(isa: str, dtype: torch.dtype, dim: int, interleaved: bool) -> None:
    check(nasty.tokens(2, 9, 3, dim, massive=0).to(dtype), *tables(9, dim, dtype), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5, 21])
def test_prefix_tokens_stay(isa: str, dtype: torch.dtype, prefix: int, interleaved: bool) -> None:
    check(nasty.tokens(3, 21, 2, 40, massive=0).to(dtype), *tables(21 - prefix, 40, dtype), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [20, 64])
def test_nothing_beside_is_touched(isa: str, dtype: torch.dtype, dim: int, interleaved: bool) -> None:
    """q and k of a packed qkv, as tokens and as heads lie there; v stays."""
    packed = nasty.tokens(2, 13, 3, 2, dim, massive=0).to(dtype)
    values = packed[:, :, 2].clone()
    check(packed.flatten(2, 3)[:, :, :4], *tables(12, dim, dtype), interleaved)
    assert torch.equal(packed[:, :, 2], values)
    wide = torch.full((2, 13, 2, dim + 3), float("nan"), dtype=dtype)
    wide[..., :dim] = nasty.tokens(2, 13, 2, dim, massive=0).to(dtype)
    check(wide[..., :dim], *tables(12, dim, dtype), interleaved)
    assert wide[..., dim:].isnan().all()


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_tables_of_another_dtype(isa: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    check(nasty.tokens(2, 9, 2, 24, massive=0).to(dtype), *tables(8, 24, table_dtype), False)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_thread_counts(isa: str, dtype: torch.dtype, threads: int) -> None:
    check(nasty.tokens(1, 198, 3, 32, massive=0).to(dtype), *tables(197, 32, dtype), False, threads)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 5, 0, 8)])
def test_nothing_to_do(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    call.rotate(torch.empty(shape, dtype=dtype), *tables(4, 8, dtype), False)
