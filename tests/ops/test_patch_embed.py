from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch._subclasses import FakeTensorMode

from fastvit import ops, reference
from tests import nasty
from tests.ops.harness import BACKENDS, DTYPES, check, check_gradients
from tests.tolerances import INT8, LOW_PRECISION_RATIO, assert_close, relative_l2

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_position_and_prefix(backend):
    args, kwargs = arguments()
    check("patch_embed", *args, **{k: v[None] for k, v in kwargs.items()}, dtype=torch.float32, backend=backend)


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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nhwc(backend, pixels, channels):
    (image, weight, bias), kwargs = arguments(c=channels, patch=(14, 14))
    image = (128 * image + 128).clamp(0, 255).to(pixels)
    kwargs = {name: t.float() for name, t in kwargs.items()} | {"mean": MEAN[:1] * channels, "std": STD[:1] * channels}
    decoded = image.permute(0, 2, 3, 1).contiguous()
    with ops.use_backend(backend):
        actual = ops.patch_embed(decoded, weight.float(), bias.float(), **kwargs, layout="NHWC")
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
    pixel_truth = image if pixels == torch.uint8 else image.double()
    truth = reference.patch_embed(pixel_truth, weight.float().double(), bias.float().double(), **wide)
    assert_close(actual, truth)


def test_nhwc_without_data():
    with FakeTensorMode():
        image, weight = torch.empty(2, 28, 42, 3, dtype=torch.uint8), torch.empty(8, 3, 14, 14, dtype=torch.bfloat16)
        tokens = ops.patch_embed(image, weight, layout="NHWC")
    assert (tokens.shape, tokens.dtype) == ((2, 6, 8), torch.bfloat16)


def test_gradients_of_nhwc():
    (image, weight, bias), kwargs = arguments(grid=(2, 2), patch=(4, 4), d=8)
    image = image.permute(0, 2, 3, 1).contiguous()
    # The harness has a `layout` of its own.
    leaves = [t.float().requires_grad_() for t in (image, weight, bias)]
    wide = [t.double().requires_grad_() for t in (image, weight, bias)]
    positions = {name: t.double() for name, t in kwargs.items()}
    actual = ops.patch_embed(*leaves, **{name: t.float() for name, t in kwargs.items()}, layout="NHWC")
    truth = reference.patch_embed(wide[0].permute(0, 3, 1, 2), *wide[1:], **positions)
    seed = torch.randn(truth.shape, generator=nasty.generator(9), dtype=torch.float64)
    actual.backward(seed.float())
    truth.backward(seed)
    for mine, expected in zip(leaves, wide, strict=True):
        assert_close(mine.grad, expected.grad)


_MEMORY = """
import pathlib, re, torch
from fastvit import ops

peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024
images = torch.randint(0, 256, (64, 448, 448, 3), dtype=torch.uint8)
weight = torch.ones(16, 3, 14, 14, dtype=getattr(torch, {dtype!r}))
call = lambda: ops.patch_embed(images, weight, mean=(0.5,) * 3, std=(0.5,) * 3, layout="NHWC")
before = peak()
out = call()
fused = peak() - before
with ops.use_backend("reference"):
    call()
print(fused - out.nbytes / 2**20, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_float_image_is_written(dtype):
    # 37 MiB of bytes, 147 MiB as float32.  Rows in packing are bounded by a share of the L3 cache, 16 MiB at most.
    command = [sys.executable, "-c", _MEMORY.format(dtype=dtype)]
    fused, plain = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert plain > 147
    assert fused < 32


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


def photographs(patch=16):
    """(2, 3, H, W) uint8."""
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return images.permute(0, 3, 1, 2)[:, :, : 24 * patch, : 24 * patch].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("patch", [16, 14])
def test_int8_of_photographs_is_as_near_as_bfloat16(patch, backend, dtype):
    image, weight, bias = photographs(patch), nasty.weight(96, 3, patch, patch).to(dtype), nasty.vector(96).to(dtype)
    seen = reference.normalize_image(image, torch.float64, MEAN, STD)
    truth = reference.patch_embed(seen, weight.double(), bias.double())
    low = reference.patch_embed(seen.bfloat16().double(), weight.bfloat16().double(), bias.double())
    with ops.use_backend(backend):
        actual = ops.patch_embed(image, weight, bias, mean=MEAN, std=STD, quantize="int8")
    assert actual.dtype == dtype
    assert 1e-4 < relative_l2(actual, truth) < LOW_PRECISION_RATIO * relative_l2(low.to(dtype), truth)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_of_noise(dtype, layout):
    (image, weight, bias), kwargs = arguments()
    weight, bias, kwargs = weight.to(dtype), bias.to(dtype), {name: t.to(dtype) for name, t in kwargs.items()}
    image = torch.randint(0, 256, image.shape, generator=nasty.generator(), dtype=torch.uint8)
    given = image if layout == "NCHW" else image.permute(0, 2, 3, 1).contiguous()
    numbers = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD), "quantize": "int8"}
    actual = ops.patch_embed(given, weight, bias, **kwargs, **numbers, layout=layout)
    expected = reference.patch_embed(image, weight.double(), bias.double(), **double(kwargs), **numbers)
    assert_close(actual, expected, eager=expected.to(dtype))
    truth = reference.patch_embed(image, weight.double(), bias.double(), **double(kwargs), mean=MEAN, std=STD)
    assert relative_l2(actual, truth) < INT8


def double(tensors):
    return {name: t.double() for name, t in tensors.items()}


def test_int8_gradients_are_those_of_the_float_product():
    (image, weight, bias), _ = arguments(grid=(2, 2), patch=(4, 4), d=8)
    image = torch.randint(0, 256, image.shape, generator=nasty.generator(), dtype=torch.uint8)
    gradients = []
    for quantize in ("int8", None):
        leaves = [weight.float().requires_grad_(), bias.float().requires_grad_()]
        ops.patch_embed(image, *leaves, mean=MEAN, std=STD, quantize=quantize).square().sum().backward()
        gradients.append([t.grad for t in leaves])
    seed = 2 * ops.patch_embed(image, weight.float(), bias.float(), mean=MEAN, std=STD, quantize="int8")
    leaves = [weight.double().requires_grad_(), bias.double().requires_grad_()]
    reference.patch_embed(image, *leaves, mean=MEAN, std=STD).backward(seed.double())
    for mine, exact, plain in zip(gradients[0], leaves, gradients[1], strict=True):
        assert_close(mine, exact.grad)
        assert relative_l2(mine, plain.double()) < INT8


def test_int8_follows_weights_and_numbers():
    (image, weight, _), _ = arguments()
    image, weight = (255 * image.clamp(0, 1)).to(torch.uint8), weight.float()

    def check(mean, std):
        actual = ops.patch_embed(image, weight, mean=mean, std=std, quantize="int8")
        assert relative_l2(actual, reference.patch_embed(image, weight.double(), mean=mean, std=std)) < INT8

    check(MEAN, STD)
    check(None, STD)
    check(MEAN, None)
    weight.neg_()
    check(MEAN, None)
    weight.data = 2 * weight
    check(MEAN, None)


def test_int8_is_an_operator_that_compiles():
    (image, weight, bias), kwargs = arguments()
    image = (255 * image.clamp(0, 1)).to(torch.uint8)
    tensors = (image, *(t.float() for t in (weight, bias, *kwargs.values())))
    torch.library.opcheck(torch.ops.fastvit.patch_embed.default, (*tensors, MEAN, STD, None, "NCHW", "int8"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(3, 32, 32)}, ValueError, "image: shape"),
        ({"image": torch.zeros(1, 4, 32, 32)}, ValueError, "image: 4 channels"),
        ({"image": torch.zeros(1, 32, 32, 3)}, ValueError, "accepted: 3, or layout='NHWC'"),
        ({"layout": "NHWC"}, ValueError, "image: 32 channels .* accepted: 3, or layout='NCHW'"),
        ({"layout": "NHWC", "image": torch.zeros(32, 32, 3)}, ValueError, r"accepted: \(B, H, W, C\)"),
        ({"layout": "HWC"}, ValueError, "layout: 'HWC'"),
        ({"image": torch.zeros(1, 3, 33, 32)}, ValueError, "image: 33 x 32"),
        ({"image": torch.zeros(1, 3, 32, 32, dtype=torch.int32)}, TypeError, "image: dtype"),
        ({"image": torch.zeros(1, 3, 32, 32).double()}, TypeError, "weight: dtype"),
        ({"bias": torch.zeros(9)}, ValueError, "bias: shape"),
        ({"pos_embed": torch.zeros(5, 8)}, ValueError, "pos_embed: shape"),
        ({"prefix": torch.zeros(1, 9)}, ValueError, "prefix: shape"),
        ({"mean": (0.5,)}, ValueError, "mean: 1 numbers"),
        ({"mean": 0.5}, TypeError, "mean: 0.5"),
        ({"weight": torch.zeros(8, 3, 0, 16)}, ValueError, "weight: shape"),
        ({"image": None}, TypeError, "image: NoneType"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std"),
        ({"quantize": "int8"}, ValueError, "quantize: 'int8' takes no image of torch.float32"),
        ({"quantize": "int4"}, ValueError, "quantize: 'int4' is not known"),
    ],
)
def test_bad_arguments(change, error, message):
    given = {"image": torch.zeros(1, 3, 32, 32), "weight": torch.zeros(8, 3, 16, 16), **change}
    with pytest.raises(error, match=message):
        ops.patch_embed(given.pop("image"), given.pop("weight"), **given)
