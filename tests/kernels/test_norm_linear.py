from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import choices
from fastvit.kernels import norm_linear as kernel
from fastvit.kernels.launch import record
from fastvit.kernels.norm_linear import norm_linear, norm_linear_backward
from torch import Tensor

from tests import nasty
from tests.kernels.conftest import run_as
from tests.kernels.gradients import assert_gradients, seed
from tests.tolerances import FLOAT32, assert_close, relative_l2

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": F.silu,
    "relu": F.relu,
    "swiglu": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
}


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    size = x.shape[-1:]
    if norm == "layer":
        x = F.layer_norm(x, size, norm_weight, norm_bias, eps)
    elif norm == "rms":
        x = F.rms_norm(x, size, norm_weight, eps)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def check(
    device: torch.device,
    x: Tensor,
    features: int,
    dtype: torch.dtype,
    *,
    norm: str = "layer",
    activation: str = "none",
    affine: bool = True,
    bias: bool = True,
    layout: str = "contiguous",
) -> None:
    k = x.shape[-1]
    x = nasty.strided(x.to(dtype), layout)
    weight = nasty.weight(2 * features if activation == "swiglu" else features, k).to(dtype)
    arguments = {
        "bias": nasty.vector(weight.shape[0]) if bias else None,
        "norm_weight": nasty.vector(k, 3, mean=1.0) if affine and norm != "none" else None,
        "norm_bias": nasty.vector(k, 4) if affine and norm == "layer" else None,
    }
    arguments = {name: None if t is None else t.to(dtype) for name, t in arguments.items()}
    options = {"norm": norm, "eps": 1e-5, "activation": activation}
    truth = plain(
        x.double(), weight.double(), **{n: None if t is None else t.double() for n, t in arguments.items()}, **options
    )
    eager = plain(x, weight, **arguments, **options)
    moved = {name: None if t is None else t.to(device) for name, t in arguments.items()}
    result = norm_linear(x.to(device), weight.to(device), **moved, **options).cpu()
    assert result.dtype == dtype
    assert_close(result, truth, eager=eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_norms(device: torch.device, norm: str, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(2, 5, 96), 40, dtype, norm=norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device: torch.device, activation: str, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(70, 64), 72, dtype, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_absent_vectors(device: torch.device, bias: bool, affine: bool, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(5, 64), 24, dtype, affine=affine, bias=bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [10.0, 99.0])
def test_mean_far_above_deviation(device: torch.device, offset: float, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(50, 192, offset=offset, massive=0), 64, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "features"), [(2730, 33), (588, 130), (30, 300)])
def test_odd_widths(device: torch.device, k: int, features: int, dtype: torch.dtype) -> None:
    check(device, nasty.tokens(3, k), features, dtype, activation="swiglu")


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strides(device: torch.device, layout: str) -> None:
    check(device, nasty.tokens(2, 10, 80), 32, torch.float32, layout=layout)


def test_every_tile_of_the_table(device: torch.device) -> None:
    """Rows enough for each tile; few columns, as the interpreter is slow."""
    for m in (2049, 16385):
        check(device, nasty.tokens(m, 32), 40, torch.float16, norm="none", activation="gelu")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(device: torch.device, weight_dtype: torch.dtype) -> None:
    """As under autocast: x is normalised in its own dtype, then products run in the narrower one."""
    low = torch.bfloat16
    x = nasty.tokens(20, 96, offset=50.0)
    x = x.to(torch.float32 if weight_dtype == low else low)
    weight, bias = nasty.weight(48, 96).to(weight_dtype), nasty.vector(48).to(weight_dtype)
    gamma, beta = nasty.vector(96, 3, mean=1.0).float(), nasty.vector(96, 4).float()
    options = {"norm": "layer", "eps": 1e-6, "activation": "gelu"}
    truth = plain(
        x.double(), weight.double(), bias.double(), norm_weight=gamma.double(), norm_bias=beta.double(), **options
    )
    normed = F.layer_norm(x.float(), (96,), gamma, beta, 1e-6).to(low)
    eager = F.gelu(F.linear(normed, weight.to(low), bias.to(low)))
    result = norm_linear(
        x.to(device),
        weight.to(device),
        bias.to(device),
        norm_weight=gamma.to(device),
        norm_bias=beta.to(device),
        **options,
    )
    assert result.dtype == low
    assert_close(result.cpu(), truth, eager=eager)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "swiglu"])
def test_activation_everywhere(device: torch.device, activation: str) -> None:
    """The whole range of an activation, tails included: exact in float32, to a tenth of its rounding in 16 bits."""
    y = torch.cat([torch.linspace(-12, 12, 1201), torch.tensor([-1000.0, -50.0, 50.0, 1000.0])])
    one = torch.ones(1, 1)
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 6e-5)):
        x = y.to(dtype)[:, None]
        result = norm_linear(x.to(device), one.to(dtype).to(device), norm="none", activation=activation).cpu()
        truth = ACTIVATIONS[activation](x.double())
        rounding = (truth.to(dtype).double() - truth).abs()
        assert ((result.double() - truth).abs() <= limit + 2 * rounding + 2e-7 * truth.abs()).all()


def test_float32_follows_torch_matmul_precision(device: torch.device) -> None:
    x, weight = nasty.tokens(20, 96).float(), nasty.weight(48, 96).float()
    truth = F.linear(x.double(), weight.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        result = norm_linear(x.to(device), weight.to(device), norm="none").cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    # The interpreter has no tf32: there the other tile must still be right.
    assert relative_l2(result, truth) <= (1e-3 if device.type == "cuda" else FLOAT32)


@pytest.fixture(params=["folded", "persistent", "persistent of sm100", "cublas"])
def schedule(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every product in the test that can runs by this schedule, however few its rows."""
    name, _, on = request.param.partition(" of ")
    if on:
        run_as(on, kernel, device, monkeypatch)
    with choices.force(name):
        yield name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by(device: torch.device, schedule: str, activation: str) -> None:
    check(device, nasty.tokens(150, 96), 72, torch.bfloat16, activation=activation)


@pytest.mark.parametrize("offset", [10.0, 99.0])
def test_mean_far_above_deviation_by(device: torch.device, schedule: str, offset: float) -> None:
    """Folded, the mean cancels because the sums are those of the rounded weight."""
    check(device, nasty.tokens(70, 192, offset=offset, massive=0), 64, torch.bfloat16)


def test_variants_by(device: torch.device, schedule: str) -> None:
    check(device, nasty.tokens(3, 30, 96), 136, torch.bfloat16, norm="rms", activation="gelu")
    check(device, nasty.tokens(70, 64), 24, torch.bfloat16, affine=False, bias=False)
    check(device, nasty.tokens(70, 98), 33, torch.bfloat16, activation="swiglu")  # no multiple of 16 bytes
    check(device, nasty.tokens(70, 80), 32, torch.bfloat16, layout="sliced")
    check(device, nasty.tokens(50, 64), 40, torch.float32, activation="gelu")  # not folded, but cuBLAS may run it
    check(device, nasty.tokens(50, 64), 40, torch.float16, norm="none")


def test_a_changed_parameter_is_seen_by(device: torch.device, schedule: str) -> None:
    """Nothing derived from a weight is kept."""
    x, weight, gamma = nasty.tokens(70, 64).bfloat16(), nasty.weight(48, 64).bfloat16(), nasty.vector(64, 3, mean=1.0)
    x, weight, gamma = (t.to(device) for t in (x, weight, gamma.bfloat16()))
    before = norm_linear(x, weight, norm_weight=gamma)
    weight.data.neg_()
    gamma.data.mul_(2.0)
    assert torch.equal(norm_linear(x, weight, norm_weight=gamma), -2 * before)


def test_which_schedule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows where nothing was measured, by what was measured where that can run."""

    def chosen(
        m: int, k: int, dtype: torch.dtype, *, stride: int | None = None, norm: str = "layer", on: str = "sm90"
    ) -> str:
        x = torch.empty_strided((m, k), (stride or k, 1), dtype=dtype, device="meta")
        with record(on):
            return kernel._schedule(x, torch.empty(64, k, dtype=dtype, device="meta"), norm, "gelu", False)

    low = torch.bfloat16
    monkeypatch.setattr(choices, "table", dict)
    assert [chosen(m, 768, low) for m in (197, 6304, 50432)] == ["normalising", "folded", "persistent"]
    assert chosen(50432, 588, low) == chosen(50432, 768, low, stride=770) == "folded"
    assert chosen(50432, 768, torch.float16) == chosen(50432, 768, torch.float32) == "normalising"
    assert chosen(50432, 768, low, norm="none") == "normalising"
    assert [chosen(50432, 768, low, on=on) for on in ("sm80", "sm100", "gfx942")] == ["folded", "persistent", "folded"]

    name = choices.key("norm_linear", low, "layer gelu", 64, 768)
    monkeypatch.setattr(choices, "table", lambda: {"sm90": {name: {"16": "cublas", "8": "persistent"}}})
    assert [chosen(m, 768, low) for m in (197, 6304, 40000, 50432)] == ["persistent", "folded", "cublas", "cublas"]
    assert chosen(197, 768, low, stride=770) == "normalising"
    assert chosen(50432, 760, low) == "persistent"


NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias")


def check_backward(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (2, 37, 64),
    features: int = 72,
    norm: str = "layer",
    activation: str = "none",
    without: tuple[str, ...] = (),
    needs: tuple[str, ...] = NAMES,
) -> None:
    k = shape[-1]
    tensors = {
        "x": nasty.tokens(*shape),
        "weight": nasty.weight(2 * features if activation == "swiglu" else features, k),
        "bias": nasty.vector(2 * features if activation == "swiglu" else features),
        "norm_weight": None if norm == "none" else nasty.vector(k, 3, mean=1.0),
        "norm_bias": nasty.vector(k, 4) if norm == "layer" else None,
    }
    tensors = {name: None if t is None or name in without else t.to(dtype) for name, t in tensors.items()}
    grad = seed(*shape[:-1], features).to(dtype)
    options = {"norm": norm, "eps": 1e-5, "activation": activation}
    moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    wanted = [name in needs and tensors[name] is not None for name in NAMES]
    results = norm_linear_backward(grad.to(device), **moved, **options, needs=wanted)
    actual = {name: g if want else None for name, g, want in zip(NAMES, results, wanted, strict=True)}
    assert all((actual[name] is not None) == want for name, want in zip(NAMES, wanted, strict=True))
    assert_gradients(actual, plain, tensors, grad, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_of_activations(device: torch.device, activation: str, dtype: torch.dtype) -> None:
    check_backward(device, dtype, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_backward_of_norms(device: torch.device, norm: str, dtype: torch.dtype) -> None:
    check_backward(device, dtype, norm=norm, shape=(50, 97), features=33)
    check_backward(device, dtype, norm=norm, activation="gelu", shape=(5, 96))


def test_backward_gives_what_is_needed(device: torch.device) -> None:
    for name in NAMES:
        check_backward(device, torch.float32, needs=(name,), activation="gelu")
        check_backward(device, torch.float32, needs=(name,))
    check_backward(device, torch.float32, without=("bias", "norm_weight", "norm_bias"), activation="swiglu")


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in ("none", "swiglu")])
def test_derivative_everywhere(device: torch.device, activation: str) -> None:
    """The whole range of a derivative, tails included; in float32 its cancellation costs eager as much."""
    y = torch.cat([torch.linspace(-12, 12, 1200), torch.tensor([-1000.0, -50.0, 50.0, 1000.0])])[:, None]
    one = torch.ones(1, 1)
    for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 3e-4)):
        x, weight, grad = y.to(dtype), one.to(dtype), torch.ones_like(y).to(dtype)
        options = {"norm": "none", "norm_weight": None, "norm_bias": None, "eps": 0.0, "activation": activation}
        result = norm_linear_backward(
            grad.to(device),
            x.to(device),
            weight.to(device),
            None,
            **options,
            needs=(True, False, False, False, False),
        )[0].cpu()
        leaf = x.double().requires_grad_()
        truth = torch.autograd.grad(ACTIVATIONS[activation](leaf).sum(), leaf)[0]
        rounding = (truth.to(dtype).double() - truth).abs()
        assert ((result.double() - truth).abs() <= limit + 2 * rounding + 2e-7 * truth.abs()).all()
