"""torchvision's `vision_transformer.EncoderBlock` (vit_b_16 ...), whose attention is nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.parts import (
    BlockParts,
    NotServed,
    Readout,
    check_contents,
    check_multihead_attention,
    child,
    dropout,
    linear,
    tensor,
)

LIBRARY = "torchvision"

ROPE = None

CLASSIFIERS = {("torchvision.models.vision_transformer", "VisionTransformer")}


def matches(block: nn.Module) -> bool:
    return isinstance(child(block, "self_attention"), nn.MultiheadAttention) and "ln_2" in block._modules


def check(block: Any) -> None:
    check_contents(block, {"ln_1", "self_attention", "dropout", "ln_2", "mlp"}, "block")
    check_multihead_attention(block.self_attention, "self_attention")
    kinds = [type(m) for m in block.mlp if type(m) is not nn.Dropout]
    if kinds != [nn.Linear, nn.GELU, nn.Linear]:
        raise NotServed("MLP is not Linear, GELU, Linear")


def read(block: nn.Module) -> BlockParts:
    attn = child(block, "self_attention")
    layers = list(child(block, "mlp")._modules.values())
    fc1, act, fc2 = (m for m in layers if type(m) is not nn.Dropout)
    drops = [child(block, "dropout"), *(m for m in layers if type(m) is nn.Dropout)]
    return BlockParts(
        norm1=child(block, "ln_1"),
        qkv=((tensor(attn, "in_proj_weight"), tensor(attn, "in_proj_bias")),),
        num_heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        q_norm=None,
        k_norm=None,
        proj=linear(child(attn, "out_proj")),
        layer_scale1=None,
        drop_path1=None,
        norm2=child(block, "ln_2"),
        fc1=(linear(fc1),),
        activation=act,
        fc2=linear(fc2),
        layer_scale2=None,
        drop_path2=None,
        dropouts=((attn.dropout, attn), *map(dropout, drops)),
    )


def readout(model: Any) -> Readout | None:
    encoder = model.encoder
    return Readout(encoder.layers, 1, (model, encoder, encoder.layers), (encoder.ln,))
