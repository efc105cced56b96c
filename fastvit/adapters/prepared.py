"""What is left of a fused block's Python when nothing has changed since its last call.

Reading a block and checking its tensors takes hundreds of microseconds between two kernels, because the kernels have
pushed everything that Python needs out of the caches.  So a call that went well leaves a `_C.PreparedBlock` behind: the
checked arguments, and the identity of everything that was read for them.  The next call compares and computes, both in
C++; where anything differs, it starts from the module again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvit.adapters.parts import Angles, BlockParts, mode_obstacle, read_activation, read_norm
from fastvit.ops import _backend, _checks, _int8
from fastvit.ops.self_attention import MOST_SCRATCH

# In the block's `__dict__`: the prepared call, and the list of what it must not outlive.
_KEY = "_fastvit_prepared"

_DTYPES = (torch.float32, torch.bfloat16)
_NO_NORM = {"norm_weight": None, "norm_bias": None, "eps": 0.0}


def forget(block: nn.Module) -> None:
    block.__dict__.pop(_KEY, None)


def run_prepared(block: nn.Module, x: Any, tokens: int | None, angles: Angles | None) -> Tensor | None:
    """The block's output, or its first so many tokens; None where the call must start from the module."""
    prepared = block.__dict__.get(_KEY)
    if prepared is None or not _is_plain_inference(x) or x.ndim != 3:
        return None
    cos, sin = angles or (None, None)
    if not all(t is None or _is_plain(t) for t in (cos, sin)):
        return None
    out = torch.empty_like(x) if tokens is None or tokens >= x.shape[1] else x.new_empty(len(x), tokens, x.shape[2])
    return out if prepared[0].run(block, out, x, cos, sin, torch.get_num_threads()) else None


def prepare(block: nn.Module, inner: list[nn.Module], parts: BlockParts, x: Tensor) -> None:
    """Remember a call that was just served, if the C++ kernels can serve the next one unseen."""
    if (extension := _backend.extension()) is None:
        return
    modules = [block, *inner]
    # A hook that is here was idle in this call only.
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules):
        return
    norms = (parts.q_norm, parts.k_norm, parts.proj_norm, parts.fc2_norm)
    if norms != (None,) * 4 or len(parts.fc1) != 1 or parts.bias is not None or not _is_plain_inference(x):
        return
    if any(drop_path is not None and drop_path.training for drop_path in (parts.drop_path1, parts.drop_path2)):
        return
    norm1, norm2 = ({**_NO_NORM, **read_norm(norm, x.dtype)} for norm in (parts.norm1, parts.norm2))
    q, k, v = parts.qkv if len(parts.qkv) == 3 else (parts.qkv[0], (None, None), (None, None))
    of = parts.quantization
    projections = ((q, of.qkv), (k, of.qkv), (v, of.qkv), (parts.proj, of.proj), (parts.fc1[0], of.fc1))
    linears = [(*projection, kind) for projection, kind in (*projections, (parts.fc2, of.fc2))]
    vectors = [
        *(norm1["norm_weight"], norm1["norm_bias"], parts.layer_scale1),
        *(norm2["norm_weight"], norm2["norm_bias"], parts.layer_scale2),
    ]
    given = [*vectors, *parts.copied, *(t for weight, bias, _ in linears for t in (weight, bias))]
    if not all(t is None or (_is_plain(t) and t.is_contiguous() and t.dtype in _DTYPES) for t in given):
        return
    if any(kind is not None for _, _, kind in linears) and not _int8.keeps():
        return
    triples = [
        (None,) * 3 if weight is None else (*_int8.operand(weight, kind), bias) for weight, bias, kind in linears
    ]
    operands = [
        *vectors[:2],
        *(t for triple in triples[:4] for t in triple),
        *vectors[2:5],
        *(t for triple in triples[4:] for t in triple),
        vectors[5],
    ]
    guards = [weight for weight, _, kind in linears if kind is not None and weight is not None]
    guards += parts.copied
    hooks = torch.nn.modules.module
    dicts = [
        hooks._global_forward_hooks,
        hooks._global_forward_pre_hooks,
        hooks._global_backward_hooks,
        hooks._global_backward_pre_hooks,
    ]
    if parts.config is not None:
        dicts.append(vars(parts.config))
    kept: list[Any] = [operands, guards]
    # The block's own class is a made one, whose forward stands for the original's.
    kinds: set[Any] = {type(m) for m in modules} | {block.fastvit_original}
    snapshot = extension.Snapshot(modules, dicts, [(kind, kind.forward) for kind in kinds], _KEY, kept)
    activation = parts.activation if isinstance(parts.activation, str) else read_activation(parts.activation)
    call = extension.PreparedBlock(
        snapshot,
        operands,
        guards,
        _backend.code(x.dtype),
        parts.num_heads,
        parts.scale,
        parts.rope_interleaved,
        -1 if parts.rope_prefix is None else parts.rope_prefix,
        (_checks.NORMS.index(norm1["norm"]), norm1["eps"]),
        (_checks.NORMS.index(norm2["norm"]), norm2["eps"]),
        _checks.ACTIVATIONS.index(activation),
        MOST_SCRATCH,
    )
    block.__dict__[_KEY] = (call, kept)


def _is_plain(t: Any) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.layout is torch.strided


def _is_plain_inference(x: Any) -> bool:
    """Is this a call that the dispatcher has nothing to add to?"""
    return (
        not torch.is_grad_enabled()
        and _is_plain(x)
        and _backend.may_run("cpp")
        and not torch.is_autocast_enabled("cpu")
        and mode_obstacle() is None
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.autograd._profiler_enabled()
    )
