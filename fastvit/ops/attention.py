"""attention: softmax(scale * q @ k.T + bias) @ v per head, read and written in the layout of the products around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastvit import reference
from fastvit.ops import _backend, _checks
from fastvit.ops._attention_arguments import SCHEMA, Arguments, check, check_values
from fastvit.ops._library import autocast_dtype, define, in_dtype, register

# The widest head whose backward has a kernel; wider ones recompute the reference.
_WIDEST_BACKWARD = 128


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    qk_norm: str = "none",
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    qk_norm_eps: float = 1e-6,
    rel_pos: tuple[Tensor, Tensor] | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Multi-head attention (Vaswani et al. 2017) that never holds an Nq x Nk matrix (Dao et al. 2022).

    On CPU `scale`, `bias` and `rope` run C++ kernels; with anything else the plain reference runs.

    Args:
        q: (B, Nq, num_heads, head_dim), float.  Any strides: slices of a packed qkv are read in place.
        k, v: (B, Nk, num_heads, head_dim), dtype of `q` (any float dtype under autocast).
        scale: of the logits; head_dim ** -0.5 by default.
        bias: broadcastable to (B, num_heads, Nq, Nk), float, added to the scaled logits.  -inf masks a key; a row
            that masks every key gives zeros, one of the least finite number the mean of the values.  With `window`,
            Nq = Nk = a window's tokens and B counts windows.
        key_mask: bool (B, Nk), True for a key that counts.  A row without keys gives zeros, and zero gradients.
        cu_seqlens: int32 (S + 1,), from 0 to T: tokens of S sequences, packed one after the other (NaViT, Dehghani et
            al. 2023), attend within their own.  q, k, v are then (T, num_heads, head_dim), or the same with B = 1.
        rope: cos, sin, each (P, head_dim), float: rotary positions (Su et al. 2021) of the last P tokens of q and k;
            prefix tokens are left alone.
        rope_interleaved: a channel's partner lies beside it (EVA-02), not head_dim / 2 away (DINOv3).
        qk_norm: "layer" or "rms": normalise q and k over head_dim before they are rotated; "none".
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: (head_dim,), of that norm.
        qk_norm_eps: epsilon of that norm.
        rel_pos: (B, num_heads, Nq, Kh) and (B, num_heads, Nq, Kw), float, added to the scaled logits by the row and the
            column of the key, Nk = Kh * Kw (decomposed relative positions, Li et al. 2022, SAM).
        bias_table: (entries, num_heads), float, added to the scaled logits by relative position (Swin, BEiT): by
            `bias_index`, or by `reference.relative_index` of `window`, else `grid`, and at most one class token.
        bias_index: int32 or int64 (Nq, Nk), entries of `bias_table`.
        grid: rows and columns of patches.
        window: rows and columns of windows that patches attend within (Liu et al. 2021); no prefix tokens.
        shift: roll the image by so much, up and left, before it is cut into windows; parts that were not neighbours do
            not see each other.  The output is rolled back.
        dropout_p: probability of dropping a weight.
        dropout_seed: int64 (1,): what is dropped is a function of it; drawn from torch's generator by default.

    Returns:
        (B, Nq, num_heads * head_dim), or (T, num_heads * head_dim), contiguous; dtype of `q`, or autocast's.

    Raises:
        ValueError, TypeError: an argument's shape or dtype is not accepted, or two arguments are not served together.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            attention, (q, k, v), q, k, v, scale=scale, bias=bias, key_mask=key_mask, cu_seqlens=cu_seqlens, rope=rope,
            rope_interleaved=rope_interleaved, qk_norm=qk_norm, q_norm_weight=q_norm_weight, q_norm_bias=q_norm_bias,
            k_norm_weight=k_norm_weight, k_norm_bias=k_norm_bias, qk_norm_eps=qk_norm_eps, rel_pos=rel_pos,
            bias_table=bias_table, bias_index=bias_index, grid=grid, window=window, shift=shift, dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(name, t)
    packed = cu_seqlens is not None and q.ndim == 3
    if packed:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 1.0
    if dropout_p > 0.0 and dropout_seed is None:
        dropout_seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    cos, sin = _checks.pair("rope", rope, "cos and sin, each (P, head_dim)")
    rel_pos_h, rel_pos_w = _checks.pair("rel_pos", rel_pos, "(B, num_heads, Nq, Kh) and (B, num_heads, Nq, Kw)")
    learned = (q, k, v, bias, q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias, rel_pos_h, rel_pos_w, bias_table)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    out = _op(
        q, k, v, scale, bias, key_mask, cu_seqlens, cos, sin, rope_interleaved, qk_norm, q_norm_weight, q_norm_bias,
        k_norm_weight, k_norm_bias, qk_norm_eps, rel_pos_h, rel_pos_w, bias_table, bias_index, grid, window, shift,
        dropout_p, dropout_seed, training, autocast_dtype(q),
    )[0]  # fmt: skip
    return out.squeeze(0) if packed else out


def attention_qkvpacked(qkv: Tensor, num_heads: int, **options: Any) -> Tensor:
    """`attention` of a packed projection.

    Args:
        qkv: (B, N, 3 * num_heads * head_dim), as a `qkv` linear writes it: [q; k; v], each with heads outermost.  With
            `cu_seqlens` also (T, 3 * num_heads * head_dim).
        num_heads: must divide the last dimension / 3.
        options: as in `attention`.

    Returns:
        (B, N, num_heads * head_dim).
    """
    if has_torch_function((qkv,)):
        return handle_torch_function(attention_qkvpacked, (qkv,), qkv, num_heads, **options)
    _checks.tensor("qkv", qkv)
    ranks = (3,) if options.get("cu_seqlens") is None else (2, 3)
    if qkv.ndim not in ranks or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv: shape {tuple(qkv.shape)} with num_heads={num_heads} does not fit; "
            "accepted: (B, N, 3 * num_heads * head_dim)"
        )
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return attention(q, k, v, **options)


def _backend_of(a: Arguments, compute: torch.dtype) -> str:
    backend = _backend.choose(a.q, compute, a.k, a.v, a.bias, a.rope_cos, a.rope_sin)
    if backend == "cpp" and not a.plain():
        if not _backend.may_run("reference"):
            raise RuntimeError("backend 'cpp' was forced, but serves attention with scale, bias and rope alone")
        return "reference"
    return backend


def _outputs(a: Arguments) -> tuple[Tensor, Tensor, str]:
    """Empty results and the backend.  The log of each row's sum is kept for the backward kernel, where it will run."""
    check(a)
    batch, nq, heads, head_dim = a.q.shape
    out = a.q.new_empty((batch, nq, heads * head_dim), dtype=a.dtype or a.q.dtype)
    backend = _backend_of(a, out.dtype) if out.numel() else "reference"
    softmax: tuple[int, ...] = (0,)
    if a.training and backend == "triton" and head_dim <= _WIDEST_BACKWARD:
        softmax = (softmax_numbers(a.bias is not None, out.dtype), *a.logits()[:3])
    return out, a.q.new_empty(softmax, dtype=torch.float32), backend


def softmax_numbers(has_bias: bool, dtype: torch.dtype) -> int:
    """How many the backward needs of a row's softmax: one is nothing beside a mask's -1e30, and 1e-5 off beside 300."""
    return 2 if has_bias or dtype == torch.float32 else 1


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _outputs(Arguments(*arguments))[:2]


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*arguments)
    out, softmax, backend = _outputs(a)
    check_values(a)
    if out.numel() == 0:
        return out, softmax
    rope = a.rope()
    if backend == "cpp":
        q, k = (t if rope is None else _rotated(t, rope, a.rope_interleaved, out.dtype) for t in (a.q, a.k))
        _backend.extension().attention(
            out.unflatten(-1, a.q.shape[2:]),
            *map(_backend.unit_stride, (q, k, a.v)),
            None if a.bias is None else a.bias.expand(a.logits()),
            a.scale,
            _backend.code(out.dtype),
            torch.get_num_threads(),
        )
    elif backend == "triton":
        q, k, v = (t.to(a.dtype or t.dtype) for t in (a.q, a.k, a.v))
        out = _backend.triton_kernel("attention")(
            q, k, v, **_triton_options(a), qk_norm=a.qk_norm, q_norm_weight=a.q_norm_weight, q_norm_bias=a.q_norm_bias,
            k_norm_weight=a.k_norm_weight, k_norm_bias=a.k_norm_bias, qk_norm_eps=a.qk_norm_eps, rope=rope,
            rope_interleaved=a.rope_interleaved, softmax=softmax if softmax.numel() else None,
        )  # fmt: skip
    else:
        out = _reference(*arguments)
    return out, softmax


def _rotated(x: Tensor, rope: tuple[Tensor, Tensor], interleaved: bool, dtype: torch.dtype) -> Tensor:
    """A rotated copy of x in the dtype that products run in."""
    x = torch.empty(x.shape, dtype=dtype).copy_(x)
    tables = map(_backend.unit_stride, rope)
    _backend.extension().rotate(x, *tables, interleaved, torch.get_num_threads())
    return x


def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention below autograd, for operators that are made of it.  options: fields of `Arguments`, checked."""
    return _kernel(*Arguments(q, k, v, **options))[0]


def _operands(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """q and k normalised and rotated, and v, in the dtype that products run in, for the backward."""
    q, k, v = (t.to(a.dtype or t.dtype) for t in (a.q, a.k, a.v))
    if a.qk_norm != "none" or a.rope_cos is not None:
        launch = _backend.triton_kernel("attention_prologue", "prologue")
        q, k = launch(q, **_prologue_options(a, "q")), launch(k, **_prologue_options(a, "k"))
    return q, k, v


def _prologue_options(a: Arguments, of: str) -> dict[str, Any]:
    weight, bias = getattr(a, f"{of}_norm_weight"), getattr(a, f"{of}_norm_bias")
    return {
        "norm": a.qk_norm,
        "weight": weight,
        "bias": bias,
        "eps": a.qk_norm_eps,
        "rope": a.rope(),
        "interleaved": a.rope_interleaved,
    }


def _triton_options(a: Arguments) -> dict[str, Any]:
    return {
        "scale": a.scale,
        "bias": a.bias,
        "key_mask": a.key_mask,
        "cu_seqlens": a.cu_seqlens,
        "rel_pos_h": a.rel_pos_h,
        "rel_pos_w": a.rel_pos_w,
        "bias_table": a.bias_table,
        "bias_index": a.bias_index,
        "grid": a.grid,
        "window": a.window,
        "shift": tuple(a.shift),
        "dropout_p": a.dropout_p,
        "dropout_seed": a.dropout_seed,
    }


def _reference(*arguments: Any) -> Tensor:
    a = Arguments(*arguments)
    with in_dtype(a.dtype, a.q.device):
        return reference.attention(
            a.q,
            a.k,
            a.v,
            scale=a.scale,
            bias=a.bias,
            key_mask=a.key_mask,
            cu_seqlens=a.cu_seqlens,
            rope=a.rope(),
            rope_interleaved=a.rope_interleaved,
            qk_norm=a.qk_norm,
            q_norm_weight=a.q_norm_weight,
            q_norm_bias=a.q_norm_bias,
            k_norm_weight=a.k_norm_weight,
            k_norm_bias=a.k_norm_bias,
            qk_norm_eps=a.qk_norm_eps,
            rel_pos=None if a.rel_pos_h is None or a.rel_pos_w is None else (a.rel_pos_h, a.rel_pos_w),
            bias_table=a.bias_table,
            bias_index=a.bias_index,
            grid=None if a.grid is None else (a.grid[0], a.grid[1]),
            window=None if a.window is None else (a.window[0], a.window[1]),
            shift=(a.shift[0], a.shift[1]),
            dropout_p=a.dropout_p,
            dropout_seed=a.dropout_seed,
        )


def _save(arguments: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    out, softmax = result
    return (out, softmax) if softmax.numel() else ()


# The arguments that have gradients, in the order in which the backward operator returns them.
_LEARNED = (
    "q", "k", "v", "bias", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias", "rel_pos_h", "rel_pos_w",
    "bias_table",
)  # fmt: skip


def _backward(saved: tuple[Any, ...], grad: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None] | None:
    arguments, kept = saved[: len(needs)], saved[len(needs) :]
    needed = dict(zip(Arguments._fields, needs, strict=True))
    # Nothing makes the gradient of a rotation.
    if not kept or needed["rope_cos"] or needed["rope_sin"]:
        return None
    wanted = [needed[name] for name in _LEARNED]
    gradients = dict(zip(_LEARNED, _backward_op(grad, *kept, *arguments, wanted), strict=True))
    return [gradients[name] if needed[name] else None for name in Arguments._fields]


def _backward_fake(grad: Tensor, out: Tensor, softmax: Tensor, *arguments: Any) -> list[Tensor]:
    a, wanted = Arguments(*arguments[:-1]), arguments[-1]
    tensors = (getattr(a, name) for name in _LEARNED)
    return [
        torch.empty(t.shape if w else (0,), dtype=t.dtype, device=t.device) if t is not None else out.new_empty(0)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def _backward_kernel(grad: Tensor, out: Tensor, softmax: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of `_LEARNED`; empty where there is none, or it is not wanted."""
    a = Arguments(*arguments[:-1])
    wanted = dict(zip(_LEARNED, arguments[-1], strict=True))
    q, k, v = _operands(a)
    table_index = None
    if a.bias_table is not None and wanted["bias_table"]:
        table_index = a.bias_index
        if table_index is None:
            _, _, tokens, _ = a.logits()
            height, width = a.window or a.grid or (1, tokens)
            table_index = reference.relative_index(height, width, tokens - height * width, device=q.device)
    found = _backend.triton_kernel("attention_backward")(
        q, k, v, out, grad.to(out.dtype), softmax, **_triton_options(a), bias_needs_grad=wanted["bias"],
        table_index=table_index,
    )  # fmt: skip
    gradients: dict[str, Tensor | None] = {**found._asdict()}
    if a.qk_norm != "none" or a.rope_cos is not None:
        launch = _backend.triton_kernel("attention_prologue", "prologue_backward")
        for name, x in (("q", a.q), ("k", a.k)):
            x = x.to(a.dtype or x.dtype)
            dx, d_weight, d_bias = launch(gradients[name], x, **_prologue_options(a, name))
            gradients |= {name: dx, f"{name}_norm_weight": d_weight, f"{name}_norm_bias": d_bias}
    result = []
    for name in _LEARNED:
        t, g = getattr(a, name), gradients.get(name)
        result.append((out if t is None else t).new_empty(0) if g is None or not wanted[name] else g.to(t.dtype))
    return result


_backward_op = define(
    f"attention_backward(Tensor grad, Tensor out, Tensor softmax, {SCHEMA}, bool[] wanted) -> Tensor[]",
    kernel=_backward_kernel,
    fake=_backward_fake,
)

_op = register(
    f"attention({SCHEMA}) -> (Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    reference=_reference,
    backward=_backward,
    save=_save,
)
