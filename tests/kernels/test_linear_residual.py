from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import choices
from fastvit.kernels import linear_residual as kernel
from fastvit.kernels.launch import record
from fastvit.kernels.linear_residual import linear_residual, linear_residual_backward
from torch import Tensor

from tests import nasty
from tests.kernels.conftest import run_as
from tests.kernels.gradients import assert_gradients, seed
from tests.tolerances import assert_close

NAMES = ("x", "weight", "bias", "layer_scale")
VECTORS = ("bias", "layer_scale", "drop_path")


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    y = F.linear(x, weight, bias)
    if layer_scale is not None:
        y = y * layer_scale
    if drop_path is not None:
        y = y * drop_path.view(-1, *[1] * (y.ndim - 1))
    return residual + y


def check(
    device: torch.device,
    shape: tuple[int, ...],
    features: int,
    dtype: torch.dtype,
    *,
    residual_dtype: torch.dtype | None = None,
    without: tuple[str, ...] = (),
    layout: str = "contiguous",
) -> None:
    x = nasty.strided(nasty.tokens(*shape).to(dtype), layout)
    weight = nasty.weight(features, shape[-1]).to(dtype)
    residual = nasty.strided(nasty.tokens(*shape[:-1], features, seed=7).to(residual_dtype or dtype), layout)
    vectors = {
        "bias": nasty.vector(features).to(dtype),
        "layer_scale": nasty.vector(features, 3).to(dtype),
        "drop_path": torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25])[: shape[0]].to(dtype),
    }
    vectors = {name: None if name in without else t for name, t in vectors.items()}
    truth = plain(
        x.double(),
        weight.double(),
        residual=residual.double(),
        **{name: None if t is None else t.double() for name, t in vectors.items()},
    )
    eager = plain(x, weight, residual=residual, **vectors)
    result = linear_residual(
        x.to(device),
        weight.to(device),
        residual=residual.to(device),
        **{name: None if t is None else t.to(device) for name, t in vectors.items()},
    ).cpu()
    assert result.dtype == residual.dtype
    assert_close(result, truth, eager=eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 50, 96), (5, 96)])
def test_shapes(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(device, shape, 72, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("without", [("bias",), ("layer_scale",), ("drop_path",), ("bias", "layer_scale", "drop_path")])
def test_absent_vectors(device: torch.device, without: tuple[str, ...], dtype: torch.dtype) -> None:
    check(device, (2, 5, 64), 24, dtype, without=without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "features"), [(2730, 33), (588, 130), (30, 70)])
def test_odd_widths(device: torch.device, k: int, features: int, dtype: torch.dtype) -> None:
    check(device, (2, 3, k), features, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_residual_stream_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    check(device, (2, 20, 96), 48, dtype, residual_dtype=torch.float32)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strides(device: torch.device, layout: str) -> None:
    check(device, (2, 10, 80), 32, torch.float32, layout=layout)


def test_the_tile_of_large_batches(device: torch.device) -> None:
    check(device, (1, 2049, 32), 40, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", [(), ("bias", "layer_scale", "drop_path")])
def test_by_cublas(device: torch.device, without: tuple[str, ...], dtype: torch.dtype) -> None:
    with choices.force("cublas"):
        check(device, (3, 50, 96), 72, dtype, without=without)
        check(device, (2, 20, 33), 300, torch.bfloat16, layout="sliced")
        check(device, (2, 20, 33), 300, torch.bfloat16, residual_dtype=torch.float32)  # not by cuBLAS


@pytest.fixture(params=["sm90", "sm100"])
def persistent(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every product in the test that can runs by an architecture's persistent programs, however few its rows."""
    run_as(request.param, kernel, device, monkeypatch)
    with choices.force("persistent"):
        yield


@pytest.mark.usefixtures("persistent")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", [(), ("bias",), ("layer_scale",), ("drop_path",), VECTORS])
def test_absent_vectors_by_persistent_programs(
    device: torch.device, without: tuple[str, ...], dtype: torch.dtype
) -> None:
    check(device, (3, 50, 96), 72, dtype, without=without)


@pytest.mark.usefixtures("persistent")
@pytest.mark.parametrize("features", [8, 128, 136, 264, 392])
def test_columns_of_persistent_tiles(device: torch.device, features: int) -> None:
    """Right halves of tiles that are missing, whole and cut, and rows of two tiles."""
    check(device, (2, 70, 64), features, torch.float16)


@pytest.mark.usefixtures("persistent")
def test_variants_by_persistent_programs(device: torch.device) -> None:
    low = torch.bfloat16
    for dtype in (low, torch.float16):
        check(device, (2, 70, 96), 136, dtype, residual_dtype=torch.float32)
    check(device, (2, 20, 80), 32, low, layout="sliced")
    check(device, (2, 20, 80), 32, low, layout="transposed")
    check(device, (2, 20, 98), 33, low)  # no multiple of 16 bytes: by a program for each tile
    check(device, (2, 20, 96), 72, torch.float32)


@pytest.mark.usefixtures("persistent")
def test_more_tiles_than_persistent_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 2)
    check(device, (3, 100, 64), 264, torch.float16)


def test_which_schedule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By size where nothing was measured, by what was measured where that can run."""

    def chosen(
        m: int, n: int, k: int, dtype: torch.dtype, *, stride: int | None = None, wide: bool = False, on: str = "sm90"
    ) -> str:
        x = torch.empty_strided((m, k), (k if stride is None else stride, 1), dtype=dtype, device="meta")
        residual = torch.empty(m, n, dtype=torch.float32 if wide else dtype, device="meta")
        with record(on):
            return kernel._schedule(x, torch.empty(n, k, dtype=dtype, device="meta"), residual)

    low = torch.bfloat16
    monkeypatch.setattr(choices, "table", dict)
    assert [chosen(m, 768, 768, low) for m in (197, 16384, 16385, 50432)] == [*["product"] * 2, *["persistent"] * 2]
    assert chosen(50432, 768, 3072, torch.float16) == chosen(50432, 768, 768, low, wide=True) == "persistent"
    assert chosen(50432, 1152, 4304, low) == "persistent"
    assert chosen(50432, 384, 1536, low) == "product"  # of 512 columns
    assert chosen(50432, 768, 770, low) == chosen(50432, 768, 768, low, stride=770) == "product"
    assert chosen(50432, 768, 768, torch.float32) == chosen(50432, 768, 768, low, stride=0) == "product"
    assert {chosen(50432, 768, 768, low, on=on) for on in ("sm80", "gfx942")} == {"product"}
    assert [chosen(50432, n, 1536, low, on="sm100") for n in (384, 64)] == ["persistent", "product"]

    name = choices.key("linear_residual", low, "residual", 384, 768)
    monkeypatch.setattr(choices, "table", lambda: {"sm90": {name: {"16": "cublas", "8": "persistent"}}})
    assert [chosen(m, 384, 768, low) for m in (197, 6304, 50432)] == ["persistent", "product", "cublas"]
    assert chosen(197, 384, 768, low, stride=770) == chosen(50432, 384, 768, low, wide=True) == "product"


def check_backward(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...] = (3, 37, 96),
    features: int = 72,
    residual_dtype: torch.dtype | None = None,
    without: tuple[str, ...] = (),
    needs: tuple[str, ...] = NAMES,
) -> None:
    residual = nasty.tokens(*shape[:-1], features, seed=7).to(residual_dtype or dtype)
    tensors = {
        "x": nasty.tokens(*shape),
        "weight": nasty.weight(features, shape[-1]),
        "bias": nasty.vector(features),
        "layer_scale": nasty.vector(features, 3),
    }
    tensors = {name: None if name in without else t.to(dtype) for name, t in tensors.items()}
    drop_path = None if "drop_path" in without else torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25])[: shape[0]].to(dtype)
    grad = seed(*residual.shape).to(residual.dtype)
    moved = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    wanted = [name in needs and tensors[name] is not None for name in NAMES]
    results = linear_residual_backward(
        grad.to(device), **moved, drop_path=None if drop_path is None else drop_path.to(device), needs=wanted
    )
    actual = {name: g if want else None for name, g, want in zip(NAMES, results, wanted, strict=True)}
    assert all((actual[name] is not None) == want for name, want in zip(NAMES, wanted, strict=True))
    assert_gradients(actual, plain, tensors, grad, residual=residual, drop_path=drop_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", [(), ("layer_scale",), ("drop_path",), ("bias",), NAMES[2:], ("drop_path", "bias")])
def test_backward(device: torch.device, without: tuple[str, ...], dtype: torch.dtype) -> None:
    check_backward(device, dtype, without=without)


def test_backward_with_a_residual_stream_in_float32(device: torch.device) -> None:
    for without in ((), ("drop_path",)):
        check_backward(device, torch.bfloat16, residual_dtype=torch.float32, without=without)


def test_backward_gives_what_is_needed(device: torch.device) -> None:
    for name in NAMES:
        check_backward(device, torch.float32, needs=(name,), shape=(5, 97), features=33)
    for name in NAMES[:3]:
        check_backward(device, torch.float32, needs=(name,), without=("layer_scale",))
