"""The one registry of what `optimize` recognises.  The documentation's table is made from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.adapters import beit, eva, open_clip, timm, torchvision, transformers
from fastvit.adapters.parts import (
    BlockParts,
    NotServed,
    explain,
    input_obstacle,
    own_numbers,
    read_activation,
    read_norm,
    run_block,
)
from fastvit.adapters.probe import probe
from fastvit.adapters.readout import FusedReadout
from fastvit.adapters.swap import FusedBlock, FusedPatchConv, demands, fused_class, rope_argument
from fastvit.nn._listeners import descendants, has_own_forward, listener_obstacle
from fastvit.ops import use_backend

# Each adapter: LIBRARY, its module's name; matches(block), does it look like one of its own; check(block), which raises
# NotServed for a structure that it can't express; read(block) -> BlockParts, at every call; ROPE, how blocks are told
# rotary positions, or None.  And of whole models: CLASSIFIERS, (module, name) of classes whose head reads the first
# tokens; readout(model) -> Readout or None, likewise.
ADAPTERS: tuple[ModuleType, ...] = (eva, beit, timm, transformers, torchvision, open_clip)


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
    Family(
        "DINOv3", "timm", "vit_*_patch16_dinov3, ..._dinov3_qkvb", "rotary positions, packed and unpacked SwiGLU sizes"
    ),
    Family(
        "EVA-02, RoPE-ViT, Perception Encoder",
        "timm",
        "eva02_*, vit_*_rope_*, vit_pe_*",
        "norms inside a block too; mixed RoPE and eva02_enormous (post-norm) stay as they are",
    ),
    Family("BEiT, BEiT v2", "timm", "beit_*, beitv2_*", "relative positions for the image size that the model has"),
    Family(
        "Sapiens2, and the image towers of Qwen3 and DeepSeek",
        "timm",
        "vit_*_sapiens2, qwen3_vit_*, deepseek_vit_*",
        "RMSNorm; where heads share keys and values a block stays as it is",
    ),
    Family("ViT", "transformers 4.57, 5", "ViTModel, ViTFor*"),
    Family("DeiT", "transformers 4.57, 5", "DeiTModel, DeiTFor*", "distillation token"),
    Family("CLIP vision", "transformers 4.57, 5", "CLIPVisionModel, CLIPModel", "the causal text tower runs as it was"),
    Family("SigLIP vision", "transformers 4.57, 5", "SiglipVisionModel, SiglipModel", "head dim 72, MLP 4304"),
    Family(
        "DINOv2", "transformers 4.57, 5", "Dinov2Model, Dinov2WithRegistersModel", "LayerScale, DropPath, SwiGLU giant"
    ),
    Family("DINOv3", "transformers 4.57, 5", "DINOv3ViTModel", "rotary positions, gated MLP"),
    Family(
        "AIMv2, InternVL and BLIP vision",
        "transformers 4.57, 5",
        "Aimv2VisionModel, InternVLVisionModel, BlipVisionModel, Blip2VisionModel",
        "RMSNorm, gated MLP; InternVL of 6B, with norms of q and k, stays as it is",
    ),
    Family("ViT", "torchvision", "vit_b_16 ... vit_h_14", "nn.MultiheadAttention"),
    Family(
        "CLIP, CoCa",
        "open_clip 3",
        "ViT-*, coca_ViT-*",
        "norms inside a block too; the causal text tower runs as it was",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What becomes of one module: the class to swap in, or the reason why it stays.

    reason: with a class, why calls would run the original forward all the same.
    strict: does `optimize(strict=True)` ask for this module?
    """

    cls: type[nn.Module] | None = None
    sentence: str = ""
    reason: str = ""
    strict: bool = True


def judge_block(module: nn.Module, path: str = "", model: nn.Module | None = None) -> Verdict | None:
    """A verdict on a transformer block or an attention pooling head; None for other modules.

    path, model: where it is in what.
    """
    if isinstance(module, torch.jit.ScriptModule):
        compiled = Verdict(reason="torch.jit.script has compiled it: optimize before")
        return None if _judge_looks(module) is None else compiled
    for adapter in ADAPTERS:
        if adapter.matches(module):
            return _judge_match(module, adapter, path, module if model is None else model)
    return _judge_looks(module)


def _judge_match(module: nn.Module, adapter: Any, path: str, model: nn.Module) -> Verdict:
    if verdict := _judge_callers(type(module), adapter, path, model):
        return verdict
    if not has_own_forward(module):
        return Verdict(reason="its forward was replaced on the instance")
    try:
        adapter.check(module)
        parts = adapter.read(module)
        for norm in (parts.norm1, parts.norm2):
            read_norm(norm, parts.qkv[0][0].dtype)
        if not isinstance(parts.activation, str):
            read_activation(parts.activation)
    except (NotServed, AttributeError) as error:
        return Verdict(reason=explain(error))
    proof = probe(module, adapter, model)
    if proof.obstacle is not None:
        return Verdict(reason=proof.obstacle)
    inner = descendants(module)
    types, numbers = tuple(type(m) for m in inner), own_numbers([module, *inner])
    cls = fused_class(type(module), FusedBlock, adapter.LIBRARY, types, numbers, proof.returns_tuple)
    reason = listener_obstacle(inner) or _refusal(parts) or required_mask(type(module), path, model)
    return Verdict(cls, FusedBlock.fastvit_sentence, reason or "")


def _refusal(parts: BlockParts) -> str | None:
    """What the operators have against these tensors: an empty batch passes every check, and computes nothing."""
    weight = parts.qkv[0][0]
    if weight.is_meta:
        return None
    x = weight.new_empty(0, 1 if parts.bias is None else parts.bias.shape[-1], weight.shape[1])
    weights = tuple(t for projection in (*parts.qkv, parts.proj, *parts.fc1, parts.fc2) for t in projection)
    if obstacle := input_obstacle(x, weights, 3):
        return obstacle
    try:
        with torch.no_grad(), use_backend("reference"):
            run_block(parts._replace(drop_path1=None, drop_path2=None), x)
    except (NotServed, ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return None


# ---- How a model calls its blocks ------------------------------------------------------------------


def _callers(path: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules around a block, nearest first, up to the one that makes hidden states: it has more than blocks."""
    while path:
        path = path.rpartition(".")[0]
        caller = model.get_submodule(path)
        yield caller
        if not isinstance(caller, (nn.ModuleList, nn.Sequential)) and len([*caller.children()]) > 1:
            return


def _judge_callers(cls: type[nn.Module], adapter: Any, path: str, model: nn.Module) -> Verdict | None:
    """A verdict on a block that is never called with what the fused path takes alone."""
    rope = rope_argument(adapter, cls)
    others = [d for d in demands(cls) if rope is None or d != rope.name]
    for caller in _callers(path, model):
        name = type(caller).__name__
        # What makes a position bias for all blocks goes by the name under which they take it.
        given = [d for d in others if isinstance(getattr(caller, d, None), (nn.Module, Tensor))]
        if given and all(_is_causal(getattr(caller, d)) for d in given):
            return _called_with_a_causal_mask(name)
        if given:
            return Verdict(reason=f"{name} calls it with {', '.join(given)}")
        # timm's name for angles that each head has of its own (Heo et al. 2024).
        if rope is not None and getattr(caller, "rope_mixed", False):
            return Verdict(reason=f"{name} calls it with a rotation of its own for each head")
        code = getattr(inspect.unwrap(type(caller).forward), "__code__", None)
        if code is not None and any(re.search("create_.*causal_.*mask", called) for called in code.co_names):
            return _called_with_a_causal_mask(name)
    return None


def _is_causal(mask: Any) -> bool:
    """Does this tensor keep each token from the later ones, and from no other?"""
    if not isinstance(mask, Tensor) or mask.is_meta or not mask.is_floating_point():
        return False
    return mask.ndim == 2 and torch.equal(mask.isneginf(), torch.ones_like(mask, dtype=torch.bool).triu(1))


def _called_with_a_causal_mask(name: str) -> Verdict:
    return Verdict(reason=f"{name} calls it with a causal mask", strict=False)  # a text tower, which nobody asks for


def required_mask(cls: type[nn.Module], path: str, model: nn.Module) -> str | None:
    """Why calls may have a mask: somebody around the block doesn't run without; or None."""
    masks = tuple(d for d in demands(cls) if d.endswith("mask"))
    for caller in _callers(path, model):
        for p in inspect.signature(type(caller).forward).parameters.values():
            if masks and p.name.endswith(masks) and p.default is p.empty:
                return f"{type(caller).__name__} requires {p.name}, and what it masks needs the original forward"
    return None


def judge_classifier(module: nn.Module) -> Verdict | None:
    """A verdict on a model whose head reads the first tokens alone."""
    name = (type(module).__module__, type(module).__name__)
    for adapter in ADAPTERS:
        if name in adapter.CLASSIFIERS and has_own_forward(module):
            return Verdict(fused_class(type(module), FusedReadout, adapter.LIBRARY), FusedReadout.fastvit_sentence)
    return None


_PATCH_CONV_NAMES = ("proj", "projection", "patch_embedding", "patch_embeddings", "patch_embed", "conv_proj", "conv1")


def judge_patch_conv(path: str, module: nn.Module) -> Verdict | None:
    """A verdict on a patch-embedding convolution: stride equal to kernel, nothing else special."""
    if type(module) is not nn.Conv2d or module.kernel_size == (1, 1) or module.stride != module.kernel_size:
        return None
    if path.rpartition(".")[2] not in _PATCH_CONV_NAMES or not has_own_forward(module):
        return None
    plain = module.padding in ("valid", 0, (0, 0)) and module.dilation == (1, 1) and module.groups == 1
    return Verdict(fused_class(nn.Conv2d, FusedPatchConv), FusedPatchConv.fastvit_sentence) if plain else None


_ATTENTION, _MLP, _NORM = (
    re.compile(p, re.I) for p in (r"attn|attention", r"mlp|ffn|intermediate|linear1", r"norm|^ln_|^ln\d")
)


def _judge_looks(module: nn.Module) -> Verdict | None:
    """Has it children that attend, children that mix channels, and a norm somewhere?  Containers of blocks have not."""
    names = [name for name, _ in module.named_children()]
    if {"attention", "attn", "kv"} & set(names) and any(p.ndim == 3 for p in module.parameters(recurse=False)):
        # It brings its own query.
        return Verdict(reason="attention pooling runs as it was", strict=False)
    if not all(any(pattern.search(name) for name in names) for pattern in (_ATTENTION, _MLP)):
        return None
    if not any(_NORM.search(path.rpartition(".")[2]) for path, _ in module.named_modules()):
        return None
    return Verdict(reason="no adapter knows this kind of block")
