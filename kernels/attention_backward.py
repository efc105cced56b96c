"""The backward of attention: from q, k, v, out and the log of each row's sum to the gradients.

Shapes as in attention.py; grad (B, Nq, H * D) is that of out, dq, dk, dv have the shapes of q, k, v; that log and
delta (the row sums of grad * out, Dao et al. 2022) are float32 (B, H, Nq).

Cost per head in 16 bits: 14 Nq Nk D flops in seven products (the logits and d p are made twice, once for dk and dv and
once for dq), 2 Nq Nk exponentials, (4 Nq + 4 Nk) 2 D bytes.  ViT-B/16 at 224: 35 MFLOP and 202 KB, 172 flops a byte.

Deterministic, without atomics.  `_whole` (Nq, Nk <= 400): one program per head, a pass over the keys for dk and dv,
then one over the queries for dq, so that memory is read once.  Beyond: `_queries` (dq and delta), then `_keys` (dk and
dv).  The gradient of a bias, or of a table that it is read from, is summed over whatever it was broadcast to by a third
kernel, which makes the logits once more.

The log of a row's sum comes in one number or two (`Softmax`).  One is off by 4e-8 of the row's largest logit, and the
row's weights with it: in 16 bits that is less than the rounding of a weight up to logits of 5e4 in bfloat16 and 1e4 in
float16, and the second number would take 4 % more instructions, and registers that `_whole` and `_keys` lack.  Beside
the -1e30 of a bias, or in float32, only two will do.

A row that gives one key all its weight has no gradient of its logits, but dp and delta, rounded apart, leave their last
bit in dq and dk, where autograd through a softmax leaves 0.  At logits of 1e4 what few gradients remain are smaller
than these: the relative error is 2e-2 in float32, autograd's 6e-3, in float16 0.7 and 0.3.  Summing p dp instead would
take nine products for seven.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.attention_call import Call, Tile, heads_of, rows, unit_stride
from fastvit.kernels.attention_tile import (
    Softmax,
    add_product,
    adjust,
    drop,
    head_of,
    load,
    load_rest,
    load_top,
    locate,
    locate_head,
    normalised,
    product,
    softmax_of,
    statistics,
    store,
    zero_pieces,
    zeros,
)
from fastvit.kernels.launch import arch, launch, multiprocessors
from torch import Tensor

# (kind of product, padded head dim up to) -> tile.
_TILES = {
    "sm80": {("16", 64): Tile(32, 32, 4, 2), ("16", 128): Tile(32, 32, 8, 1)},
    "sm90": {("16", 64): Tile(64, 64, 4, 2), ("16", 128): Tile(64, 64, 8, 1)},
    "sm100": {("16", 64): Tile(64, 64, 4, 2), ("16", 128): Tile(64, 64, 8, 1)},
    "gfx942": {("16", 64): Tile(32, 32, 4, 1), ("16", 128): Tile(32, 32, 8, 1)},
}
for _tiles in _TILES.values():
    _tiles |= {
        ("tf32", 64): Tile(32, 32, 8, 1),
        ("ieee", 64): Tile(16, 32, 8, 1),
        ("ieee", 128): Tile(16, 32, 8, 1),
    }
_TILES["sm80"] |= {("ieee", 64): Tile(16, 32, 8, 2)}
_TILES["gfx942"] |= {("tf32", 64): Tile(16, 32, 8, 1), ("ieee", 128): Tile(16, 16, 8, 1)}

# Padded head dim up to -> tile of `_whole` in 16 bits, where its two passes fit the registers: of rows that stay, and
# of rows that pass by.
_WHOLE_TILES = {
    "sm80": {64: Tile(32, 32, 4, 1)},
    "sm90": {64: Tile(64, 32, 4, 1), 96: Tile(64, 32, 8, 1)},
    "sm100": {64: Tile(64, 64, 8, 1), 96: Tile(64, 64, 8, 1)},
    "gfx942": {64: Tile(32, 32, 4, 1)},
}

# Those of `_logits_summed` that differ, since it would spill: what is loaded in two stages passes by the registers.
_SUMMED_TILES: dict[str, dict[tuple[str, int], Tile]] = {
    name: {("tf32", 64): Tile(32, 32, 8, 2), ("ieee", 64): Tile(32, 16, 8, 1), ("ieee", 128): Tile(32, 16, 8, 1)}
    for name in ("sm80", "sm90", "sm100")
}
_SUMMED_TILES["sm80"] |= {("16", 128): Tile(32, 32, 8, 2)}

# Rows that `_queries` and `_keys` take at a time where few registers are left, as in wide heads.
_WIDE, _STEP = 96, 32

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
    softmax: Tensor,
    *,
    bias_needs_grad: bool = False,
    table_index: Tensor | None = None,
    **options: Any,
) -> Gradients:
    """Launch: the gradients of what `kernels.attention.attention` computed with the same arguments.

    softmax: as the forward wrote it.
    bias_needs_grad: make the gradient of `bias` too.
    table_index: int (Nq, Nk), the entry of `bias_table` that each query and key read; None: no gradient of the table.
    options: as `Call` names them.
    """
    call = Call(unit_stride(q), unit_stride(k), unit_stride(v), **options)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    d_rel_h, d_rel_w = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (call.rel_pos_h, call.rel_pos_w)
    )
    name = arch(q.device)
    # A wider head's operands, all held in registers, would spill in tf32.
    kind = "ieee" if call.kind == "tf32" and call.width > 64 else call.kind
    size = kind, 64 if call.width <= 64 else 128
    tile = _TILES[name][size]
    whole = None
    if call.kind == "16" and max(call.nq, call.nk) <= _WHOLE and call.cu_seqlens is None:
        whole = next((tile for widest, tile in _WHOLE_TILES[name].items() if call.width <= widest), None)
    rows_out, rows_grad = (heads_of(unit_stride(t), call.heads) for t in (out, grad))
    precision = "tf32" if kind == "16" else kind
    arguments = call.arguments() | {
        "grad": rows_grad,
        "softmax": Softmax(softmax[0], softmax[-1]),
        "delta": None,
        "C": replace(call.static(rows_out, rows_grad), precision=precision, exact=len(softmax) == 2),
    }
    passes = {"out": rows_out, "grad_scale": call.logit_scale}
    of_queries = {"dq": rows(dq), "d_rel_h": d_rel_h, "d_rel_w": d_rel_w}
    of_keys = {"dk": rows(dk), "dv": rows(dv)}
    if whole is None or bias_needs_grad or table_index is not None:
        arguments["delta"] = torch.empty_like(softmax[0])
    if whole is not None:
        blocks = -(-max(call.nq, call.nk) // whole.block_m)
        parts = min(blocks, -(-2 * multiprocessors(q.device) // (call.sequences * call.heads)))
        count = call.sequences * call.heads * parts
        launch(_whole, count, **arguments, **passes, **of_queries, **of_keys, parts=parts, **whole.options())
    else:
        queries, keys = _split_tiles(call, name, tile)
        count = call.programs(call.nq, queries.block_m)
        launch(_queries, count, **arguments, **passes, **of_queries, **queries.options())
        launch(_keys, call.programs(call.nk, keys.block_n), **arguments, **passes, **of_keys, **keys.options())
    d_bias = d_table = None
    if call.bias is not None and bias_needs_grad:
        d_bias = _bias_gradient(call, arguments, _SUMMED_TILES.get(name, {}).get(size, tile))
    if call.bias_table is not None and table_index is not None:
        # The coordinates of the table's entries take registers that eight warps have and four have not.
        d_logits = _logit_gradient(call, 1, call.heads, arguments, tile._replace(num_warps=8))
        d_table = _table_gradient(d_logits[0], call.bias_table, table_index)
    return Gradients(dq, dk, dv, d_bias, d_rel_h, d_rel_w, d_table)


def _split_tiles(call: Call, name: str, tile: Tile) -> tuple[Tile, Tile]:
    """Of `_queries` and of `_keys`."""
    if name == "sm100" and (call.bias_table is not None or call.dropout_p > 0.0):
        tile = tile._replace(num_warps=8)
    # Eight warps would make every logit twice on sm90.
    related = name == "sm90" and call.rel_pos_h is not None
    queries = tile._replace(block_n=min(tile.block_n, _STEP)) if related else tile
    # Two accumulators of a wide head fill the registers of `_keys`.
    keys = tile._replace(block_m=min(tile.block_m, _STEP)) if related or call.width > _WIDE else tile
    return queries, keys


def _bias_gradient(call: Call, arguments: dict[str, Any], tile: Tile) -> Tensor:
    assert call.bias is not None
    shape = (1,) * (4 - call.bias.ndim) + tuple(call.bias.shape)
    gradient = _logit_gradient(call, shape[0], shape[1], arguments, tile)
    broadcast = [dim for dim in (2, 3) if shape[dim] == 1 and gradient.shape[dim] > 1]
    if broadcast:
        gradient = gradient.sum(broadcast, keepdim=True)
    return gradient.reshape(call.bias.shape).to(call.bias.dtype)


def _logit_gradient(call: Call, sequences: int, heads: int, arguments: dict[str, Any], tile: Tile) -> Tensor:
    """float32 (sequences, heads, Nq, Nk), either of which may be 1: the gradient is then summed over them."""
    result = torch.empty(sequences, heads, call.nq, call.nk, dtype=torch.float32, device=call.q.device)
    blocks = -(-call.nq // tile.block_m) * -(-call.nk // tile.block_n)
    launch(
        _logits_summed,
        sequences * heads * blocks,
        **arguments,
        d_bias=result,
        kept_sequences=sequences,
        kept_heads=heads,
        **tile.options(),
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
    q, k, v, out, grad, softmax, delta, dk, dv, start, place, sizes, grad_scale, changes,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys.  Tiles of logits are transposed: keys are rows."""
    nq = place.nq
    ks = load(k, start, place.nk, place, True, BLOCK_N, C)
    vs = load(v, start, place.nk, place, True, BLOCK_N, C)
    n = start + tl.arange(0, BLOCK_N)
    acc_k = zero_pieces(BLOCK_N, C)
    acc_v = zero_pieces(BLOCK_N, C)
    for row in tl.range(0, nq, BLOCK_M):
        m = row + tl.arange(0, BLOCK_M)
        qs = load(q, row, nq, place, True, BLOCK_M, C)
        gs = load(grad, row, nq, place, True, BLOCK_M, C)
        top = load_top(softmax, m, nq)
        # Keys beyond the last spoil only themselves: no mask.
        s = adjust(
            product(ks, qs, C), m[None, :], n[:, None], place, sizes.scale, changes, C.scale_first or C.holes, C
        )  # fmt: skip
        rest = load_rest(softmax, m, nq, C)
        p = normalised(s, sizes.scale, top[None, :], rest[None, :], C)
        acc_v = add_product(drop(p, m[None, :], n[:, None], place, changes), gs, acc_v, C)
        if delta is None:
            inner = _row_sums(gs, load(out, row, nq, place, True, BLOCK_M, C))
        else:
            inner = tl.load(delta + m, mask=m < nq, other=0.0)
        dp = drop(product(vs, gs, C), m[None, :], n[:, None], place, changes)
        acc_k = add_product(p * (dp - inner[None, :]), qs, acc_k, C)
    store(dk, n, place.nk, acc_k, grad_scale, place, C)
    store(dv, n, place.nk, acc_v, 1.0, place, C)


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
    q, k, v, out, grad, softmax, delta, dq, d_rel_h, d_rel_w, start, place, sizes, grad_scale, changes,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta where there is room for it."""
    nq = place.nq
    m = start + tl.arange(0, BLOCK_M)
    qs = load(q, start, nq, place, True, BLOCK_M, C)
    gs = load(grad, start, nq, place, True, BLOCK_M, C)
    inner = _row_sums(gs, load(out, start, nq, place, True, BLOCK_M, C))
    if delta is not None:
        tl.store(delta + m, inner, mask=m < nq)
    top = load_top(softmax, m, nq)
    rest = load_rest(softmax, m, nq, C)
    acc = zero_pieces(BLOCK_M, C)
    if d_rel_h is not None:
        KEYS: tl.constexpr = C.keys
        PRECISION: tl.constexpr = C.precision
        acc_h = zeros(BLOCK_M, _columns(KEYS[0]))
        acc_w = zeros(BLOCK_M, _columns(KEYS[1]))
    for first in tl.range(0, place.nk, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        ks = load(k, first, place.nk, place, True, BLOCK_N, C)
        vs = load(v, first, place.nk, place, True, BLOCK_N, C)
        s = adjust(product(qs, ks, C), m[:, None], n[None, :], place, sizes.scale, changes, True, C)
        p = normalised(s, sizes.scale, top[:, None], rest[:, None], C)
        dp = drop(product(gs, vs, C), m[:, None], n[None, :], place, changes)
        ds = (p * (dp - inner[:, None])).to(ks[0].dtype)
        acc = add_product(ds, ks, acc, C)
        if d_rel_h is not None:
            # Sums over the keys of one row, and of one column, of the grid.
            row = _one_hot(n // KEYS[1], acc_h.shape[1], ds.dtype)
            column = _one_hot(n % KEYS[1], acc_w.shape[1], ds.dtype)
            acc_h = tl.dot(ds, row, acc_h, input_precision=PRECISION)
            acc_w = tl.dot(ds, column, acc_w, input_precision=PRECISION)
    store(dq, m, nq, acc, grad_scale, place, C)
    if d_rel_h is not None:
        head = (place.sequence * sizes.heads + place.head) * nq
        _store_relative(d_rel_h + head * KEYS[0], m, nq, acc_h, KEYS[0])
        _store_relative(d_rel_w + head * KEYS[1], m, nq, acc_w, KEYS[1])


@triton.jit
def _whole(
    q, k, v, out, grad, softmax, delta, dq, d_rel_h, d_rel_w, dk, dv, sizes, changes, grad_scale, parts,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All of one head, or one of `parts` that split it.

    BLOCK_M keys stay while BLOCK_N queries at a time pass by, then BLOCK_M queries while BLOCK_N keys do.
    """
    part = tl.program_id(0) % parts
    place = locate_head(tl.program_id(0) // parts, sizes, C)
    q = head_of(q, place, C)
    k = head_of(k, place, C)
    v = head_of(v, place, C)
    out = head_of(out, place, C)
    grad = head_of(grad, place, C)
    dq = head_of(dq, place, C)
    dk = head_of(dk, place, C)
    dv = head_of(dv, place, C)
    softmax = softmax_of(softmax, place, sizes)
    if delta is not None:
        delta = statistics(delta, place, sizes)
    for block in tl.range(part, tl.cdiv(sizes.nk, BLOCK_M), parts):
        _key_block(
            q, k, v, out, grad, softmax, None, dk, dv, block * BLOCK_M, place, sizes, grad_scale, changes,
            C, BLOCK_N, BLOCK_M,
        )  # fmt: skip
    for block in tl.range(part, tl.cdiv(sizes.nq, BLOCK_M), parts):
        _query_block(
            q, k, v, out, grad, softmax, delta, dq, d_rel_h, d_rel_w, block * BLOCK_M, place, sizes, grad_scale,
            changes, C, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _queries(
    q, k, v, out, grad, softmax, delta, dq, d_rel_h, d_rel_w, sizes, changes, grad_scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries."""
    start, place = locate(tl.program_id(0), sizes.nq, sizes, BLOCK_M, C)
    _query_block(
        head_of(q, place, C), head_of(k, place, C), head_of(v, place, C), head_of(out, place, C),
        head_of(grad, place, C), softmax_of(softmax, place, sizes), statistics(delta, place, sizes),
        head_of(dq, place, C), d_rel_h, d_rel_w, start, place, sizes, grad_scale, changes, C, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _keys(
    q, k, v, out, grad, softmax, delta, dk, dv, sizes, changes, grad_scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys, after `_queries` has left delta."""
    start, place = locate(tl.program_id(0), sizes.nk, sizes, BLOCK_N, C)
    _key_block(
        head_of(q, place, C), head_of(k, place, C), head_of(v, place, C), head_of(out, place, C),
        head_of(grad, place, C), softmax_of(softmax, place, sizes), statistics(delta, place, sizes),
        head_of(dk, place, C), head_of(dv, place, C), start, place, sizes, grad_scale, changes, C, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _logits_summed(
    q, k, v, grad, softmax, delta, d_bias, sizes, changes, kept_sequences, kept_heads,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of logits, summed over all heads if `kept_heads` is 1, all sequences likewise."""
    nq = sizes.nq
    nk = sizes.nk
    across = tl.cdiv(nk, BLOCK_N)
    blocks = tl.cdiv(nq, BLOCK_M) * across
    kept = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks // across * BLOCK_M
    first = tl.program_id(0) % across * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    n = first + tl.arange(0, BLOCK_N)
    summed_heads = sizes.heads // kept_heads
    acc = zeros(BLOCK_M, BLOCK_N)
    for i in tl.range(0, sizes.sequences // kept_sequences * summed_heads):
        sequence = kept // kept_heads + i // summed_heads
        place = locate_head(sequence * sizes.heads + kept % kept_heads + i % summed_heads, sizes, C)
        qs = load(head_of(q, place, C), row, nq, place, True, BLOCK_M, C)
        ks = load(head_of(k, place, C), first, nk, place, True, BLOCK_N, C)
        s = adjust(product(qs, ks, C), m[:, None], n[None, :], place, sizes.scale, changes, True, C)
        vs = load(head_of(v, place, C), first, nk, place, True, BLOCK_N, C)
        gs = load(head_of(grad, place, C), row, nq, place, True, BLOCK_M, C)
        dp = drop(product(gs, vs, C), m[:, None], n[None, :], place, changes)
        inner = tl.load(statistics(delta, place, sizes) + m, mask=m < nq, other=0.0)
        of_head = softmax_of(softmax, place, sizes)
        top = load_top(of_head, m, nq)
        rest = load_rest(of_head, m, nq, C)
        p = normalised(s, sizes.scale, top[:, None], rest[:, None], C)
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
