"""timm's `vision_transformer.Block` (ViT, DeiT, DeiT-3, CLIP, SigLIP, DINOv2 and the like) and fastvit's."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.parts import (
    BlockParts,
    NotServed,
    Projection,
    Readout,
    check_contents,
    check_layer_scale,
    check_linear,
    child,
    dropout,
    inner_norm,
    layer_scale,
    linear,
    tensor,
)
from fastvit.nn import SwiGLU

LIBRARY = "timm"

ROPE = None

CLASSIFIERS = {
    ("timm.models.vision_transformer", "VisionTransformer"),
    ("timm.models.deit", "VisionTransformerDistilled"),
    ("fastvit.models.vit", "FastViT"),
}


def matches(block: nn.Module) -> bool:
    # Children of its own: wrappers (activation checkpointing, FSDP1) show those of the block inside as attributes.
    attn, mlp = child(block, "attn"), child(block, "mlp")
    return hasattr(attn, "qkv") and hasattr(attn, "proj") and hasattr(mlp, "fc2") and "norm2" in block._modules


def check(block: Any) -> None:
    attn = block.attn
    check_contents(block, {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}, "block")
    check_contents(attn, {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"}, "attention")
    check_linear(attn.qkv, "attn.qkv")
    check_linear(attn.proj, "attn.proj")
    check_layer_scale(getattr(block, "ls1", None), "gamma")
    check_layer_scale(getattr(block, "ls2", None), "gamma")
    check_mlp(block.mlp)


def check_mlp(mlp: Any) -> None:
    if hasattr(mlp, "fc1_g"):
        check_contents(mlp, {"fc1_g", "fc1_x", "act", "drop1", "norm", "fc2", "drop2"}, "MLP")
        check_linear(mlp.fc1_g, "mlp.fc1_g")
        check_linear(mlp.fc1_x, "mlp.fc1_x")
    else:
        # The original DINOv2 code has one `drop`.
        check_contents(mlp, {"fc1", "act", "drop", "drop1", "norm", "fc2", "drop2"}, "MLP")
        check_linear(mlp.fc1, "mlp.fc1")
    check_linear(mlp.fc2, "mlp.fc2")


def read(block: nn.Module) -> BlockParts:
    attn, mlp = child(block, "attn"), child(block, "mlp")
    qkv = child(attn, "qkv")
    fc1, activation = read_mlp(mlp)
    drops = (child(attn, "attn_drop"), child(attn, "proj_drop"), *(child(mlp, n) for n in ("drop", "drop1", "drop2")))
    scale = attn.scale
    if attn.__dict__.get("fused_attn"):
        scale = (tensor(qkv, "weight").shape[0] // (3 * attn.num_heads)) ** -0.5  # torch's own, whatever attn says
    return BlockParts(
        norm1=child(block, "norm1"),
        qkv=(linear(qkv),),
        num_heads=attn.num_heads,
        scale=scale,
        q_norm=inner_norm(attn, "q_norm"),
        k_norm=inner_norm(attn, "k_norm"),
        proj=linear(child(attn, "proj")),
        layer_scale1=layer_scale(child(block, "ls1"), "gamma"),
        drop_path1=child(block, "drop_path1"),
        norm2=child(block, "norm2"),
        fc1=fc1,
        activation=activation,
        fc2=linear(child(mlp, "fc2")),
        layer_scale2=layer_scale(child(block, "ls2"), "gamma"),
        drop_path2=child(block, "drop_path2"),
        dropouts=tuple(dropout(d) for d in drops if d is not None),
        proj_norm=inner_norm(attn, "norm"),
        fc2_norm=inner_norm(mlp, "norm"),
    )


def read_mlp(mlp: Any) -> tuple[tuple[Projection, ...], Any]:
    """fc1 and the activation, as in `BlockParts`."""
    activation = child(mlp, "act")
    if (gate := child(mlp, "fc1_g")) is not None:
        fc1: tuple[Projection, ...] = (linear(gate), linear(child(mlp, "fc1_x")))
    else:
        fc1 = (linear(child(mlp, "fc1")),)
        if (gate_last := mlp.__dict__.get("gate_last")) is not None:
            # GluMlp halves fc1's output; SwiGLUPacked has SiLU's half first.
            if gate_last or type(activation) is not nn.SiLU:
                raise NotServed(f"MLP is gated by {type(activation).__name__}, gate_last={gate_last}")
            activation = "swiglu"
        elif type(mlp) is SwiGLU:
            activation = "swiglu"
    return fc1, activation


def readout(model: Any) -> Readout | None:
    distilled = hasattr(model, "head_dist")
    if not distilled and (model.global_pool != "token" or model.attn_pool is not None):
        return None
    return Readout(model.blocks, 2 if distilled else 1, (model, model.blocks), (model.norm, model.fc_norm))
