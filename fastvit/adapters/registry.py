"""The one registry of what `optimize` recognises.  The documentation's table is made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from fastvit.adapters import timm, torchvision, transformers
from fastvit.adapters.parts import NotServed, read_activation, read_norm
from fastvit.adapters.swap import Fused, FusedBlock, FusedPatchConv, probe

# Each adapter: LIBRARY, matches(block), read(block) -> BlockParts.
ADAPTERS: tuple[ModuleType, ...] = (timm, transformers, torchvision)


@dataclass(frozen=True)
class Family:
    """A row of the documentation's table; the tests build a model of each."""

    name: str
    library: str
    classes: str
    notes: str = ""


FAMILIES = (
    Family("ViT, AugReg", "timm", "vit_{tiny..giant}_patch*"),
    Family("DeiT, DeiT-3", "timm", "deit_*, deit3_*", "LayerScale, distillation token"),
    Family("CLIP", "timm", "vit_*_clip_*", "norm before the blocks, QuickGELU variants"),
    Family("SigLIP", "timm", "vit_*_siglip_*, vit_so400m_*", "blocks; the attention pooling head stays as it is"),
    Family("DINOv2", "timm", "vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2", "LayerScale, registers, SwiGLU giant"),
    Family("ViT", "transformers 4.57, 5", "ViTModel, ViTFor*"),
    Family("DeiT", "transformers 4.57, 5", "DeiTModel, DeiTFor*", "distillation token"),
    Family("CLIP vision", "transformers 4.57, 5", "CLIPVisionModel, CLIPModel", "the causal text tower runs as it was"),
    Family("SigLIP vision", "transformers 4.57, 5", "SiglipVisionModel, SiglipModel", "head dim 72, MLP 4304"),
    Family(
        "DINOv2", "transformers 4.57, 5", "Dinov2Model, Dinov2WithRegistersModel", "LayerScale, DropPath, SwiGLU giant"
    ),
    Family("ViT", "torchvision", "vit_b_16 ... vit_h_14", "nn.MultiheadAttention"),
)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one module: a mixin to swap in, or the reason why it stays."""

    mixin: type[Fused] | None
    library: Any = None
    reason: str = ""


def judge_block(module: nn.Module) -> Verdict | None:
    """A verdict on a transformer block; None for a module that is no block."""
    for adapter in ADAPTERS:
        if adapter.matches(module):
            try:
                parts = adapter.read(module)
                for norm in (parts.norm1, parts.norm2):
                    read_norm(norm, parts.qkv[0][0].dtype)
                if not isinstance(parts.activation, str):
                    read_activation(parts.activation)
            except (NotServed, AttributeError) as reason:
                return Verdict(None, reason=str(reason))
            if difference := probe(module, adapter):
                return Verdict(None, reason=difference)
            return Verdict(FusedBlock, adapter)
    if _looks_like_block(module):
        return Verdict(None, reason="no adapter knows this kind of block")
    return None


def judge_patch_conv(module: nn.Module) -> Verdict | None:
    """A verdict on a patch-embedding convolution: stride equal to kernel, nothing else special."""
    if type(module) is not nn.Conv2d or module.kernel_size == (1, 1) or module.stride != module.kernel_size:
        return None
    plain = module.padding in ("valid", 0, (0, 0)) and module.dilation == (1, 1) and module.groups == 1
    return Verdict(FusedPatchConv) if plain else None


_ATTENTION, _MLP, _NORM = (
    re.compile(p, re.I) for p in (r"attn|attention", r"mlp|ffn|intermediate|linear1", r"norm|ln_")
)


def _looks_like_block(module: nn.Module) -> bool:
    """Has it children that attend, children that mix channels, and a norm?  Containers of blocks have not."""
    names = [name for name, _ in module.named_children()]
    if any(p.ndim == 3 for p in module.parameters(recurse=False)):
        return False  # it brings its own query: attention pooling
    return all(any(pattern.search(name) for name in names) for pattern in (_ATTENTION, _MLP, _NORM))
