"""The backward of attention: from q, k, v, out and the log2 of each row's sum to the gradients.

Shapes as in attention.py; grad (B, Nq, H * D) is that of out, dq, dk, dv have the shapes of q, k, v, lse and delta
(the row sums of grad * out, Dao et al. 2022) are float32 (B, H, Nq).

Cost per head in 16 bits: 14 Nq Nk D flops in seven products (the logits and d p are made twice, once for dk and dv and
once for dq), 2 Nq Nk exponentials, (4 Nq + 4 Nk) 2 D bytes.  ViT-B/16 at 224: 35 MFLOP and 202 KB, 172 flops a byte.

Deterministic, without atomics.  `_whole` (Nq, Nk <= 400): one program per head, a pass over the keys for dk and dv,
then one over the queries for dq, so that memory is read once.  Beyond: `_queries` (dq and delta), then `_keys` (dk and
dv).  The gradient of a bias, or of a table that it is read from, is summed over whatever it was broadcast to by a third
kernel, which makes the logits once more.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.attention import (
    Problem,
    _adjust,
    _drop,
    _load,
    _locate,
    _product,
    _statistics,
    _store,
    _times,
    _weights,
    _window,
    _zero_pieces,
    _zeros,
    problem,
    programs,
    unit_stride,
)
from fastvit.kernels.launch import arch, launch, multiprocessors
from torch import Tensor


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kind of product, padded head dim up to) -> tile.
_TILES = {
    "sm80": {("16", 64): _Tile(32, 32, 4, 2), ("16", 128): _Tile(32, 32, 8, 1)},
    "sm90": {("16", 64): _Tile(64, 64, 4, 2), ("16", 128): _Tile(64, 64, 8, 1)},
    "sm100": {("16", 64): _Tile(64, 64, 4, 2), ("16", 128): _Tile(64, 64, 8, 1)},
    "gfx942": {("16", 64): _Tile(32, 32, 4, 1), ("16", 128): _Tile(32, 32, 8, 1)},
}
for _tiles in _TILES.values():
    _tiles |= {
        ("tf32", 64): _Tile(32, 32, 8, 1),
        ("ieee", 64): _Tile(16, 32, 8, 1),
        ("ieee", 128): _Tile(16, 32, 8, 1),
    }
_TILES["gfx942"] |= {("tf32", 64): _Tile(16, 32, 8, 1), ("ieee", 128): _Tile(16, 16, 8, 1)}

# Padded head dim up to -> tile of `_whole` in 16 bits, where its two passes fit the registers.
_WHOLE_TILES = {
    "sm80": {64: _Tile(32, 32, 4, 1)},
    "sm90": {64: _Tile(64, 64, 4, 1), 96: _Tile(64, 64, 8, 1)},
    "sm100": {64: _Tile(64, 64, 8, 1), 96: _Tile(64, 64, 8, 1)},
    "gfx942": {64: _Tile(32, 32, 4, 1)},
}

# Queries at a time in `_keys`, whose two accumulators of a wide head leave few registers.
_WIDE, _WIDE_BLOCK_M = 96, 32

# Longer sequences have blocks enough to fill a GPU, which one program per head does not.
_WHOLE = 400


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    rel_pos_h: Tensor | None
    rel_pos_w: Tensor | None
    bias_table: Tensor | None


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rel_pos_h: Tensor | None = None,
    rel_pos_w: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    bias_needs_grad: bool = False,
    table_index: Tensor | None = None,
) -> Gradients:
    """Launch: the gradients of what `kernels.attention.attention` computed with the same arguments.

    bias_needs_grad: make the gradient of `bias` too.
    table_index: int (Nq, Nk), the entry of `bias_table` that each query and key read; None: no gradient of the table.
    """
    q, k, v, grad = (unit_stride(t) for t in (q, k, v, grad))
    p = problem(
        q, k, v, out, scale=scale, bias=bias, key_mask=key_mask, cu_seqlens=cu_seqlens, rel_pos_h=rel_pos_h,
        rel_pos_w=rel_pos_w, bias_table=bias_table, bias_index=bias_index, grid=grid, window=window, shift=shift,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    rel = rel_pos_h is not None and rel_pos_w is not None
    d_rel_h = torch.empty_like(rel_pos_h, memory_format=torch.contiguous_format) if rel else None
    d_rel_w = torch.empty_like(rel_pos_w, memory_format=torch.contiguous_format) if rel else None
    name = arch(q.device)
    # A wider head's operands, all held in registers, would spill in tf32.
    kind = "ieee" if p.kind == "tf32" and p.width > 64 else p.kind
    tile = _TILES[name][kind, 64 if p.width <= 64 else 128]
    whole = None
    if p.kind == "16" and max(p.nq, p.nk) <= _WHOLE and cu_seqlens is None:
        whole = next((tile for widest, tile in _WHOLE_TILES[name].items() if p.width <= widest), None)
    constants = p.constants | {"ALIGN": math.gcd(p.constants["ALIGN"], *grad.stride()[:2])}
    constants["PRECISION"] = "tf32" if kind == "16" else kind
    arguments: dict[str, Any] = p.arguments | {
        "grad": grad,
        "lse": lse,
        "delta": None,
        "grad_batch": grad.stride(0),
        "grad_row": grad.stride(1),
        "grad_scale": p.arguments["scale"] * math.log(2),
    }
    of_queries = {"dq": dq, "d_rel_h": d_rel_h, "d_rel_w": d_rel_w} | _strides("dq", dq)
    of_keys = {"dk": dk, "dv": dv} | _strides("dk", dk) | _strides("dv", dv)
    if whole is None or bias_needs_grad or table_index is not None:
        arguments["delta"] = torch.empty_like(lse)
    if whole is not None:
        blocks = -(-max(p.nq, p.nk) // whole.block_n)
        parts = min(blocks, -(-2 * multiprocessors(q.device) // (p.sequences * p.heads)))
        count = p.sequences * p.heads * parts
        launch(_whole, count, q, **arguments, **of_queries, **of_keys, parts=parts, **constants, **_options(whole))
    else:
        count = programs(p, tile.block_m, cu_seqlens)
        launch(_queries, count, q, **arguments, **of_queries, **constants, **_options(tile))
        count = programs(p._replace(nq=p.nk), tile.block_n, cu_seqlens)
        keys = tile if p.width <= _WIDE else tile._replace(block_m=min(tile.block_m, _WIDE_BLOCK_M))
        launch(_keys, count, q, **arguments, **of_keys, **constants, **_options(keys))
    constants |= _options(tile)
    d_bias = d_table = None
    if bias is not None and bias_needs_grad:
        d_bias = _bias_gradient(p, q, bias, arguments, constants)
    if bias_table is not None and table_index is not None:
        # The coordinates of the table's entries take registers that eight warps have and four have not.
        d_logits = _logit_gradient(p, q, 1, p.heads, arguments, constants | {"num_warps": 8})
        d_table = _table_gradient(d_logits[0], bias_table, table_index)
    return Gradients(dq, dk, dv, d_bias, d_rel_h, d_rel_w, d_table)


def _strides(name: str, t: Tensor) -> dict[str, int]:
    return {f"{name}_{dim}": t.stride(i) for i, dim in enumerate(("batch", "row", "head"))}


def _options(tile: _Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _bias_gradient(p: Problem, q: Tensor, bias: Tensor, arguments: dict[str, Any], constants: dict[str, Any]) -> Tensor:
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    gradient = _logit_gradient(p, q, shape[0], shape[1], arguments, constants)
    broadcast = [dim for dim in (2, 3) if shape[dim] == 1 and gradient.shape[dim] > 1]
    if broadcast:
        gradient = gradient.sum(broadcast, keepdim=True)
    return gradient.reshape(bias.shape).to(bias.dtype)


def _logit_gradient(
    p: Problem, q: Tensor, sequences: int, heads: int, arguments: dict[str, Any], constants: dict[str, Any]
) -> Tensor:
    """float32 (sequences, heads, Nq, Nk), either of which may be 1: the gradient is then summed over them."""
    result = torch.empty(sequences, heads, p.nq, p.nk, dtype=torch.float32, device=q.device)
    blocks = -(-p.nq // constants["BLOCK_M"]) * -(-p.nk // constants["BLOCK_N"])
    launch(
        _logits_summed,
        sequences * heads * blocks,
        q,
        **arguments,
        d_bias=result,
        kept_sequences=sequences,
        kept_heads=heads,
        **constants,
    )
    return result


def _table_gradient(d_logits: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """(entries, H) from float32 (H, Nq, Nk): each entry sums what read it, in order."""
    order = index.flatten().argsort(stable=True)
    entries, heads = table.shape
    bounds = torch.searchsorted(index.flatten()[order], torch.arange(entries + 1, device=index.device))
    result = torch.empty_like(table, memory_format=torch.contiguous_format)
    launch(
        _entries_summed,
        entries * heads,
        d_logits,
        result,
        order,
        bounds,
        heads,
        index.numel(),
        BLOCK=128,
        num_warps=1,
        num_stages=1,
    )
    return result


@triton.jit
def _key_block(
    q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, delta, dk, dk_row, dv, dv_row,
    start, nq, nk, scale, kept_scale, grad_scale, corner, extras,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr, WINDOW: tl.constexpr,
    TABLE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys.  Tiles of logits are transposed: keys are rows."""
    ks = _load(k, k_row, start, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
    vs = _load(v, v_row, start, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
    n = start + tl.arange(0, BLOCK_N)
    acc_k = _zero_pieces(BLOCK_N, SPLIT)
    acc_v = _zero_pieces(BLOCK_N, SPLIT)
    for row in tl.range(0, nq, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        qs = _load(q, q_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
        gs = _load(grad, grad_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
        # Rows beyond the last weigh exp2(s - inf) = 0.  Keys beyond the last spoil only themselves: no mask.
        sums = tl.load(lse + m, mask=m < nq, other=float("inf"))
        s = _adjust(
            _product(ks, qs, PRECISION), m[None, :], n[:, None], nq, nk, scale, extras,
            SCALE_FIRST or HOLES, SCALE_FIRST, WINDOW, TABLE, KEYS,
        )  # fmt: skip
        p = _weights(s, scale, sums[None, :], SCALE_FIRST)
        acc_v = _times(_drop(p, m[None, :], n[:, None], kept_scale, extras), gs, acc_v, PRECISION)
        if delta is None:
            inner = _row_sums(gs, _load(out, out_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW))
        else:
            inner = tl.load(delta + m, mask=m < nq, other=0.0)
        dp = _drop(_product(vs, gs, PRECISION), m[None, :], n[:, None], kept_scale, extras)
        acc_k = _times(p * (dp - inner[None, :]), qs, acc_k, PRECISION)
    _store(dk, dk_row, n, nk, acc_k, grad_scale, corner, HEAD_DIM, SPLIT, WINDOW)
    _store(dv, dv_row, n, nk, acc_v, 1.0, corner, HEAD_DIM, SPLIT, WINDOW)


@triton.jit
def _row_sums(a, b):
    """Of a * b, over the pieces of the head dim."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.constexpr_function
def _columns(n):
    """The narrowest tile that tensor cores take."""
    return max(16, 1 << (int(n) - 1).bit_length())


@triton.jit
def _one_hot(i, WIDTH: tl.constexpr, dtype: tl.constexpr):
    return (i[:, None] == tl.arange(0, WIDTH)[None, :]).to(dtype)


@triton.jit
def _store_relative(ptr, m, nq, acc, COLUMNS: tl.constexpr):
    column = tl.arange(0, acc.shape[1])[None, :]
    at = ptr + (m[:, None].to(tl.int64) * COLUMNS + column)
    tl.store(at, acc.to(ptr.dtype.element_ty), mask=(m[:, None] < nq) & (column < COLUMNS))


@triton.jit
def _query_block(
    q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, delta, dq, dq_row, d_rel_h, d_rel_w,
    start, nq, nk, scale, kept_scale, grad_scale, corner, extras,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, SCALE_FIRST: tl.constexpr, WINDOW: tl.constexpr,
    TABLE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta where there is room for it."""
    m = start + tl.arange(0, BLOCK_M)
    qs = _load(q, q_row, start, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
    gs = _load(grad, grad_row, start, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
    inner = _row_sums(gs, _load(out, out_row, start, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW))
    if delta is not None:
        tl.store(delta + m, inner, mask=m < nq)
    sums = tl.load(lse + m, mask=m < nq, other=float("inf"))
    acc = _zero_pieces(BLOCK_M, SPLIT)
    if d_rel_h is not None:
        acc_h = _zeros(BLOCK_M, _columns(KEYS[0]))
        acc_w = _zeros(BLOCK_M, _columns(KEYS[1]))
    for first in tl.range(0, nk, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        ks = _load(k, k_row, first, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
        vs = _load(v, v_row, first, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
        s = _adjust(
            _product(qs, ks, PRECISION), m[:, None], n[None, :], nq, nk, scale, extras,
            True, SCALE_FIRST, WINDOW, TABLE, KEYS,
        )  # fmt: skip
        p = _weights(s, scale, sums[:, None], SCALE_FIRST)
        dp = _drop(_product(gs, vs, PRECISION), m[:, None], n[None, :], kept_scale, extras)
        ds = (p * (dp - inner[:, None])).to(ks[0].dtype)
        acc = _times(ds, ks, acc, PRECISION)
        if d_rel_h is not None:
            # Sums over the keys of one row, and of one column, of the grid.
            row = _one_hot(n // KEYS[1], acc_h.shape[1], ds.dtype)
            column = _one_hot(n % KEYS[1], acc_w.shape[1], ds.dtype)
            acc_h = tl.dot(ds, row, acc_h, input_precision=PRECISION)
            acc_w = tl.dot(ds, column, acc_w, input_precision=PRECISION)
    _store(dq, dq_row, m, nq, acc, grad_scale, corner, HEAD_DIM, SPLIT, WINDOW)
    if d_rel_h is not None:
        _store_relative(d_rel_h, m, nq, acc_h, KEYS[0])
        _store_relative(d_rel_w, m, nq, acc_w, KEYS[1])


@triton.jit
def _whole(
    q, k, v, out, grad, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens,
    delta, dq, d_rel_h, d_rel_w, dk, dv,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q, grad_batch, grad_row, grad_scale,
    dq_batch, dq_row, dq_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head, parts,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All of one head, or one of `parts` that split it."""
    part = tl.program_id(0) % parts
    sequence = (tl.program_id(0) // parts // heads).to(tl.int64)
    head = (tl.program_id(0) // parts % heads).to(tl.int64)
    batch, y, x = _window(sequence, WINDOW)
    corner = (y, x)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
        grad_row = tl.multiple_of(grad_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + head * HEAD_DIM, ALIGN)
    grad += tl.multiple_of(batch * grad_batch + head * HEAD_DIM, ALIGN)
    lse = _statistics(lse, sequence, head, 0, heads, nq, nq, None)
    if delta is not None:
        delta = _statistics(delta, sequence, head, 0, heads, nq, nq, None)
    dk += batch * dk_batch + head * dk_head
    dv += batch * dv_batch + head * dv_head
    dq += batch * dq_batch + head * dq_head
    if d_rel_h is not None:
        d_rel_h += (sequence * heads + head) * nq * KEYS[0]
        d_rel_w += (sequence * heads + head) * nq * KEYS[1]
    extras = (
        sequence, head, y, x, seed, dropped, heads,
        bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    )  # fmt: skip
    for block in tl.range(part, tl.cdiv(nk, BLOCK_N), parts):
        _key_block(
            q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, None, dk, dk_row, dv, dv_row,
            block * BLOCK_N, nq, nk, scale, kept_scale, grad_scale, corner, extras,
            HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    for block in tl.range(part, tl.cdiv(nq, BLOCK_M), parts):
        _query_block(
            q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, delta, dq, dq_row, d_rel_h, d_rel_w,
            block * BLOCK_M, nq, nk, scale, kept_scale, grad_scale, corner, extras,
            HEAD_DIM, SPLIT, SCALE_FIRST, WINDOW, TABLE, KEYS, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _queries(
    q, k, v, out, grad, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens, delta, dq, d_rel_h, d_rel_w,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q, grad_batch, grad_row, grad_scale,
    dq_batch, dq_row, dq_head,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries."""
    all_tokens = nq
    batch, sequence, head, start, nq, nk, before, y, x = _locate(
        tl.program_id(0), heads, nq, nk, cu_seqlens, sequences, BLOCK_M, SEQUENCES, WINDOW
    )
    corner = (y, x)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
        grad_row = tl.multiple_of(grad_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + before * q_row + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + before * k_row + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + before * v_row + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + before * out_row + head * HEAD_DIM, ALIGN)
    grad += tl.multiple_of(batch * grad_batch + before * grad_row + head * HEAD_DIM, ALIGN)
    lse = _statistics(lse, sequence, head, before, heads, nq, all_tokens, cu_seqlens)
    delta = _statistics(delta, sequence, head, before, heads, nq, all_tokens, cu_seqlens)
    dq += batch * dq_batch + before * dq_row + head * dq_head
    if d_rel_h is not None:
        d_rel_h += (sequence * heads + head) * nq * KEYS[0]
        d_rel_w += (sequence * heads + head) * nq * KEYS[1]
    extras = (
        sequence, head, y, x, seed, dropped, heads,
        bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    )  # fmt: skip
    _query_block(
        q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, delta, dq, dq_row, d_rel_h, d_rel_w,
        start, nq, nk, scale, kept_scale, grad_scale, corner, extras,
        HEAD_DIM, SPLIT, SCALE_FIRST, WINDOW, TABLE, KEYS, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _keys(
    q, k, v, out, grad, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens, delta, dk, dv,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q, grad_batch, grad_row, grad_scale,
    dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys, after `_queries` has left delta."""
    all_tokens = nq
    batch, sequence, head, start, nk, nq, before, y, x = _locate(
        tl.program_id(0), heads, nk, nq, cu_seqlens, sequences, BLOCK_N, SEQUENCES, WINDOW
    )
    corner = (y, x)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
        grad_row = tl.multiple_of(grad_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + before * q_row + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + before * k_row + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + before * v_row + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + before * out_row + head * HEAD_DIM, ALIGN)
    grad += tl.multiple_of(batch * grad_batch + before * grad_row + head * HEAD_DIM, ALIGN)
    lse = _statistics(lse, sequence, head, before, heads, nq, all_tokens, cu_seqlens)
    delta = _statistics(delta, sequence, head, before, heads, nq, all_tokens, cu_seqlens)
    dk += batch * dk_batch + before * dk_row + head * dk_head
    dv += batch * dv_batch + before * dv_row + head * dv_head
    extras = (
        sequence, head, y, x, seed, dropped, heads,
        bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    )  # fmt: skip
    _key_block(
        q, q_row, k, k_row, v, v_row, out, out_row, grad, grad_row, lse, delta, dk, dk_row, dv, dv_row,
        start, nq, nk, scale, kept_scale, grad_scale, corner, extras,
        HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _logits_summed(
    q, k, v, out, grad, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens, delta, d_bias,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q, grad_batch, grad_row, grad_scale,
    kept_sequences, kept_heads,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of logits, summed over all heads if `kept_heads` is 1, all sequences likewise."""
    across = tl.cdiv(nk, BLOCK_N)
    blocks = tl.cdiv(nq, BLOCK_M) * across
    kept = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks // across * BLOCK_M
    first = tl.program_id(0) % across * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    summed_heads = heads // kept_heads
    acc = _zeros(BLOCK_M, BLOCK_N)
    for i in tl.range(0, sequences // kept_sequences * summed_heads):
        sequence = (kept // kept_heads + i // summed_heads).to(tl.int64)
        head = (kept % kept_heads + i % summed_heads).to(tl.int64)
        batch, y, x = _window(sequence, WINDOW)
        corner = (y, x)
        at_q = q + tl.multiple_of(batch * q_batch + head * q_head, ALIGN)
        at_k = k + tl.multiple_of(batch * k_batch + head * k_head, ALIGN)
        at_v = v + tl.multiple_of(batch * v_batch + head * v_head, ALIGN)
        at_grad = grad + tl.multiple_of(batch * grad_batch + head * HEAD_DIM, ALIGN)
        extras = (
            sequence, head, y, x, seed, dropped, heads,
            bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
            rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
        )  # fmt: skip
        qs = _load(at_q, q_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
        ks = _load(at_k, k_row, first, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
        s = _adjust(
            _product(qs, ks, PRECISION), m[:, None], n[None, :], nq, nk, scale, extras,
            True, SCALE_FIRST, WINDOW, TABLE, KEYS,
        )  # fmt: skip
        sums = tl.load(_statistics(lse, sequence, head, 0, heads, nq, nq, None) + m, mask=m < nq, other=float("inf"))
        p = _weights(s, scale, sums[:, None], SCALE_FIRST)
        vs = _load(at_v, v_row, first, nk, corner, True, BLOCK_N, HEAD_DIM, SPLIT, WINDOW)
        gs = _load(at_grad, grad_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
        dp = _drop(_product(gs, vs, PRECISION), m[:, None], n[None, :], kept_scale, extras)
        inner = tl.load(_statistics(delta, sequence, head, 0, heads, nq, nq, None) + m, mask=m < nq, other=0.0)
        acc += p * (dp - inner[:, None])
    at = d_bias + ((kept.to(tl.int64) * nq + m[:, None]) * nk + n[None, :])
    tl.store(at, acc, mask=(m[:, None] < nq) & (n[None, :] < nk))


@triton.jit
def _entries_summed(d_logits, d_table, order, bounds, heads, logits, BLOCK: tl.constexpr):
    """One entry of one head: the logits order[bounds[entry]] .. order[bounds[entry + 1]] that read it."""
    entry = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    end = tl.load(bounds + entry + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(tl.load(bounds + entry), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.load(order + i, mask=i < end, other=0)
        acc += tl.load(d_logits + head.to(tl.int64) * logits + at, mask=i < end, other=0.0)
    tl.store(d_table + entry * heads + head, tl.sum(acc).to(d_table.dtype.element_ty))
