from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels.pool import pool
from torch import Tensor

from tests import nasty
from tests.tolerances import assert_close


def plain(
    x: Tensor,
    *,
    mode: str,
    num_prefix_tokens: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    def normed(t: Tensor) -> Tensor:
        if norm == "layer":
            return F.layer_norm(t, t.shape[-1:], norm_weight, norm_bias, eps)
        return F.rms_norm(t, t.shape[-1:], norm_weight, eps) if norm == "rms" else t

    if mode == "token":
        x = normed(x[:, 0])
    elif mode == "avg":
        x = normed(x[:, num_prefix_tokens:].mean(1))
    else:
        x = normed(x)[:, num_prefix_tokens:].mean(1)
    return x if weight is None else F.linear(x, weight, bias)


def check(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int] = (5, 21, 72),
    mode: str = "token",
    num_prefix_tokens: int = 1,
    norm: str = "layer",
    affine: bool = True,
    classes: int = 100,
    bias: bool = True,
    layout: str = "contiguous",
) -> None:
    x = nasty.strided(nasty.tokens(*shape, offset=3.0).to(dtype), layout)
    tensors = {
        "norm_weight": nasty.vector(shape[-1], 3, mean=1.0).to(dtype) if affine and norm != "none" else None,
        "norm_bias": nasty.vector(shape[-1], 4).to(dtype) if affine and norm == "layer" else None,
        "weight": nasty.weight(classes, shape[-1]).to(dtype) if classes else None,
        "bias": nasty.vector(classes).to(dtype) if classes and bias else None,
    }
    options = {"mode": mode, "num_prefix_tokens": num_prefix_tokens, "norm": norm, "eps": 1e-6}
    truth = plain(x.double(), **{n: None if t is None else t.double() for n, t in tensors.items()}, **options)
    eager = plain(x, **tensors, **options)
    moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    result = pool(x.to(device), **moved, **options).cpu()
    assert result.dtype == dtype
    assert_close(result, truth, eager=eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
def test_modes(device: torch.device, mode: str, norm: str, dtype: torch.dtype) -> None:
    check(device, dtype, mode=mode, norm=norm)


@pytest.mark.parametrize("mode", ["token", "avg", "norm_avg"])
@pytest.mark.parametrize("classes", [0, 130])
def test_with_and_without_a_head(device: torch.device, classes: int, mode: str) -> None:
    for dtype in (torch.float32, torch.float16):
        check(device, dtype, mode=mode, classes=classes, affine=False, bias=False)


@pytest.mark.parametrize("mode", ["avg", "norm_avg"])
@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (6, 5), (197, 1), (201, 5)])
def test_token_counts(device: torch.device, tokens: int, prefix: int, mode: str) -> None:
    check(device, torch.float32, shape=(2, tokens, 40), mode=mode, num_prefix_tokens=prefix)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strides(device: torch.device, layout: str) -> None:
    check(device, torch.float32, mode="norm_avg", layout=layout)


def test_mixed_dtypes(device: torch.device) -> None:
    """float32 tokens and a bfloat16 head, as under autocast: logits in bfloat16."""
    x, weight = nasty.tokens(2, 5, 64).float(), nasty.weight(10, 64).bfloat16()
    result = pool(x.to(device), weight=weight.to(device)).cpu()
    truth = F.linear(F.layer_norm(x.double()[:, 0], (64,), eps=1e-6), weight.double())
    eager = F.linear(F.layer_norm(x[:, 0], (64,), eps=1e-6).bfloat16(), weight)
    assert result.dtype == torch.bfloat16
    assert_close(result, truth, eager=eager)
