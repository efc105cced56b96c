from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels.norm import norm_backward, normalize
from torch import Tensor

from tests import nasty
from tests.kernels.gradients import assert_gradients, seed
from tests.tolerances import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, norm: str, add: bool = False) -> Tensor:
    size = x.shape[-1:]
    y = F.layer_norm(x, size, weight, bias, 1e-6) if norm == "layer" else F.rms_norm(x, size, weight, 1e-6)
    return y + x if add else y


def check(
    device: torch.device,
    x: Tensor,
    dtype: torch.dtype,
    *,
    norm: str = "layer",
    affine: bool = True,
    add: bool = False,
    layout: str = "contiguous",
) -> None:
    k = x.shape[-1]
    tensors = {
        "x": x.to(dtype),
        "weight": nasty.vector(k, 3, mean=1.0).to(dtype) if affine else None,
        "bias": nasty.vector(k, 4).to(dtype) if affine and norm == "layer" else None,
    }
    grad = seed(*x.shape).to(dtype)
    strided = nasty.strided(grad, layout).to(device)
    weight = None if tensors["weight"] is None else tensors["weight"].to(device)
    results = norm_backward(
        strided,
        nasty.strided(tensors["x"], layout).to(device),
        weight,
        norm,
        1e-6,
        add=strided if add else None,
        want_affine=affine,
    )
    actual = dict(zip(tensors, results, strict=True))
    assert actual["x"].dtype == dtype
    if norm == "rms":
        actual["bias"] = None
    assert_gradients(actual, plain, tensors, grad, norm=norm, add=add)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("k", [96, 384, 1408])
def test_backward(device: torch.device, k: int, norm: str, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(37, k), dtype, norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_backward_without_weight_and_with_the_residual(device: torch.device, norm: str) -> None:
    check(device, nasty.tokens(5, 200), torch.float32, norm=norm, affine=False)
    check(device, nasty.tokens(37, 72), torch.bfloat16, norm=norm, add=True)


def test_backward_where_the_mean_is_far_above_the_deviation(device: torch.device) -> None:
    # float32's own x - mean is worth 1e-5 at 99.
    for dtype, offset in ((torch.float32, 30.0), (torch.bfloat16, 99.0)):
        check(device, nasty.tokens(50, 192, offset=offset, massive=0), dtype)


def test_backward_of_rows_with_gaps(device: torch.device) -> None:
    check(device, nasty.tokens(37, 80), torch.float32, layout="sliced", add=True)


def test_backward_is_deterministic_and_gives_what_is_wanted(device: torch.device) -> None:
    x, grad, weight = nasty.tokens(200, 96).float(), seed(200, 96).float(), nasty.vector(96, 3).float()
    x, grad, weight = x.to(device), grad.to(device), weight.to(device)
    first, second = (norm_backward(grad, x, weight, "layer", 1e-6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    only_x = norm_backward(grad, x, weight, "layer", 1e-6, want_affine=False)
    only_affine = norm_backward(grad, x, weight, "layer", 1e-6, want_x=False)
    assert torch.equal(only_x[0], first[0]) and only_x[1] is None and only_x[2] is None
    assert only_affine[0] is None and torch.equal(only_affine[1], first[1]) and torch.equal(only_affine[2], first[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_normalize(device: torch.device, norm: str, dtype: torch.dtype) -> None:
    x = nasty.tokens(37, 100, offset=5.0).to(dtype)
    weight, bias = nasty.vector(100, 3, mean=1.0).to(dtype), nasty.vector(100, 4).to(dtype) if norm == "layer" else None
    double = None if bias is None else bias.double()
    on_device = None if bias is None else bias.to(device)
    result = normalize(x.to(device), weight.to(device), on_device, norm, 1e-6, dtype).cpu()
    truth = plain(x.double(), weight.double(), double, norm=norm)
    assert_close(result, truth, eager=plain(x, weight, bias, norm=norm))
