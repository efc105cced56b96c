"""timm's `eva.EvaBlock` and blocks like it: DINOv3, EVA-02, RoPE-ViT, the Perception Encoder, Sapiens2, Qwen3-VL's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.adapters.parts import (
    Angles,
    BlockParts,
    NotServed,
    Projection,
    RopeArgument,
    check_contents,
    check_linear,
    child,
    dropout,
    inner_norm,
    linear,
    tensor,
)
from fastvit.adapters.timm import check_mlp, read_mlp

LIBRARY = "eva"

CLASSIFIERS: set[tuple[str, str]] = set()

_BIASES = ("q_bias", "k_bias", "v_bias")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _read_angles(rope: Any) -> Angles:
    """sin and cos of a token's angles lie behind one another."""
    if not isinstance(rope, Tensor):
        raise NotServed(f"rope is {type(rope).__name__}")
    sin, cos = rope.chunk(2, -1)
    return cos, sin


ROPE = RopeArgument("rope", required=False, read=_read_angles, make=lambda angles: torch.cat(angles[::-1], -1))


def matches(block: nn.Module) -> bool:
    attn = child(block, "attn")
    return attn is not None and "rotate_half" in attn.__dict__ and child(block, "mlp") is not None


def check(block: Any) -> None:
    attn = block.attn
    check_contents(
        block, {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}, "block", {"gamma_1", "gamma_2"}
    )
    names = {"qkv", *_PROJECTIONS, "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}
    check_contents(attn, names, "attention", set(_BIASES))
    if (shared := getattr(attn, "num_kv_heads", attn.num_heads)) != attn.num_heads:
        raise NotServed(f"{attn.num_heads} heads share {shared} of keys and values")
    for name in _PROJECTIONS if attn.qkv is None else ("qkv",):
        check_linear(getattr(attn, name), f"attn.{name}")
    check_linear(attn.proj, "attn.proj")
    check_mlp(block.mlp)


def read_qkv(attn: nn.Module) -> tuple[tuple[Projection, ...], tuple[Tensor, ...]]:
    """The projections, and the biases that the one of a packed qkv is put together from."""
    if (qkv := child(attn, "qkv")) is None:
        return tuple(linear(child(attn, name)) for name in _PROJECTIONS), ()
    biases = tuple(tensor(attn, name) for name in _BIASES if getattr(attn, name, None) is not None)
    return ((tensor(qkv, "weight"), torch.cat(biases) if biases else tensor(qkv, "bias")),), biases


def read(block: nn.Module) -> BlockParts:
    attn: Any = child(block, "attn")
    mlp = child(block, "mlp")
    qkv, biases = read_qkv(attn)
    fc1, activation = read_mlp(mlp)
    drops = (child(attn, "attn_drop"), child(attn, "proj_drop"), child(mlp, "drop1"), child(mlp, "drop2"))
    return BlockParts(
        norm1=child(block, "norm1"),
        qkv=qkv,
        num_heads=attn.num_heads,
        scale=attn.head_dim**-0.5 if attn.fused_attn else attn.scale,  # torch's own, whatever attn says
        q_norm=inner_norm(attn, "q_norm"),
        k_norm=inner_norm(attn, "k_norm"),
        proj=linear(child(attn, "proj")),
        layer_scale1=getattr(block, "gamma_1", None),
        drop_path1=child(block, "drop_path1"),
        norm2=child(block, "norm2"),
        fc1=fc1,
        activation=activation,
        fc2=linear(child(mlp, "fc2")),
        layer_scale2=getattr(block, "gamma_2", None),
        drop_path2=child(block, "drop_path2"),
        dropouts=tuple(dropout(d) for d in drops if d is not None),
        proj_norm=inner_norm(attn, "norm"),
        fc2_norm=inner_norm(mlp, "norm"),
        rope_interleaved=not attn.rotate_half,
        rope_prefix=attn.num_prefix_tokens,
        copied=biases,
    )
