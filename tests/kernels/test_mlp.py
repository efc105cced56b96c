from __future__ import annotations

import pytest
import torch
from fastvit.kernels.mlp import mlp, mlp_backward
from torch import Tensor

from fastvit import reference
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
    result, pre = mlp(**moved, **options, drop_path=factors)
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
