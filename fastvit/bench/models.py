"""Models to measure and to check: built without downloads, counted, and given weights that hide nothing."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvit._compat import MissingLibraryError, import_library
from fastvit.adapters import optimize
from fastvit.adapters.readout import read_in_part
from fastvit.bench import LIBRARIES, UsageError

Size = tuple[int, int, int]  # channels, height, width


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Replace a fresh model's nice start values: norms, biases, LayerScale, tokens and positions become random."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        leaf = name.rsplit(".", 1)[-1]
        if p.ndim >= 2 and leaf.endswith("weight"):
            p.copy_(noise * p[0].numel() ** -0.5)
        elif leaf == "weight":
            p.copy_(1.0 + 0.3 * noise)
        else:
            # Biases, gammas ("gamma", "lambda1"), class tokens, position embeddings.
            p.copy_(0.3 * noise)
    return model


def count_flops(model: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one forward: 2 per multiply-add of every product, attention included."""
    # With gradients: without them nn.MultiheadAttention takes one fused operator that the counter does not know.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model(image)
    return counter.get_total_flops()


@torch.no_grad()
def needed_flops(model: nn.Module, image: Tensor) -> int:
    """`count_flops` without what the last block would compute for tokens that no head reads."""
    unread = 0
    twin = optimize(copy.deepcopy(model))
    for block, read in read_in_part(twin).items():
        seen: list[Tensor] = []
        with block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            twin(image)
        parts = block.fastvit_read()
        batch, tokens, _ = seen[0].shape
        query = parts.qkv[0][0].numel() // (3 if len(parts.qkv) == 1 else 1)
        linears = query + sum(weight.numel() for weight, _ in (parts.proj, *parts.fc1, parts.fc2))
        unread += batch * (tokens - read) * (2 * linears + 4 * tokens * parts.proj[0].shape[1])
    return count_flops(model, image) - unread


def build(name: str, library: str = "auto", image_size: int | None = None) -> tuple[nn.Module, Size]:
    """(model in eval mode with its own start values, (channels, height, width) of its input).

    Args:
        name: a timm name; "transformers:CLASS" or CLASS such as ViTModel or Dinov2Config (its defaults, or a
            config.json or its folder); a torchvision builder such as vit_b_16; or an open_clip name such as ViT-B-32,
            for its image tower.
        library: one of `fastvit.bench.LIBRARIES`, or "auto" to try what the name looks like.
        image_size: pixels; the model's own by default.

    Raises:
        UsageError: nothing goes by that name, or it can't be built.
        MissingLibraryError: its library is not installed.
    """
    if library == "auto":
        library = _guess_library(name)
    builder: Callable[[str, int | None], tuple[nn.Module, Size]] = {
        "timm": _timm,
        "transformers": _transformers,
        "torchvision": _torchvision,
        "open_clip": _open_clip,
    }[library]
    try:
        model, size = builder(name.removeprefix(f"{library}:"), image_size)
    except (UsageError, MissingLibraryError):
        raise
    except Exception as error:
        # Whatever a library thinks of its arguments.
        size_text = "" if image_size is None else f" for images of {image_size} pixels"
        raise UsageError(f"{name} can't be built{size_text}: {_one_line(error)}") from error
    return model.eval(), size


def try_forward(model: nn.Module, image: Tensor, name: str) -> Any:
    """The original model's output on `image`.

    Raises:
        UsageError: it can't take such an image.
    """
    try:
        return model(image)
    except Exception as error:
        raise UsageError(f"{name} can't take an image of shape {tuple(image.shape)}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _guess_library(name: str) -> str:
    for library in LIBRARIES:
        if name.startswith(f"{library}:"):
            return library
    if Path(name).exists() or name.endswith(".json") or (name[:1].isupper() and not {"_", "-"} & set(name)):
        return "transformers"
    if "/" in name:
        raise UsageError(
            f"{name!r} names a checkpoint on a hub, and nothing is downloaded here; give its class "
            "(such as Dinov2Model) or a local config.json"
        )
    if "-" in name:
        return "open_clip"
    return "torchvision" if name.startswith("vit_") and name.split("_")[1] in ("b", "l", "h") else "timm"


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; close: {', '.join(close)}" if close else ""


def _timm(name: str, image_size: int | None) -> tuple[nn.Module, Size]:
    timm: Any = import_library("timm")
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}{_close(name, timm.list_models())}")
    model = timm.create_model(name, **({} if image_size is None else {"img_size": image_size}))
    channels, *size = model.pretrained_cfg.get("input_size", (3, 224, 224))
    embed = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or size
    return model, (channels, height, width)


def _transformers(name: str, image_size: int | None) -> tuple[nn.Module, Size]:
    transformers: Any = import_library("transformers")
    path = Path(name)
    if path.exists() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text())
            config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{file} is no transformers config: {_one_line(error)}") from error
        model_class = None
    else:
        known = [n for n in dir(transformers) if n.endswith(("Config", "Model")) or "For" in n]
        if name not in known:
            raise UsageError(f"transformers has no class {name!r}{_close(name, known)}")
        cls = getattr(transformers, name)
        if not name.endswith("Config") and getattr(cls, "config_class", None) is None:
            raise UsageError(f"{name} is no single model; give a class such as ViTModel")
        model_class = None if name.endswith("Config") else cls
        config = cls() if model_class is None else cls.config_class()
    config = getattr(config, "vision_config", config) if model_class is None else config
    if image_size is not None:
        config.image_size = image_size
    if model_class is None:
        mapping = transformers.MODEL_MAPPING
        if type(config) not in mapping:
            raise UsageError(f"{name}: transformers has no model for {type(config).__name__}")
        model_class = mapping[type(config)]
    if (wanted := getattr(model_class, "main_input_name", "something else")) != "pixel_values":
        raise UsageError(f"{name}: takes {wanted}, not images")
    model = model_class(config)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model, (getattr(config, "num_channels", 3), height, width)


def _torchvision(name: str, image_size: int | None) -> tuple[nn.Module, Size]:
    models: Any = import_library("torchvision").models
    known = models.list_models()
    if name not in known:
        raise UsageError(f"torchvision has no model {name!r}{_close(name, known)}")
    size = image_size or 224
    model = models.get_model(name, **({} if image_size is None else {"image_size": size}))
    return model, (3, size, size)


def _open_clip(name: str, image_size: int | None) -> tuple[nn.Module, Size]:
    open_clip: Any = import_library("open_clip")
    known = open_clip.list_models()
    if name not in known:
        raise UsageError(f"open_clip has no model {name!r}{_close(name, known)}")
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    if image_size is not None:
        vision["image_size"] = image_size
    # Not the model's own, which may be downloaded.
    text = {"width": 64, "heads": 1, "layers": 1}
    model = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False)).visual
    size = model.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return model, (3, height, width)
