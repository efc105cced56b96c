"""csrc/cuda against float64: every path through each kernel, by width, alignment, dtype and stride."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import nasty
from tests.csrc.cuda.conftest import Kernels
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu")
# One warp a row with 1 .. 4 vectors a thread, a block of 128 and of 512, and the strided path: too wide, not whole.
NORM_WIDTHS = (8, 72, 384, 768, 1024, 1280, 3072, 4304, 16384, 16392, 20000, 5, 197, 1026)


def ids(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def norm(kernels: Kernels, x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor, kind: int = 1) -> Tensor:
    mean = torch.full((x.shape[0],), torch.nan, device=x.device)
    rstd = mean.clone()
    args = (out, x, weight, bias, mean, rstd)
    kernels.module.cuda_norm(*args, kind, 1e-6, kernels.stream)
    wide = x.double()
    true_mean = wide.mean(-1) * (kind == 1)
    assert_close(mean, true_mean)
    assert_close(rstd, ((wide - true_mean[:, None]).square().mean(-1) + 1e-6).rsqrt())
    return out


def true_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int) -> Tensor:
    if kind == 1:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    else:
        y = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    return y * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", [1, 2], ids=["layer", "rms"])
@pytest.mark.parametrize("width", NORM_WIDTHS)
def test_norm(kernels: Kernels, width: int, kind: int, dtype: torch.dtype) -> None:
    x = nasty.tokens(5, width, offset=3.0).to(dtype).to(kernels.device)
    weight = nasty.vector(width, 1, mean=1.0).to(dtype).to(kernels.device)
    bias = nasty.vector(width, 2).to(dtype).to(kernels.device)
    out = norm(kernels, x, weight, bias, torch.empty_like(x), kind)
    eager = true_norm(x.float(), weight.float(), bias.float(), kind).to(dtype)
    assert_close(out, true_norm(x.double(), weight.double(), bias.double(), kind), eager=eager)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("width", [192, 197])
def test_norm_of_mixed_dtypes_and_strides(kernels: Kernels, width: int, layout: str) -> None:
    """As under autocast: float32 in, float32 parameters, bfloat16 out; one parameter absent."""
    x = nasty.strided(nasty.tokens(7, width).float(), layout).to(kernels.device)
    weight = nasty.vector(width, 1, mean=1.0).float().to(kernels.device)
    out = norm(kernels, x, weight, None, torch.empty(7, width, dtype=torch.bfloat16, device=x.device))
    truth = true_norm(x.double(), weight.double(), None, 1)
    assert_close(out, truth, eager=truth.bfloat16())


def test_norm_statistics_survive_a_large_mean(kernels: Kernels) -> None:
    x = (nasty.tokens(4, 768, massive=0) + 100.0).float().to(kernels.device)
    out = norm(kernels, x, None, None, torch.empty_like(x))
    assert_close(out, true_norm(x.double(), None, None, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("width", [8, 72, 1368, 2730, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act(kernels: Kernels, activation: str, width: int, dtype: torch.dtype) -> None:
    wide = width * (2 if activation == "swiglu" else 1)
    x = (3.0 * torch.randn(50, wide)).to(dtype).to(kernels.device)
    bias = nasty.vector(wide).to(dtype).to(kernels.device)
    out = torch.empty(50, width, dtype=dtype, device=x.device)
    args = (out, x, bias)
    kernels.module.cuda_bias_act(*args, ACTIVATIONS.index(activation), kernels.stream)
    truth = gated_or_plain(x.double() + bias.double(), activation)
    assert_close(out, truth, eager=gated_or_plain(x.float() + bias.float(), activation).to(dtype))


def gated_or_plain(x: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * value
    return {
        "none": lambda t: t,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
        "silu": torch.nn.functional.silu,
        "relu": torch.nn.functional.relu,
    }[activation](x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_act_in_place_without_bias(kernels: Kernels, activation: str) -> None:
    x = torch.randn(9, 64, device=kernels.device)
    truth = gated_or_plain(x.double(), activation)
    out = x[:, : truth.shape[1]]
    kernels.module.cuda_bias_act(out, x, None, ACTIVATIONS.index(activation), kernels.stream)
    assert_close(out, truth)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:6])
def test_activations_at_the_ends(kernels: Kernels, activation: str) -> None:
    """Far values neither overflow nor turn into NaN, and NaN stays NaN."""
    x = torch.tensor([[-1e30, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 1e30]], device=kernels.device)
    out = torch.empty_like(x)
    index = ACTIVATIONS.index(activation)
    kernels.module.cuda_bias_act(out, x, None, index, kernels.stream)
    torch.testing.assert_close(out.double(), gated_or_plain(x.double(), activation), rtol=1e-6, atol=1e-6)
    x.fill_(torch.nan)
    kernels.module.cuda_bias_act(out, x, None, index, kernels.stream)
    assert out.isnan().all()


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("width", [8, 768, 1000, 197])
def test_bias_scale_residual(kernels: Kernels, width: int, dtype: torch.dtype, residual_dtype: torch.dtype) -> None:
    samples, tokens = 3, 5
    x = nasty.tokens(samples * tokens, width).to(dtype).to(kernels.device)
    bias, layer_scale = (nasty.vector(width, s).to(dtype).to(kernels.device) for s in (1, 2))
    residual = nasty.tokens(samples * tokens, width, seed=3).to(residual_dtype).to(kernels.device)
    row_scale = torch.tensor([0.0, 1.25, 1.25], device=kernels.device)
    wide = [t.double() for t in (residual, row_scale.repeat_interleave(tokens)[:, None], layer_scale, x, bias)]
    truth = wide[0] + wide[1] * wide[2] * (wide[3] + wide[4])
    args = (residual, x, bias, residual, layer_scale, row_scale)
    kernels.module.cuda_bias_scale_residual(*args, tokens, kernels.stream)
    assert_close(residual, truth, eager=truth.to(residual_dtype))


def test_bias_scale_residual_with_everything_absent(kernels: Kernels) -> None:
    x = nasty.strided(nasty.tokens(6, 40).float(), "sliced").to(kernels.device)
    residual = torch.randn(6, 40, device=kernels.device)
    out = torch.empty_like(residual)
    args = (out, x, None, residual, None, None)
    kernels.module.cuda_bias_scale_residual(*args, 1, kernels.stream)
    assert_close(out, x.double() + residual.double())


def test_no_rows(kernels: Kernels) -> None:
    x = torch.empty(0, 8, device=kernels.device)
    kernels.module.cuda_norm(x, x, None, None, None, None, 1, 1e-6, kernels.stream)
    kernels.module.cuda_bias_act(x, x, None, 1, kernels.stream)
    args = (x, x, None, x, None, None)
    kernels.module.cuda_bias_scale_residual(*args, 1, kernels.stream)


def test_half_precision_on_the_host_is_torchs(kernels: Kernels) -> None:
    """Every float16 comes back, and every rounding boundary rounds as torch rounds it."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    between = (half.double() * (1 + 2.0**-11)).float()
    for x in (half.float(), between, torch.tensor([65519.0, 65520.0, 1e-8, 2.0**-25, 6e-8])):
        x = x[~x.isnan()].reshape(1, -1).to(kernels.device)
        for dtype in (torch.float16, torch.bfloat16):
            out = torch.empty_like(x, dtype=dtype)
            kernels.module.cuda_bias_act(out, x, None, 0, kernels.stream)
            assert torch.equal(out, x.to(dtype))
            back = torch.empty_like(x)
            kernels.module.cuda_bias_act(back, out, None, 0, kernels.stream)
            assert torch.equal(back, out.float())
