from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fastvit.kernels import choices
from fastvit.kernels import mlp as kernel
from fastvit.kernels.launch import record
from fastvit.kernels.mlp import mlp, mlp_backward
from torch import Tensor

from fastvit import ops, reference
from tests import nasty
from tests.kernels.gradients import assert_gradients, seed
from tests.tolerances import assert_close

NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias", "layer_scale")


def check(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (3, 23, 64),
    hidden: int = 136,
    norm: str = "layer",
    activation: str = "gelu",
    without: tuple[str, ...] = (),
    needs: tuple[str, ...] = NAMES,
) -> None:
    d = shape[-1]
    wide = 2 * hidden if activation == "swiglu" else hidden
    tensors = {
        "x": nasty.tokens(*shape),
        "fc1_weight": nasty.weight(wide, d),
        "fc1_bias": nasty.vector(wide),
        "fc2_weight": nasty.weight(d, hidden, seed=5),
        "fc2_bias": nasty.vector(d, 6),
        "norm_weight": None if norm == "none" else nasty.vector(d, 3, mean=1.0),
        "norm_bias": nasty.vector(d, 4) if norm == "layer" else None,
        "layer_scale": nasty.vector(d, 7),
    }
    tensors = {name: None if t is None or name in without else t.to(dtype) for name, t in tensors.items()}
    drop_path = None if "drop_path" in without else torch.tensor([0.0, 1.25, 1.25])[: shape[0]].to(dtype)
    options = {"norm": norm, "eps": 1e-6, "activation": activation}
    moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    factors = None if drop_path is None else drop_path.to(device)
    pre = torch.empty(math.prod(shape[:-1]), wide, dtype=dtype, device=device)
    result = mlp(**moved, **options, drop_path=factors, pre=pre)
    plain = {name: None if t is None else t.double() for name, t in tensors.items()}
    double = None if drop_path is None else drop_path.double()
    truth = reference.mlp(**plain, **options, drop_path=double)
    assert_close(result.cpu(), truth, eager=reference.mlp(**tensors, **options, drop_path=drop_path))

    grad = seed(*shape).to(dtype)
    wanted = [name in needs and tensors[name] is not None for name in NAMES]
    del moved["fc1_bias"]
    results = mlp_backward(grad.to(device), pre, **moved, **options, drop_path=factors, needs=wanted)
    actual = {name: g if want else None for name, g, want in zip(NAMES, results, wanted, strict=True)}
    assert all((actual[name] is not None) == want for name, want in zip(NAMES, wanted, strict=True))
    assert_gradients(actual, reference_mlp, tensors, grad, **options, drop_path=drop_path)


def reference_mlp(*, drop_path: Tensor | None, **arguments: Tensor | None) -> Tensor:
    x = arguments["x"]
    assert x is not None
    return reference.mlp(**arguments, drop_path=None if drop_path is None else drop_path.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu"])
def test_activations(device: torch.device, activation: str, dtype: torch.dtype) -> None:
    check(device, dtype, activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "rms"])
def test_norms(device: torch.device, norm: str, dtype: torch.dtype) -> None:
    check(device, dtype, norm=norm, without=("layer_scale",))


@pytest.mark.parametrize("without", [("drop_path",), ("layer_scale", "drop_path"), ("fc1_bias", "fc2_bias")])
def test_absent_arguments(device: torch.device, without: tuple[str, ...]) -> None:
    check(device, torch.float16, without=without)


@pytest.mark.parametrize(("d", "hidden"), [(72, 341), (33, 130)])
def test_odd_widths(device: torch.device, d: int, hidden: int) -> None:
    check(device, torch.float16, shape=(2, 5, d), hidden=hidden, activation="swiglu")


def test_gives_what_is_needed(device: torch.device) -> None:
    for name in NAMES:
        check(device, torch.float32, shape=(2, 5, 40), hidden=48, needs=(name,))


def check_inference(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (2, 70, 192),
    hidden: int = 192,
    norm: str = "layer",
    activation: str = "gelu",
    without: tuple[str, ...] = (),
    x_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
) -> None:
    d = shape[-1]
    tensors = {
        "fc1_weight": nasty.weight(2 * hidden if activation == "swiglu" else hidden, d),
        "fc1_bias": nasty.vector(2 * hidden if activation == "swiglu" else hidden),
        "fc2_weight": nasty.weight(d, hidden, seed=5),
        "fc2_bias": nasty.vector(d, 6),
        "norm_weight": None if norm == "none" else nasty.vector(d, 3, mean=1.0),
        "norm_bias": nasty.vector(d, 4) if norm == "layer" else None,
        "layer_scale": nasty.vector(d, 7),
        "drop_path": torch.tensor([0.0, 1.25, 1.25])[: shape[0]],
    }
    tensors = {name: None if t is None or name in without else t.to(dtype) for name, t in tensors.items()}
    x = nasty.strided(nasty.tokens(*shape).to(x_dtype or dtype), layout)
    options = {"norm": norm, "eps": 1e-6, "activation": activation}
    moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    result = mlp(x.to(device), **moved, **options)
    assert result.dtype == x.dtype
    truth = reference.mlp(
        x.double(), **{name: None if t is None else t.double() for name, t in tensors.items()}, **options
    )
    assert_close(result.cpu(), truth, eager=reference.mlp(x.to(dtype), **tensors, **options))


@pytest.fixture
def fused() -> Iterator[None]:
    """Every MLP in the test that can runs as one kernel, however few its rows."""
    with choices.force("fused"):
        yield


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
def test_fused_widths(device: torch.device, d: int, dtype: torch.dtype) -> None:
    check_inference(device, dtype, shape=(3, 50, d), hidden=2 * d)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("hidden", [16, 64, 200, 341])
def test_hidden_is_no_multiple_of_a_fused_block(device: torch.device, hidden: int) -> None:
    check_inference(device, torch.float16, hidden=hidden)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
def test_fused_norms_and_activations(device: torch.device, activation: str, norm: str) -> None:
    check_inference(device, torch.bfloat16, activation=activation, norm=norm, shape=(1, 20, 96), hidden=72)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    "without",
    [("drop_path",), ("layer_scale", "drop_path"), ("fc1_bias",), ("fc2_bias",), ("norm_weight", "norm_bias")],
)
def test_absent_vectors_fused(device: torch.device, without: tuple[str, ...]) -> None:
    check_inference(device, torch.float16, without=without, shape=(2, 5, 64), hidden=80)


@pytest.mark.usefixtures("fused")
def test_fused_variants(device: torch.device) -> None:
    low = torch.bfloat16
    check_inference(device, low, x_dtype=torch.float32)
    for layout in ("sliced", "transposed"):
        check_inference(device, low, layout=layout)
    # Not fused.
    check_inference(device, low, activation="swiglu", shape=(2, 5, 64), hidden=80)
    check_inference(device, low, shape=(2, 5, 72), hidden=80)
    check_inference(device, torch.float32, shape=(2, 5, 64), hidden=80)


@pytest.mark.usefixtures("fused")
def test_the_operator_is_fused_in_inference(device: torch.device) -> None:
    """As it is, and under autocast, where the residual stream and the norm stay in float32."""
    d, low = 64, torch.bfloat16
    x, fc1, fc2, gamma = nasty.tokens(2, 9, d), nasty.weight(80, d), nasty.weight(d, 80, seed=5), nasty.vector(d, 3)
    x, fc1, fc2, gamma = (t.float().to(device) for t in (x, fc1, fc2, gamma))
    options = {"norm": "layer", "norm_weight": gamma, "norm_bias": None, "eps": 1e-6, "activation": "gelu"}
    nothing = {"layer_scale": None, "drop_path": None}
    with torch.no_grad(), ops.use_backend("triton"):
        result = ops.mlp(x.to(low), fc1.to(low), None, fc2.to(low), None, **options)
        assert torch.equal(result, mlp(x.to(low), fc1.to(low), None, fc2.to(low), None, **options, **nothing))
        with torch.autocast(device.type, dtype=low):
            result = ops.mlp(x, fc1, None, fc2, None, **options)
    assert result.dtype == torch.float32
    assert torch.equal(result, mlp(x, fc1.to(low), None, fc2.to(low), None, **options, **nothing))


def test_which_schedule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By size where nothing was measured, by what was measured where that can run."""

    def chosen(
        m: int, d: int, dtype: torch.dtype = torch.bfloat16, *, activation: str = "gelu", on: str = "sm90"
    ) -> str:
        def meta(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        wide = 8 * d if activation == "swiglu" else 4 * d
        with record(on) as launches:
            mlp(meta(1, m, d), meta(wide, d), None, meta(d, 4 * d), None, norm="layer", norm_weight=None,
                norm_bias=None, eps=1e-6, activation=activation, layer_scale=None, drop_path=None)  # fmt: skip
        return "fused" if [call.kernel for call in launches] == [kernel._fused] else "composed"

    monkeypatch.setattr(choices, "table", dict)
    assert [chosen(m, 192) for m in (197, 16895, 16896, 50432)] == [*["composed"] * 2, *["fused"] * 2]
    assert chosen(50432, 192, torch.float16) == chosen(50432, 64) == "fused"
    assert {chosen(50432, d) for d in (16, 72, 256, 384, 768)} == {"composed"}
    assert chosen(50432, 192, torch.float32) == chosen(50432, 192, activation="swiglu") == "composed"
    assert [chosen(50432, 192, on=on) for on in ("sm80", "sm100", "gfx942")] == ["composed", "fused", "composed"]

    measured = {choices.key("mlp", torch.bfloat16, "layer gelu", 4 * d, d): {"16": name} for d, name in (
        (192, "composed"), (256, "fused"), (384, "fused"))}  # fmt: skip
    monkeypatch.setattr(choices, "table", lambda: {"sm90": measured})
    assert [chosen(50432, d) for d in (192, 256, 384)] == ["composed", "fused", "composed"]
