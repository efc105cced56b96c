"""FastViT, its configurations, and loading of other libraries' checkpoints."""

from __future__ import annotations

import fnmatch
import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastvit.models import configs
from fastvit.models.checkpoints import load_checkpoint
from fastvit.models.vit import FastViT

__all__ = ["FastViT", "create_model", "list_models", "load_checkpoint"]


def create_model(
    name: str, *, checkpoint: str | os.PathLike[str] | Mapping[str, Tensor] | None = None, **overrides: Any
) -> FastViT:
    """A FastViT by name, with random weights or those of a checkpoint.

    Args:
        name: such as "vit_base_patch16_224" (see `list_models`); any patch and image size may be asked for.
        checkpoint: a file (.safetensors, .npz of the original JAX code, or what torch.save wrote) or a state dict, in
            the layout of timm, transformers (4 or 5), torchvision, open_clip (its image tower) or the original JAX
            code; its keys tell which.  Positions of another grid are interpolated.
        overrides: any argument of `FastViT`, for instance num_classes=10, img_size=(224, 448), in_chans=12.

    Raises:
        ValueError: an unknown name, an argument or a checkpoint that does not fit.
        TypeError: an override that FastViT does not have.
    """
    accepted = inspect.signature(FastViT).parameters
    if unknown := [key for key in overrides if key not in accepted]:
        raise TypeError(f"overrides: {', '.join(unknown)} not known; accepted: {', '.join(accepted)}")
    model = FastViT(**{**configs.arguments(name), **overrides})
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def list_models(filter: str = "*") -> list[str]:
    """Names that published checkpoints have, filtered by a shell pattern such as "*dinov2*"."""
    return sorted(name for name in configs.NAMES if fnmatch.fnmatch(name, filter))
