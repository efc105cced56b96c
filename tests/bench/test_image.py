"""The photograph, and images that are none."""

from __future__ import annotations

import pytest
import torch

from fastvit.bench import UsageError
from fastvit.bench.image import MEAN, STD, load

Image = pytest.importorskip("PIL.Image")


def test_the_photograph_is_real_and_the_batch_differs():
    pytest.importorskip("sklearn")
    x = load(None, 3, (3, 64, 48))
    assert x.shape == (3, 3, 64, 48)
    assert x.dtype == torch.float32
    assert x[0].std() > 0.3
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_is_read(tmp_path, mode):
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (30, 20), (255, 0, 0)).convert(mode).save(path)
    assert load(path, 1, (3, 16, 16)).shape == (1, 3, 16, 16)


def test_pixels_are_normalised_and_channels_repeat(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), (255, 0, 51)).save(path)
    x = load(path, 1, (4, 8, 8))
    for channel, value in enumerate((1.0, 0.0, 0.2, 1.0)):
        expected = (value - MEAN[channel % 3]) / STD[channel % 3]
        torch.testing.assert_close(x[0, channel], torch.full((8, 8), expected))


def test_an_image_lies_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (8, 8), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    x = load(tmp_path / "turned.png", 1, (3, 8, 8))
    assert x[0, :, 6:].mean() > x[0, :, :2].mean()


def test_what_is_no_image_is_told(tmp_path):
    good = tmp_path / "good.jpg"
    Image.effect_noise((64, 64), 50).save(good)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:-700])
    text = tmp_path / "text.png"
    text.write_text("hello")
    for path in (cut, text, tmp_path, tmp_path / "missing.png"):
        with pytest.raises(UsageError, match="can't be read"):
            load(path, 1, (3, 8, 8))
