"""A real photograph as a model's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit._compat import import_library
from fastvit.bench import UsageError

# ImageNet's statistics.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photograph() -> Path:
    """The photograph that scikit-learn ships: a Chinese temple, 640 x 427."""
    sklearn: Any = import_library("sklearn")
    return Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"


def load(path: Path | None, batch: int, size: tuple[int, int, int]) -> Tensor:
    """(batch, C, H, W) normalised float32: the image, centre-cropped and resized, each next one flipped or shifted.

    Raises:
        UsageError: the file can't be read as an image.
    """
    import_library("PIL")
    from PIL import Image, ImageOps

    path = path or photograph()
    channels, height, width = size
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
            picture = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"image: {path} can't be read: {error}") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    x = (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    if channels != 3:
        x = x.repeat(-(-channels // 3), 1, 1)[:channels]
    # Different images of one scene: a batch of equal rows would hide mixed-up samples.
    return torch.stack([(x if i % 2 == 0 else x.flip(-1)).roll(7 * i, dims=-1) for i in range(batch)]).contiguous()
