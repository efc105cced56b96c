from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvit import ops
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import assert_close

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def arguments(b=2, c=3, grid=(3, 5), patch=(16, 16), d=40, prefix=1):
    n = grid[0] * grid[1]
    image = torch.randn(b, c, grid[0] * patch[0], grid[1] * patch[1], generator=nasty.generator(), dtype=torch.float64)
    kwargs = {"pos_embed": nasty.tokens(n, d, seed=3), "prefix": nasty.tokens(prefix, d, seed=4) if prefix else None}
    return (image, nasty.weight(d, c, *patch), nasty.vector(d)), kwargs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 8), (32, 32), (7, 5), (1, 1)])
def test_patch_sizes(patch, backend, dtype):
    args, kwargs = arguments(patch=patch)
    check("patch_embed", *args, **kwargs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_channels(channels, dtype):
    args, kwargs = arguments(c=channels)
    check("patch_embed", *args, **kwargs, dtype=dtype)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens(prefix):
    args, kwargs = arguments(prefix=prefix)
    check("patch_embed", *args, **kwargs, dtype=torch.float32)


def test_batched_position_and_prefix():
    args, kwargs = arguments()
    check("patch_embed", *args, **{k: v[None] for k, v in kwargs.items()}, dtype=torch.float32)


@pytest.mark.parametrize("missing", ["bias", "pos_embed"])
def test_optional_arguments(missing):
    (image, weight, bias), kwargs = arguments()
    kwargs["bias"] = bias
    check("patch_embed", image, weight, **{**kwargs, missing: None}, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_normalised_float_image(backend, dtype):
    args, kwargs = arguments()
    check("patch_embed", *args, **kwargs, mean=MEAN, std=STD, dtype=dtype, backend=backend)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8_image(dtype, normalised, layout):
    (image, weight, bias), kwargs = arguments()
    image = torch.randint(0, 256, image.shape, generator=nasty.generator(), dtype=torch.uint8)
    if layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    if normalised:
        kwargs.update(mean=torch.tensor(MEAN), std=torch.tensor(STD))
    check("patch_embed", image, weight, bias, **kwargs, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: nasty.strided(t, "sliced"),
        lambda t: nasty.strided(t, "transposed"),
    ],
)
def test_strides(layout, dtype):
    args, kwargs = arguments()
    check("patch_embed", *args, **kwargs, dtype=dtype, layout=layout)


def test_equals_the_convolution():
    (image, weight, bias), _ = arguments()
    expected = F.conv2d(image, weight, bias, stride=16).flatten(2).transpose(1, 2)
    actual = ops.patch_embed(image.float(), weight.float(), bias.float())
    assert_close(actual, expected)


def test_empty():
    out = ops.patch_embed(torch.empty(0, 3, 32, 32), torch.zeros(8, 3, 16, 16), prefix=torch.zeros(1, 8))
    assert out.shape == (0, 5, 8)


def test_gradients():
    (image, weight, bias), kwargs = arguments(grid=(2, 2), patch=(4, 4), d=8)
    check_gradients("patch_embed", image, weight, bias, **kwargs, mean=MEAN, std=STD)


def test_autocast():
    args, _ = arguments()
    image, weight, bias = (a.float() for a in args)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.patch_embed(image, weight, bias)
        eager = F.conv2d(image, weight, bias, stride=16).flatten(2).transpose(1, 2)
    truth = F.conv2d(*args, stride=16).flatten(2).transpose(1, 2)
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_close(actual, truth, eager=eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(3, 32, 32)}, ValueError, "image: shape"),
        ({"image": torch.zeros(1, 4, 32, 32)}, ValueError, "image: 4 channels"),
        ({"image": torch.zeros(1, 3, 33, 32)}, ValueError, "image: 33 x 32"),
        ({"image": torch.zeros(1, 3, 32, 32, dtype=torch.int32)}, TypeError, "image: dtype"),
        ({"image": torch.zeros(1, 3, 32, 32).double()}, TypeError, "weight: dtype"),
        ({"bias": torch.zeros(9)}, ValueError, "bias: shape"),
        ({"pos_embed": torch.zeros(5, 8)}, ValueError, "pos_embed: shape"),
        ({"prefix": torch.zeros(1, 9)}, ValueError, "prefix: shape"),
        ({"mean": (0.5,)}, ValueError, "mean: 1 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"image": torch.zeros(1, 3, 32, 32), "weight": torch.zeros(8, 3, 16, 16), **change}
    with pytest.raises(error, match=message):
        ops.patch_embed(given.pop("image"), given.pop("weight"), **given)
