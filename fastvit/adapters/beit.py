"""timm's `beit.Block` (BEiT, BEiT v2), whose scores have a bias for each pair of positions (Bao et al. 2021)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.eva import read_qkv
from fastvit.adapters.parts import BlockParts, check_contents, check_linear, child, dropout, inner_norm, linear
from fastvit.adapters.timm import check_mlp, read_mlp

LIBRARY = "beit"

ROPE = None

CLASSIFIERS: set[tuple[str, str]] = set()

_TABLES = {"relative_position_bias_table", "relative_position_index"}


def matches(block: nn.Module) -> bool:
    attn = child(block, "attn")
    return hasattr(attn, "_get_rel_pos_bias") and child(attn, "qkv") is not None and child(block, "mlp") is not None


def check(block: Any) -> None:
    attn = block.attn
    check_contents(
        block, {"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"}, "block", {"gamma_1", "gamma_2"}
    )
    inside = {"qkv", "attn_drop", "proj", "proj_drop"}
    check_contents(attn, inside, "attention", {"q_bias", "k_bias", "v_bias", *_TABLES})
    check_linear(attn.qkv, "attn.qkv")
    check_linear(attn.proj, "attn.proj")
    check_mlp(block.mlp)


def read(block: nn.Module) -> BlockParts:
    attn: Any = child(block, "attn")
    mlp = child(block, "mlp")
    qkv, biases = read_qkv(attn)
    fc1, activation = read_mlp(mlp)
    drops = (child(attn, "attn_drop"), child(attn, "proj_drop"), child(mlp, "drop1"), child(mlp, "drop2"))
    head_dim = qkv[0][0].shape[0] // (3 * attn.num_heads)
    return BlockParts(
        norm1=child(block, "norm1"),
        qkv=qkv,
        num_heads=attn.num_heads,
        scale=head_dim**-0.5 if attn.fused_attn else attn.scale,  # torch's own, whatever attn says
        q_norm=None,
        k_norm=None,
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
        fc2_norm=inner_norm(mlp, "norm"),
        copied=biases,
        bias=None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias(),
    )
