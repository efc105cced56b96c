"""Checkpoints of timm, transformers (4 and 5), torchvision, open_clip and the original JAX code.

They are told apart by their keys.  Each layout is a table of renamings towards timm's keys, which are FastViT's own.
Nothing is copied into the model before every tensor has found its place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.models.vit import FastViT
from fastvit.reference import interpolate_pos_embed

State = dict[str, Tensor]
_SHOWN = 12


def load_checkpoint(model: FastViT, checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> FastViT:
    """Load weights in any known layout into `model`, all or nothing.  Returns the model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown layout, missing or unexpected keys, or a shape that does not fit.
    """
    source = "checkpoint" if isinstance(checkpoint, Mapping) else str(checkpoint)
    raw = _unwrap(checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint)))
    layout, state = _to_timm(raw, source)
    _fit(model, state, f"{source} ({layout} layout)")
    model.load_state_dict(state)
    return model


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is no file")
    try:
        return _parse(path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each format's library has errors of its own
        raise ValueError(f"checkpoint: {path} can't be read: {error}") from error


def _parse(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            return {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in arrays.files}
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("reading .safetensors needs the safetensors package: pip install safetensors") from error
        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}; accepted: a state dict")
    return loaded


def _unwrap(state: Mapping[str, Any]) -> State:
    """The innermost state dict, without training wrappers."""
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model", "teacher"):
        if isinstance(state.get(wrapper), Mapping):
            return _unwrap(state[wrapper])
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    for prefix in ("module.", "_orig_mod.", "backbone."):
        if tensors and all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def _to_timm(state: State, source: str) -> tuple[str, State]:
    """(layout's name, state with timm's keys)."""
    for name, marker, convert in _LAYOUTS:
        if any(re.search(marker, key) for key in state):
            return name, convert(state)
    shown = ", ".join(list(state)[:_SHOWN]) or "no tensors"
    raise ValueError(
        f"checkpoint: {source} has an unknown layout (keys: {shown}); "
        f"accepted: {', '.join(name for name, _, _ in _LAYOUTS)}"
    )


# ---- Renaming -------------------------------------------------------------------------------------

_Rule = tuple[str, str]


def _rename(state: State, rules: tuple[_Rule, ...], drop: str = "") -> State:
    """Apply each rule whose pattern matches to each key; keys that match `drop` are left out."""
    result: State = {}
    for key, value in state.items():
        if drop and re.search(drop, key):
            continue
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        result[new] = value
    return result


def _join(state: State, parts: str, whole: str) -> State:
    """Concatenate `{block}.{part}.{weight|bias}` of the parts, in order, as `{block}.{whole}.*`."""
    names = parts.split()
    for key in [k for k in state if re.search(rf"\.{names[0]}\.(weight|bias)$", k)]:
        block, leaf = key.rsplit(f".{names[0]}.", 1)
        pieces = [state.pop(f"{block}.{name}.{leaf}", None) for name in names]
        if any(p is None for p in pieces):
            # A projection without bias beside ones with it: its bias is zero.
            size = next(p for p in pieces if p is not None)
            pieces = [torch.zeros_like(size) if p is None else p for p in pieces]
        state[f"{block}.{whole}.{leaf}"] = torch.cat([p for p in pieces if p is not None])
    return state


def _batch(state: State) -> None:
    """Class token and positions as timm has them, (1, N, D)."""
    for key, ndim in (("cls_token", 1), ("pos_embed", 2)):
        if (value := state.get(key)) is not None and value.ndim == ndim:
            state[key] = value.reshape(1, -1, value.shape[-1])


def _timm(state: State) -> State:
    return state


_TORCHVISION: tuple[_Rule, ...] = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_1\.", ".norm1."),
    (r"\.ln_2\.", ".norm2."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^heads\.head\.", "head."),
)


def _torchvision(state: State) -> State:
    return _rename(state, _TORCHVISION)


_TRANSFORMERS: tuple[_Rule, ...] = (
    # Models inside models: ViTForImageClassification, CLIPModel, version 4's vision_model.
    (r"^(vit|deit|dinov2|dinov2_with_registers|model)\.", ""),
    (r"^vision_model\.", ""),
    # Embeddings.
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.(register_tokens|distillation_token)$", "reg_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    # Blocks.
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.(attention|self_attn)\.", ".attn."),
    (r"\.attn\.query\.", ".attn.q_proj."),
    (r"\.attn\.key\.", ".attn.k_proj."),
    (r"\.attn\.value\.", ".attn.v_proj."),
    (r"\.attn\.(o_proj|out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    # Ends.
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(classifier|visual_projection)\.", "head."),
    # SigLIP's attention pooling.
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attn\.out_proj\.", "attn_pool.proj."),
    (r"^head\.(?:attention|attn)\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attn\.proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
# What no tower computes with: the text side, poolers, mask tokens, index buffers.
_TRANSFORMERS_DROP = (
    r"^text_model\.|^text_projection|logit_scale|logit_bias|pooler\.|mask_token|position_ids|distillation_classifier"
)


def _transformers(state: State) -> State:
    projection = state.get("visual_projection.weight")
    state = _rename(state, _TRANSFORMERS, _TRANSFORMERS_DROP)
    if projection is not None:  # CLIP's has no bias
        state["head.bias"] = torch.zeros(len(projection))
    state = _join(state, "q_proj k_proj v_proj", "qkv")
    state = _join(state, "gate_proj up_proj", "fc1")
    for leaf in ("weight", "bias"):
        if (packed := state.pop(f"attn_pool.in_proj.{leaf}", None)) is not None:
            dim = packed.shape[0] // 3
            state[f"attn_pool.q.{leaf}"], state[f"attn_pool.kv.{leaf}"] = packed[:dim], packed[dim:]
    _batch(state)
    # Dinov2ForImageClassification's head sees class token and mean patch token side by side.
    head, positions = state.get("head.weight"), state.get("pos_embed")
    if head is not None and positions is not None and head.shape[1] == 2 * positions.shape[-1]:
        raise ValueError(
            "checkpoint: the classifier takes class token and mean patch token together, FastViT's takes one of them; "
            "load the backbone without it (drop classifier.*) and num_classes=0"
        )
    return state


_OPEN_CLIP: tuple[_Rule, ...] = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _open_clip(state: State) -> State:
    """The image tower of open_clip's models and of the original CLIP code."""
    tower = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    state = _rename(tower or state, _OPEN_CLIP)
    _batch(state)
    if (head := state.get("head.weight")) is not None:
        state["head.weight"], state["head.bias"] = head.T.contiguous(), torch.zeros(head.shape[1])
    return state


def _jax(state: State) -> State:
    """Flax parameters: kernels are (in, out), attention kernels (D, heads, head_dim), convolutions HWIO."""
    prefix = next(k for k in state if k.endswith("embedding/kernel") and "pos" not in k)[: -len("embedding/kernel")]
    state = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    # big_vision may stack the blocks along a first axis.
    for key in [k for k in state if k.startswith("Transformer/encoderblock/")]:
        for i, value in enumerate(state.pop(key)):
            state[key.replace("encoderblock/", f"encoderblock_{i}/")] = value

    result: State = {}
    for key, value in state.items():
        name = _jax_name(key)
        if name is None:
            continue
        leaf = key.rsplit("/", 1)[-1]
        if leaf == "kernel" and "MultiHeadDotProductAttention" in key:
            # (D, H, d) -> (H d, D); out is (H, d, D) -> (D, H d).
            value = value.flatten(0, 1).T if "/out/" in key else value.flatten(1).T
        elif leaf == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif leaf == "bias" and "MultiHeadDotProductAttention" in key:
            value = value.flatten()
        result[name] = value.contiguous()
    result = _join(result, "q_proj k_proj v_proj", "qkv")
    result = _join(result, "map_key map_value", "kv")
    _batch(result)
    return result


def _jax_name(key: str) -> str | None:
    """timm's key (query, key and value still apart), or None for what a FastViT has no use for."""
    if key.startswith("pre_logits/"):
        return None
    name = key.replace("/", ".")
    rules: tuple[_Rule, ...] = (
        (r"^embedding\.", "patch_embed.proj."),
        (r"^cls$", "cls_token"),
        (r"^(Transformer\.posembed_input\.)?pos_embedding$", "pos_embed"),
        (r"^Transformer\.encoder_norm\.", "norm."),
        (r"^MAPHead_0\.probe$", "attn_pool.latent"),
        (r"^MAPHead_0\.LayerNorm_0\.", "attn_pool.norm."),
        (r"^MAPHead_0\.MlpBlock_0\.Dense_0\.", "attn_pool.mlp.fc1."),
        (r"^MAPHead_0\.MlpBlock_0\.Dense_1\.", "attn_pool.mlp.fc2."),
        (r"^MAPHead_0\.MultiHeadDotProductAttention_0\.query\.", "attn_pool.q."),
        (r"^MAPHead_0\.MultiHeadDotProductAttention_0\.out\.", "attn_pool.proj."),
        (r"^MAPHead_0\.MultiHeadDotProductAttention_0\.(key|value)\.", r"attn_pool.map_\1."),
        (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
        (r"\.LayerNorm_0\.", ".norm1."),
        (r"\.LayerNorm_[12]\.", ".norm2."),
        (r"\.MultiHeadDotProductAttention_[01]\.query\.", ".attn.q_proj."),
        (r"\.MultiHeadDotProductAttention_[01]\.key\.", ".attn.k_proj."),
        (r"\.MultiHeadDotProductAttention_[01]\.value\.", ".attn.v_proj."),
        (r"\.MultiHeadDotProductAttention_[01]\.out\.", ".attn.proj."),
        (r"\.MlpBlock_[03]\.Dense_0\.", ".mlp.fc1."),
        (r"\.MlpBlock_[03]\.Dense_1\.", ".mlp.fc2."),
        (r"\.(kernel|scale)$", ".weight"),
    )
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# By what only that layout has, most telling first.
_LAYOUTS: tuple[tuple[str, str, Callable[[State], State]], ...] = (
    ("JAX .npz", r"(^|/)embedding/kernel$", _jax),
    ("torchvision", r"^encoder\.layers\.encoder_layer_\d+\.", _torchvision),
    (
        "transformers",
        r"(^|\.)embeddings\.(patch_embeddings\.projection|patch_embedding)\.weight$",
        _transformers,
    ),
    ("open_clip", r"^(visual\.)?class_embedding$", _open_clip),
    ("timm", r"^patch_embed\.proj\.weight$", _timm),
)


# ---- Fitting --------------------------------------------------------------------------------------


def _fit(model: FastViT, state: State, source: str) -> None:
    """Adapt positions and norms in `state` to the model; raise ValueError for what does not fit."""
    expected = model.state_dict()
    # timm calls the norm after mean pooling fc_norm; the other libraries call every last norm "norm".
    if "fc_norm.weight" in expected and "fc_norm.weight" not in state:
        for leaf in ("weight", "bias"):
            if f"norm.{leaf}" in state:
                state[f"fc_norm.{leaf}"] = state.pop(f"norm.{leaf}")
    if model.num_classes == 0:
        for key in [k for k in state if k.startswith(("head.", "head_dist."))]:
            del state[key]
    if "pos_embed" in state and "pos_embed" in expected and state["pos_embed"].shape != expected["pos_embed"].shape:
        state["pos_embed"] = _resample_positions(model, state["pos_embed"], expected["pos_embed"], state)

    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    problems = []
    for title, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            problems.append(f"{title}: {', '.join(keys[:_SHOWN])}{more}")
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            hint = f" (num_classes={value.shape[0]}?)" if key == "head.weight" else ""
            problems.append(f"{key}: shape {tuple(value.shape)}, but the model has {tuple(expected[key].shape)}{hint}")
    if any(k.startswith("head.") for k in missing):
        problems.append("the checkpoint has no classifier: num_classes=0 leaves it out of the model")
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f"and {len(problems) - _SHOWN} more")
        raise ValueError(f"checkpoint: {source} does not fit the model:\n  " + "\n  ".join(shown))


def _resample_positions(model: FastViT, positions: Tensor, expected: Tensor, state: State) -> Tensor:
    """Positions of a square grid for the model's grid; class and register positions move between table and tokens."""
    if positions.ndim == 4:
        # (1, rows, columns, D)
        old_grid, prefix_count = (positions.shape[1], positions.shape[2]), 0
        positions = positions.flatten(1, 2)
    elif positions.ndim == 3:
        tokens = positions.shape[1]
        known = int(model.cls_token is not None)
        candidates = [n for n in (model.num_prefix_tokens, known, 0) if _is_square(tokens - n)]
        if not candidates:
            return positions  # the shape check names it
        prefix_count = candidates[0]
        side = math.isqrt(tokens - prefix_count)
        old_grid = (side, side)
    else:
        return positions
    if positions.shape[-1] != expected.shape[-1]:
        return positions
    prefix, patches = positions[:, :prefix_count], positions[:, prefix_count:]
    patches = interpolate_pos_embed(patches, old_grid, model.patch_embed.grid_size)
    if not model.no_embed_class:
        return torch.cat([prefix, patches], dim=1)
    # This model's tokens carry their own position.
    if prefix_count and "cls_token" in state:
        state["cls_token"] = state["cls_token"] + prefix[:, :1]
    return patches


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
