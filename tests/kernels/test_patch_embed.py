from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels.launch import record
from fastvit.kernels.patch_embed import patch_embed, unfold
from torch import Tensor

from tests import nasty
from tests.tolerances import assert_close

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 2.0)


def plain(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:
    if image.dtype == torch.uint8:
        image = image.to(weight.dtype) / 255
    if mean is not None:
        image = image - torch.tensor(mean, dtype=image.dtype).view(-1, 1, 1)
    if std is not None:
        image = image / torch.tensor(std, dtype=image.dtype).view(-1, 1, 1)
    x = F.conv2d(image, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    if pos_embed is not None:
        x = x + pos_embed
    if prefix is not None:
        x = torch.cat([prefix.expand(x.shape[0], *prefix.shape[-2:]), x], 1)
    return x


def check(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    channels: int = 3,
    grid: tuple[int, int] = (3, 2),
    patch: tuple[int, int] = (4, 4),
    dim: int = 24,
    uint8: bool = False,
    channels_last: bool = False,
    bias: bool = True,
    pos_embed: bool = True,
    prefix_rows: int = 1,
    normalise: bool = False,
) -> None:
    shape = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    g = nasty.generator()
    image = (
        torch.randint(256, shape, generator=g, dtype=torch.uint8) if uint8 else torch.rand(shape, generator=g).to(dtype)
    )
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    weight = nasty.weight(dim, channels, *patch).to(dtype)
    tensors = {
        "bias": nasty.vector(dim).to(dtype) if bias else None,
        "pos_embed": nasty.tokens(1, grid[0] * grid[1], dim, seed=3).to(dtype) if pos_embed else None,
        "prefix": nasty.tokens(prefix_rows, dim, seed=4).to(dtype) if prefix_rows else None,
    }
    numbers = {"mean": MEAN[:channels], "std": STD[:channels]} if normalise else {}
    truth = plain(
        image if uint8 else image.double(),
        weight.double(),
        **{name: None if t is None else t.double() for name, t in tensors.items()},
        **numbers,
    )
    eager = plain(image, weight, **tensors, **numbers)
    result = patch_embed(
        image.to(device),
        weight.to(device),
        **{name: None if t is None else t.to(device) for name, t in tensors.items()},
        **numbers,
    ).cpu()
    assert result.dtype == dtype
    assert_close(result, truth, eager=eager)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 4), (1, 3)])
def test_patches(device: torch.device, patch: tuple[int, int], dtype: torch.dtype) -> None:
    check(device, dtype, patch=patch)


@DTYPES
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_uint8(device: torch.device, channels_last: bool, normalise: bool, dtype: torch.dtype) -> None:
    check(device, dtype, uint8=True, channels_last=channels_last, normalise=normalise, patch=(14, 14))


@pytest.mark.parametrize("channels", [1, 4])
def test_normalised_float_images(device: torch.device, channels: int) -> None:
    check(device, torch.float32, channels=channels, normalise=True)


def test_mean_or_std_alone(device: torch.device) -> None:
    image, weight = torch.rand(1, 3, 8, 8, generator=nasty.generator()), nasty.weight(8, 3, 4, 4).float()
    for numbers in ({"mean": MEAN[:3]}, {"std": STD[:3]}):
        truth = plain(image.double(), weight.double(), None, **numbers)
        as_tensors = {name: torch.tensor(values) for name, values in numbers.items()}
        for given in (numbers, as_tensors):
            assert_close(patch_embed(image.to(device), weight.to(device), **given).cpu(), truth)


@pytest.mark.parametrize(
    "run",
    [
        lambda image, mean: patch_embed(image, torch.ones(8, 3, 4, 4, device=image.device), mean=mean),
        lambda image, mean: unfold(image, 4, 4, mean, None, torch.float32),
    ],
    ids=["patch_embed", "unfold"],
)
def test_a_cuda_graph_may_read_a_normalisation_for_good(
    device: torch.device, run: Callable[[Tensor, tuple[float, ...]], Tensor]
) -> None:
    def read(*mean: float) -> tuple[Tensor, Tensor]:
        with record("sm90") as launches:
            run(torch.zeros(1, 3, 4, 4, device=device), mean)
        return launches[0].arguments["scale"], launches[0].arguments["shift"]

    captured = read(*MEAN[:3])
    for i in range(200):  # those of other models
        read(i, i, i)
    assert all(now is then for now, then in zip(read(*MEAN[:3]), captured, strict=True))


@pytest.mark.parametrize("prefix_rows", [0, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_absent_arguments(device: torch.device, bias: bool, prefix_rows: int) -> None:
    check(device, torch.float32, bias=bias, pos_embed=not bias, prefix_rows=prefix_rows, dim=300)


def test_many_channels_and_strided_images(device: torch.device) -> None:
    check(device, torch.float32, channels=12, channels_last=True)
    image = torch.rand(2, 3, 20, 30, generator=nasty.generator())[:, :, 2:18:2, 3:27:3]
    weight = nasty.weight(8, 3, 4, 4).float()
    result = patch_embed(image.to(device), weight.to(device)).cpu()
    assert_close(result, plain(image.double(), weight.double(), None))


def test_the_tile_of_large_batches(device: torch.device) -> None:
    check(device, torch.float16, batch=5, grid=(29, 29), patch=(2, 4), prefix_rows=4)
