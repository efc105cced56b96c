from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "cropped", "flipped_axes")
PIXELS = (torch.float32, torch.bfloat16, torch.uint8)
PATCHES = ((16, 16), (14, 14), (8, 32), (4, 3))
# Every pair of a layout, a dtype and a patch.
IMAGES = [(layout, PIXELS[(i + j) % 3], patch) for i, layout in enumerate(LAYOUTS) for j, patch in enumerate(PATCHES)]


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    b, c, h, w = shape
    if dtype == torch.uint8:
        make = lambda *s: torch.randint(0, 256, s, generator=nasty.generator(), dtype=torch.uint8)  # noqa: E731
    else:
        make = lambda *s: nasty.tokens(*s, massive=0).to(dtype)  # noqa: E731
    if layout == "channels_last":
        return make(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        return make(b, c + 1, h + 3, w + 5)[:, 1:, 2 : h + 2, 4 : w + 4]
    if layout == "flipped_axes":
        return make(b, c, w, h).transpose(2, 3)
    return make(*shape)


def by_torch(x: Tensor, w: Tensor, b: Tensor | None, pos: Tensor | None, prefix: Tensor | None) -> Tensor:
    y = F.conv2d(x, w, b, stride=w.shape[2:]).flatten(2).transpose(1, 2)
    y = y if pos is None else y + pos
    return y if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), y], dim=1)


@pytest.mark.parametrize("layout, pixels, patch", IMAGES)
def test_layouts(isa: str, dtype: torch.dtype, layout: str, pixels: torch.dtype, patch: tuple[int, int]) -> None:
    size = (2 * patch[0], 3 * patch[1])
    x = image((2, 3, *size), pixels, layout)
    w, b, pos, prefix = plain.cast(
        dtype, nasty.weight(72, 3, *patch), nasty.vector(72), nasty.tokens(6, 72), nasty.tokens(5, 72, seed=9)
    )
    scale, shift = nasty.vector(3, 7, mean=1.0).float() / 64, nasty.vector(3, 8).float()
    actual = call.patch_embed(
        x, w, b, pos_embed=pos, prefix=prefix, channel_scale=scale, channel_shift=shift, compute=dtype
    )
    seen = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    truth = by_torch(seen, *plain.cast(torch.float64, w, b, pos, prefix))
    assert_close(actual, truth, eager=by_torch(seen.to(dtype), w, b, pos, prefix))
    given = {"pos_embed": pos[None], "prefix": prefix[None], "channel_scale": scale, "channel_shift": shift}
    same = call.patch_embed(x.permute(0, 2, 3, 1), w, b, **given, channels_last=True, compute=dtype)
    assert torch.equal(same, actual)


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (3, 21)])
@pytest.mark.parametrize(("channels", "step"), [(1, 1), (1, 3), (2, 2), (3, 3), (3, 4), (4, 4), (3, 5)])
def test_interleaved_bytes(isa: str, dtype: torch.dtype, channels: int, step: int, patch: tuple[int, int]) -> None:
    # A crop of an image whose pixels have `step` bytes, such as RGBA, of which the first channels are used.
    size = (2 * patch[0], 3 * patch[1])
    pixels = torch.randint(0, 256, (2, size[0] + 1, size[1] + 2, step), generator=nasty.generator(), dtype=torch.uint8)
    x = pixels[:, 1:, 1 : size[1] + 1, :channels].permute(0, 3, 1, 2)
    w = nasty.weight(40, channels, *patch).to(dtype)
    scale, shift = nasty.vector(channels, 7, mean=1.0).float() / 64, nasty.vector(channels, 8).float()
    actual = call.patch_embed(x, w, channel_scale=scale, channel_shift=shift, compute=dtype)
    seen = x.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    truth = by_torch(seen, w.double(), None, None, None)
    assert_close(actual, truth, eager=by_torch(seen.to(dtype), w, None, None, None))


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 8), (3, 21)])
@pytest.mark.parametrize(("channels", "step"), [(1, 1), (3, 3), (3, 4), (4, 4), (3, 5), (3, 0)])
def test_bytes_as_integers(isa: str, dtype: torch.dtype, channels: int, step: int, patch: tuple[int, int]) -> None:
    # `step` bytes to a pixel; 0 for planes.
    size = (2 * patch[0], 5 * patch[1])
    shape = (2, *size, step) if step else (2, channels, *size)
    x = torch.randint(0, 256, shape, generator=nasty.generator(), dtype=torch.uint8)
    x = x[..., :channels].permute(0, 3, 1, 2) if step else x
    w = torch.randint(-127, 128, (72, channels, *patch), generator=nasty.generator(1), dtype=torch.int8)
    scale, shift, b, pos, prefix = plain.cast(
        torch.float32, *(nasty.vector(72, seed) for seed in (7, 8, 0)), nasty.tokens(10, 72), nasty.tokens(2, 72)
    )
    of_weight = {"weight_scale": scale, "weight_shift": shift}
    actual = call.patch_embed(x, w, b, pos_embed=pos, prefix=prefix, **of_weight, compute=dtype)
    wide = F.conv2d(x.double() - 128, w.double(), stride=patch).flatten(2).transpose(1, 2) * scale + shift + b + pos
    truth = torch.cat([prefix.double().expand(2, -1, -1), wide], dim=1)
    assert_close(actual, truth, eager=truth.to(dtype))
    ready = call.patch_embed(x, w, b, pos_embed=pos, prefix=prefix, **of_weight, pack=True, compute=dtype)
    assert torch.equal(ready, actual)


_AT_THE_END_OF_MEMORY = """
import ctypes, mmap, torch
from fastvit import _C
from tests.csrc import call

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 4 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 3 * page), page, 0) == 0
bytes = torch.frombuffer(memory, dtype=torch.uint8)
for isa in _C.supported_isas():
    _C.set_isa(isa)
    for channels, step in ((1, 1), (3, 3), (3, 4), (4, 4)):
        for p in (16, 14, 3):
            last = (2 * p * 2 * p - 1) * step + channels  # an RGBA image's last A need not be there
            image = torch.as_strided(bytes, (1, channels, 2 * p, 2 * p), (1, 1, 2 * p * step, step), 3 * page - last)
            out = call.patch_embed(image, torch.ones(8, channels, p, p))
            assert torch.isfinite(out).all()
"""


def test_reads_nothing_behind_the_image() -> None:
    # The image ends where unreadable memory begins; a byte too far would be a crash.
    assert subprocess.run([sys.executable, "-c", _AT_THE_END_OF_MEMORY], check=False).returncode == 0


@pytest.mark.parametrize("channels", [1, 3, 12])
@pytest.mark.parametrize("width", [37, 64, 130])
@pytest.mark.parametrize("threads", [1, 3])
def test_channels_and_widths(isa: str, dtype: torch.dtype, channels: int, width: int, threads: int) -> None:
    x = image((1, channels, 35, 21), dtype, "contiguous")
    w = nasty.weight(width, channels, 7, 7).to(dtype)
    truth = by_torch(x.double(), w.double(), None, None, None)
    actual = call.patch_embed(x, w, compute=dtype, threads=threads)
    assert_close(actual, truth, eager=by_torch(x, w, None, None, None))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_prefix_and_position_of_another_dtype(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, w = image((3, 3, 16, 16), torch.float32, "contiguous"), nasty.weight(40, 3, 8, 8).float()
    pos, prefix = nasty.tokens(4, 40).bfloat16(), nasty.tokens(1, 40, seed=9).bfloat16()
    actual = call.patch_embed(x, w, pos_embed=pos, prefix=prefix, compute=dtype, out_dtype=out_dtype)
    truth = by_torch(*plain.cast(torch.float64, x, w, None, pos, prefix))
    eager = plain.as_eager(by_torch(*plain.cast(dtype, x, w, None, pos, prefix)), dtype, out_dtype)
    assert_close(actual, truth, eager=eager)
    assert torch.equal(actual[:, 0], prefix.to(out_dtype).expand(3, 40))


def test_no_images(isa: str, dtype: torch.dtype) -> None:
    x, w = torch.empty(0, 3, 16, 16, dtype=dtype), nasty.weight(8, 3, 8, 8).to(dtype)
    assert call.patch_embed(x, w, prefix=torch.ones(1, 8), compute=dtype).shape == (0, 5, 8)
