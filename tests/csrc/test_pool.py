from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close


def by_torch(x: Tensor, mode: str, prefix: int, norm: str, g, s, w, b) -> Tensor:
    if mode == "token":
        y = plain.normed(x[:, 0], norm, g, s)
    elif mode == "avg":
        y = plain.normed(x[:, prefix:].mean(1), norm, g, s)
    else:
        y = plain.normed(x, norm, g, s)[:, prefix:].mean(1)
    return y if w is None else F.linear(y, w, b)


def check(shape: tuple[int, int, int], dtype: torch.dtype, mode: str, classes: int, norm: str, **options) -> None:
    dim = shape[-1]
    x, g, s = nasty.tokens(*shape, offset=0.3), nasty.vector(dim, 3, mean=1.0), nasty.vector(dim, 4)
    w, b = (nasty.weight(classes, dim), nasty.vector(classes)) if classes else (None, None)
    x, g, s, w, b = plain.cast(dtype, x, g, s, w, b)
    prefix = options.setdefault("num_prefix_tokens", 1)
    actual = call.pool(x, mode=mode, norm=norm, norm_weight=g, norm_bias=s, weight=w, bias=b, compute=dtype, **options)
    xx, *rest = plain.cast(torch.float64, x, g, s, w, b)
    truth = by_torch(xx, mode, prefix, norm, *rest)
    assert_close(actual, truth, eager=by_torch(x, mode, prefix, norm, g, s, w, b))


@pytest.mark.parametrize("mode", call.MODES)
@pytest.mark.parametrize("norm", call.NORMS)
@pytest.mark.parametrize("classes", [0, 1, 37])
def test_modes(isa: str, dtype: torch.dtype, mode: str, norm: str, classes: int) -> None:
    check((3, 50, 72), dtype, mode, classes, norm, num_prefix_tokens=5)


@pytest.mark.parametrize("batch", [1, 2, 9, 19])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_threads(isa: str, dtype: torch.dtype, batch: int, threads: int) -> None:
    check((batch, 17, 100), dtype, "norm_avg", 130, "layer", threads=threads)


def test_one_token(isa: str, dtype: torch.dtype) -> None:
    check((2, 1, 33), dtype, "avg", 5, "layer", num_prefix_tokens=0)


def test_strided_tokens(isa: str, dtype: torch.dtype) -> None:
    x = nasty.tokens(3, 11, 40).to(dtype)
    for mode in call.MODES:
        expected = call.pool(x, mode=mode, compute=dtype)
        assert torch.equal(call.pool(nasty.strided(x, "sliced"), mode=mode, compute=dtype), expected)


def test_no_samples(isa: str, dtype: torch.dtype) -> None:
    x = torch.empty(0, 5, 8, dtype=dtype)
    assert call.pool(x, mode="avg", weight=torch.ones(3, 8), compute=dtype).shape == (0, 3)
