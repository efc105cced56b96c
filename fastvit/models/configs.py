"""Model names and what they mean, as data.

A name is {variant}_{size}_patch{P}_{family}[_{image size}], for instance vit_base_patch16_224, deit3_small_patch16_384,
vit_large_patch14_dinov2 or vit_so400m_patch14_siglip_384.  Any patch and image size can be asked for: the names that
`list_models` shows are those that checkpoints exist for.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

# Zhai et al. 2021 ("Scaling Vision Transformers") for giant and gigantic; Alabdulmohsin et al. 2023 for so400m.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_ratio": 3.7362},
}

_DINOV2 = {"init_values": 1e-5, "num_classes": 0, "img_size": 518}
FAMILIES: dict[str, dict[str, Any]] = {
    "": {},
    "clip": {"pre_norm": True, "norm_eps": 1e-5, "num_classes": 512},
    "clip_quickgelu": {"pre_norm": True, "norm_eps": 1e-5, "num_classes": 512, "act_layer": "quick_gelu"},
    "siglip": {"class_token": False, "global_pool": "map", "num_classes": 0},
    "dinov2": _DINOV2,
    "reg4_dinov2": {**_DINOV2, "reg_tokens": 4, "no_embed_class": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
}
# Where a family has a size of its own.
_DINOV2_GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "mlp_layer": "swiglu"}
SPECIAL_SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("giant", "dinov2"): _DINOV2_GIANT,
    ("giant", "reg4_dinov2"): _DINOV2_GIANT,
}

_NAMES = """
vit_tiny_patch16_224 vit_tiny_patch16_384 vit_small_patch8_224 vit_small_patch16_224 vit_small_patch16_384
vit_small_patch32_224 vit_small_patch32_384 vit_base_patch8_224 vit_base_patch16_224 vit_base_patch16_384
vit_base_patch32_224 vit_base_patch32_384 vit_large_patch14_224 vit_large_patch16_224 vit_large_patch16_384
vit_large_patch32_224 vit_large_patch32_384 vit_huge_patch14_224 vit_giant_patch14_224 vit_gigantic_patch14_224
deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384
deit3_small_patch16_224 deit3_small_patch16_384 deit3_base_patch16_224 deit3_base_patch16_384 deit3_large_patch16_224
deit3_large_patch16_384 deit3_huge_patch14_224
vit_base_patch16_clip_224 vit_base_patch16_clip_384 vit_base_patch32_clip_224 vit_large_patch14_clip_224
vit_large_patch14_clip_336 vit_huge_patch14_clip_224 vit_huge_patch14_clip_336
vit_base_patch16_clip_quickgelu_224 vit_base_patch32_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_224
vit_large_patch14_clip_quickgelu_336
vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384 vit_base_patch16_siglip_512
vit_large_patch16_siglip_256 vit_large_patch16_siglip_384 vit_so400m_patch14_siglip_224 vit_so400m_patch14_siglip_384
vit_small_patch14_dinov2 vit_base_patch14_dinov2 vit_large_patch14_dinov2 vit_giant_patch14_dinov2
vit_small_patch14_reg4_dinov2 vit_base_patch14_reg4_dinov2 vit_large_patch14_reg4_dinov2 vit_giant_patch14_reg4_dinov2
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())

_PATTERN = re.compile(
    rf"(?P<variant>{'|'.join(VARIANTS)})_(?P<size>{'|'.join(SIZES)})_patch(?P<patch>\d+)"
    rf"(?:_(?P<family>{'|'.join(sorted(filter(None, FAMILIES), key=len, reverse=True))}))?(?:_(?P<image>\d+))?"
)
# The width of CLIP's joint embedding follows the tower's size.
_CLIP_CLASSES = {"base": 512, "large": 768, "huge": 1024}


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments of FastViT for a model name.

    Raises:
        ValueError: the name says nothing; the message holds the closest known ones.
    """
    match = _PATTERN.fullmatch(name)
    if match is None:
        close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
        hint = f"; close: {', '.join(close)}" if close else "; fastvit.list_models() shows the known names"
        raise ValueError(f"name: {name!r} is no model{hint}")
    size, family, patch = match["size"], match["family"] or "", int(match["patch"])
    result = {
        **SPECIAL_SIZES.get((size, family), SIZES[size]),
        **FAMILIES[family],
        **VARIANTS[match["variant"]],
        "patch_size": patch,
    }
    if family.startswith("clip"):
        result["num_classes"] = _CLIP_CLASSES.get(size, 512)
    if match["image"]:
        result["img_size"] = int(match["image"])
    elif "img_size" not in result:
        result["img_size"] = 224
    if not 1 <= patch <= result["img_size"]:
        raise ValueError(f"name: {name!r} has a patch of {patch}; accepted: 1 to the image size {result['img_size']}")
    return result
