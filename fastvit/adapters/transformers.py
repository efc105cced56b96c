"""transformers' encoder layers: ViT, DeiT, CLIP vision, SigLIP vision, Dinov2 (with registers), in versions 4.57 and 5.

The versions and families differ in names alone, so each name is looked up among the ones that the library has used.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastvit.adapters.parts import BlockParts, NotServed, Projection, check_children, linear

LIBRARY = "transformers"


def first(module: nn.Module, *names: str) -> Any:
    """The first attribute that exists, or None."""
    for name in names:
        if (value := getattr(module, name, None)) is not None:
            return value
    return None


def matches(block: nn.Module) -> bool:
    attn = first(block, "attention", "self_attn")
    if not isinstance(attn, nn.Module):
        return False
    inner = getattr(attn, "attention", attn)
    return (
        first(inner, "q_proj", "query") is not None
        and first(block, "layernorm_before", "layer_norm1", "norm1") is not None
    )


def read(block: nn.Module) -> BlockParts:
    norm1 = first(block, "layernorm_before", "layer_norm1", "norm1")
    norm2 = first(block, "layernorm_after", "layer_norm2", "norm2")
    if norm1 is None or norm2 is None:
        raise NotServed("no norm before attention or MLP")
    outer = first(block, "attention", "self_attn")
    # Version 4 nests: attention.attention.query, attention.output.dense.
    attn = getattr(outer, "attention", outer)
    output = getattr(outer, "output", None)
    proj = output.dense if output is not None else first(attn, "o_proj", "out_proj")
    q, k, v = (first(attn, a, b) for a, b in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")))
    if any(m is None for m in (proj, q, k, v)):
        raise NotServed("attention has no separate q, k, v and output projections")
    check_children(attn, {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value"}, "attention")
    if getattr(attn, "is_causal", False):
        raise NotServed("attention is causal")

    fc1, activation, fc2, containers = _read_mlp(block)
    check_children(
        block,
        {
            "attention", "self_attn", "layernorm_before", "layer_norm1", "norm1", "layernorm_after", "layer_norm2",
            "norm2", "mlp", "intermediate", "output", "dropout", "layer_scale1", "layer_scale2", "drop_path",
        },
    )  # fmt: skip
    dropouts = [m for parent in (block, output, getattr(block, "output", None)) for m in _dropout_of(parent)]
    layer_scale1, layer_scale2 = getattr(block, "layer_scale1", None), getattr(block, "layer_scale2", None)
    drop_path = getattr(block, "drop_path", None)
    attention_dropout = first(attn, "dropout_prob", "attention_dropout", "dropout")
    skipped = (
        norm1, outer, attn, q, k, v, output, proj, layer_scale1, drop_path, norm2, *containers, layer_scale2, *dropouts
    )  # fmt: skip
    return BlockParts(
        norm1=norm1,
        qkv=(linear(q, "query"), linear(k, "key"), linear(v, "value")),
        num_heads=first(attn, "num_attention_heads", "num_heads"),
        scale=first(attn, "scaling", "scale"),
        q_norm=None,
        k_norm=None,
        proj=linear(proj, "output projection"),
        layer_scale1=getattr(layer_scale1, "lambda1", None),
        drop_path1=drop_path,
        norm2=norm2,
        fc1=fc1,
        activation=activation,
        fc2=fc2,
        layer_scale2=getattr(layer_scale2, "lambda1", None),
        drop_path2=drop_path,
        dropouts=(float(attention_dropout or 0.0), *(d.p for d in dropouts)),
        bypassed=tuple(m for m in skipped if m is not None),
    )


def _dropout_of(module: nn.Module | None) -> list[nn.Dropout]:
    dropout = getattr(module, "dropout", None)
    return [dropout] if isinstance(dropout, nn.Dropout) else []


def _read_mlp(
    block: nn.Module,
) -> tuple[tuple[Projection, ...], nn.Module | str, Projection, tuple[nn.Module, ...]]:
    """fc1, activation, fc2 and the modules that the fused path skips."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        # ViT of version 4: intermediate.dense, intermediate.intermediate_act_fn, output.dense.
        intermediate, output = getattr(block, "intermediate", None), getattr(block, "output", None)
        if intermediate is None or output is None:
            raise NotServed("no MLP")
        check_children(intermediate, {"dense", "intermediate_act_fn"}, "MLP")
        check_children(output, {"dense", "dropout"}, "MLP")
        act = intermediate.intermediate_act_fn
        skipped = (intermediate, intermediate.dense, act, output, output.dense)
        return (linear(intermediate.dense, "fc1"),), act, linear(output.dense, "fc2"), skipped
    if (packed := getattr(mlp, "weights_in", None)) is not None:
        check_children(mlp, {"weights_in", "weights_out"}, "MLP")
        skipped = (mlp, packed, mlp.weights_out)
        return (linear(packed, "weights_in"),), "swiglu", linear(mlp.weights_out, "weights_out"), skipped
    if (gate := getattr(mlp, "gate_proj", None)) is not None:
        check_children(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"}, "MLP")
        skipped = (mlp, gate, mlp.up_proj, mlp.act_fn, mlp.down_proj)
        pair = (linear(gate, "gate_proj"), linear(mlp.up_proj, "up_proj"))
        return pair, mlp.act_fn, linear(mlp.down_proj, "down_proj"), skipped
    check_children(mlp, {"fc1", "activation", "activation_fn", "fc2"}, "MLP")
    act = first(mlp, "activation_fn", "activation")
    if act is None or getattr(mlp, "fc1", None) is None:
        raise NotServed("MLP has no fc1 and activation")
    return (linear(mlp.fc1, "fc1"),), act, linear(mlp.fc2, "fc2"), (mlp, mlp.fc1, act, mlp.fc2)
