"""attention: softmax(scale * q k^T + bias) v for every head, q, k, v read through their strides.

Shapes: q (B, Nq, H, D), k and v (B, Nk, H, D), bias broadcast to (B, H, Nq, Nk), out (B, Nq, H * D).

Cost per head in 16 bits: 4 Nq Nk D flops, Nq Nk exponentials, (2 Nq + 2 Nk) 2 D bytes.  ViT-B/16 at 224 (N = 197,
D = 64): 9.9 MFLOP and 101 KB, 98 flops a byte, so memory bounds it on every GPU that does more than that per byte
(H100: 270); from N = 577 on (290 flops a byte) the products and the exponentials do.

Two kernels.  `_short` (Nk <= 272): one program holds a head's keys and values, takes the softmax of whole rows and
walks over the queries, so that k and v are read once and nothing is rescaled.  `_long`: one program per block of
queries, online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), main loop unmasked, then a tail of at most two
blocks.

Tiles need powers of two and head dims are not: D is split (72 = 64 + 16 with 8 columns masked), which wastes at most
a quarter in registers and nothing in memory.  Nk likewise: 197 runs as 128 + 64 + 16.  Queries come 64 at a time, the
rows of a wgmma: 197 take four blocks.  A last block of 16 rows for the five that remain needs the keys in a second
layout: compiled for sm90 it took registers from 203 to 255, and spilled.

A norm and a rotation of q and k run inside either kernel, as it loads them (attention_prologue.py), or as a pass over
memory before it.  The pass costs 4 (Nq + Nk) D bytes a head in 16 bits, and two launches.  Inside they cost some 11
instructions for each channel of a row, and do so for a key as often as a program loads it: once for every part that
`_short` cuts a head into, once for every block of queries in `_long`.  For each of its SMs an H100 moves 23 bytes and
runs 220 such instructions in a nanosecond, so six loads of a key would cost what the pass costs; four are the limit
(`_READERS`), since prepared keys can't be copied to shared memory behind the arithmetic.  Where the programs don't fill
the GPU once, launches are what counts, and any number may.  `_prepares_inside` is the rule.

Without a bias, scale and log2 e are one factor in the exponential.  The product of a row's maximum with it is rounded,
which makes all its weights too large or too small alike and cancels in the quotient; logits beyond 1e8 would leave the
range of the weights.  With a bias the maximum is taken off first, so that the least finite one, which some masks are
made of, masks a key, but not the whole of a row.

attention_call.py tells how kernels take their arguments, attention_tile.py what they do to a tile.
"""

# ruff: noqa: RUF005 - Triton's tuples only grow by +

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from fastvit.kernels.attention_call import Call, Tile, heads_of, unit_stride
from fastvit.kernels.attention_prologue import load_k, load_q, prologue
from fastvit.kernels.attention_tile import (
    Softmax,
    add_product,
    adjust,
    drop,
    first,
    head_of,
    load,
    locate,
    locate_head,
    power,
    product,
    softmax_of,
    store,
    store_softmax,
    weights,
    zero_pieces,
)
from fastvit.kernels.launch import ARCHS, arch, launch, multiprocessors
from torch import Tensor

# Nk up to which a row of logits is cut into these blocks.
_CHUNKS = (
    (16, (16,)),
    (32, (32,)),
    (64, (64,)),
    (80, (64, 16)),
    (128, (128,)),
    (144, (128, 16)),
    (192, (128, 64)),
    (208, (128, 64, 16)),
    (256, (128, 128)),
    (272, (128, 128, 16)),
)

# (kind of product, padded head dim up to) -> tile of the streaming kernel.
_LONG = {
    "sm80": {
        ("16", 64): Tile(64, 64, 4, 2),
        ("16", 128): Tile(64, 32, 4, 2),
        ("16", 256): Tile(32, 32, 8, 2),
    },
    "sm90": {
        ("16", 64): Tile(64, 128, 4, 2),
        ("16", 128): Tile(64, 64, 4, 2),
        ("16", 256): Tile(64, 32, 4, 2),
    },
    "sm100": {
        ("16", 64): Tile(64, 64, 4, 2),
        ("16", 128): Tile(64, 64, 4, 2),
        ("16", 256): Tile(64, 32, 4, 2),
    },
    "gfx942": {
        ("16", 64): Tile(64, 64, 4, 2),
        ("16", 128): Tile(64, 64, 4, 2),
        ("16", 256): Tile(32, 32, 4, 2),
    },
}
for _tiles in _LONG.values():
    _tiles |= {
        ("tf32", 64): Tile(32, 32, 4, 1),
        ("tf32", 128): Tile(64, 32, 8, 1),
        ("ieee", 64): Tile(32, 32, 4, 1),
        ("ieee", 128): Tile(32, 32, 4, 1),
        ("ieee", 256): Tile(16, 32, 4, 1),
    }

# Padded head dim up to -> longest Nk that `_short` serves in 16 bits: alone, with bias, preparing q and k.  Beyond it,
# registers (on sm100 tensor memory) run out; on sm80 and gfx942, where products read registers, at once.
# Triton 3.9 for sm100 keeps prepared keys in registers, hundreds of which spill.
_SHORT: dict[str, dict[int, tuple[int, int, int]]] = {
    "sm80": {},
    "sm90": {64: (272, 128, 272), 80: (208, 128, 144), 96: (192, 128, 144), 128: (128, 0, 128)},
    "sm100": {64: (272, 128, 0), 80: (256, 128, 0), 96: (192, 128, 0), 128: (128, 0, 0)},
    "gfx942": {},
}

# Up to which width of a head in `_long`, where logits change in 16 bits, and Nk in `_short` four warps have registers.
_FOUR_WARPS = dict.fromkeys(ARCHS, (math.inf, math.inf)) | {"sm100": (96, 192)}

# How many programs may normalise and rotate the same key, and the widest head that leaves them registers to.
_READERS, _WIDEST_PREPARED = 4, 128


def attention(q: Tensor, k: Tensor, v: Tensor, *, softmax: Tensor | None = None, **options: Any) -> Tensor:
    """Launch: the meaning of `fastvit.ops.attention`.

    softmax: float32 (1 or 2, *`Call.row_shape`), where `Softmax` is written for the backward, in one number or two.
    options: as `Call` names them.
    """
    call = Call(unit_stride(q), unit_stride(k), unit_stride(v), **options)
    if call.prepares and not _prepares_inside(call):
        call = _prepared(call)
    out = torch.empty(*q.shape[:2], q.shape[2] * q.shape[3], dtype=q.dtype, device=q.device)
    rows_out = heads_of(out, call.heads)
    arguments = call.arguments() | {
        "prologue": call.prologue(),
        "out": rows_out,
        "softmax": None if softmax is None else Softmax(softmax[0], softmax[-1]),
        "C": replace(call.static(rows_out), exact=softmax is not None and len(softmax) == 2),
    }
    if parts := _parts(call):
        launch(
            _short,
            call.sequences * call.heads * parts,
            **arguments,
            parts=parts,
            CHUNKS=_chunks(call),
            BLOCK_M=_block_m(call),
            num_warps=4 if call.nk <= _FOUR_WARPS[arch(q.device)][1] else 8,
            num_stages=1,
        )
        return out
    tile = _tile(call)
    tail, last = _tail(call.nk % tile.block_n) if call.cu_seqlens is None else (0, 0)
    launch(_long, call.programs(call.nq, tile.block_m), **arguments, TAIL=tail, LAST=last, **tile.options())
    return out


def _block_m(call: Call) -> int:
    return 16 if call.nq <= 16 else 64


def _chunks(call: Call) -> tuple[int, ...]:
    chunks = next(chunks for longest, chunks in _CHUNKS if call.nk <= longest)
    # Prepared in float32 128 keys at a time would take every register.
    return tuple(width for chunk in chunks for width in ((64, 64) if chunk == 128 and call.prepares else (chunk,)))


def _tile(call: Call) -> Tile:
    name = arch(call.q.device)
    tile = _LONG[name][call.kind, min(256, max(64, triton.next_power_of_2(call.width)))]
    tile = tile._replace(block_m=min(tile.block_m, _block_m(call)))
    # A tile of bias takes the registers of a tile of logits; in float32 what a product holds counts for more.
    if call.changed and call.kind == "16":
        tile = tile._replace(block_n=tile.block_n // 2)
        if call.width > _FOUR_WARPS[name][0]:
            tile = tile._replace(num_warps=8)
    if call.prepares and call.width > 64:  # and so do keys in float32
        tile = tile._replace(block_n=min(tile.block_n, 32), num_warps=8 if call.kind == "ieee" else tile.num_warps)
    return tile


def _parts(call: Call) -> int:
    """How many programs of `_short` split a head's queries; 0: `_long` serves."""
    limits = next((limits for widest, limits in _SHORT[arch(call.q.device)].items() if call.width <= widest), (0, 0, 0))
    longest = min(limits[0], limits[1] if call.changed else limits[0], limits[2] if call.prepares else limits[0])
    if call.kind != "16" or call.nk > longest or call.cu_seqlens is not None:
        return 0
    # A program for each head fills the GPU a few times over in a large batch; a small one needs more of them.
    return min(-(-call.nq // _block_m(call)), -(-4 * multiprocessors(call.q.device) // (call.sequences * call.heads)))


def _prepares_inside(call: Call) -> bool:
    """Are q and k normalised and rotated as they are loaded, each key once by every program of its head?"""
    heads = call.sequences * call.heads
    # Of packed sequences only the mean length is known here.
    queries = call.nq if call.cu_seqlens is None else call.nq / call.sequences
    readers = _parts(call) or math.ceil(queries / _tile(call).block_m)
    few = readers <= _READERS or readers * heads <= multiprocessors(call.q.device)
    return few and call.head_dim <= _WIDEST_PREPARED


def _prepared(call: Call) -> Call:
    """With q and k normalised and rotated by a pass over memory."""
    shared = {
        "norm": call.qk_norm, "eps": call.qk_norm_eps, "rope": call.rope, "interleaved": call.rope_interleaved,
    }  # fmt: skip
    q = prologue(call.q, weight=call.q_norm_weight, bias=call.q_norm_bias, **shared)
    k = prologue(call.k, weight=call.k_norm_weight, bias=call.k_norm_bias, **shared)
    return replace(call, q=q, k=k, qk_norm="none", rope=None)


def _tail(keys: int) -> tuple[int, int]:
    """The widths of an unmasked and of a masked block (0: none) for the keys that the main loop leaves."""
    full = 1 << (keys.bit_length() - 1) if keys >= 16 else 0
    return full, max(16, triton.next_power_of_2(keys - full)) if keys > full else 0


@triton.jit
def _inverse(total):
    """A row whose every key is masked has a total of 0 and gives zeros."""
    return (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def _finite(top):
    """A row that is -inf so far has no maximum to subtract."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _short(
    q, k, v, out, softmax, sizes, changes, prologue, parts,
    C: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All of one head, or one of `parts` that split its queries."""
    part = tl.program_id(0) % parts
    place = locate_head(tl.program_id(0) // parts, sizes, C)
    nq = sizes.nq
    scale = sizes.scale
    q = head_of(q, place, C)
    k = head_of(k, place, C)
    v = head_of(v, place, C)
    out = head_of(out, place, C)

    ks = ()
    vs = ()
    for c in tl.static_range(len(CHUNKS)):
        ks = ks + (load_k(k, first(CHUNKS, c), prologue, place, c == len(CHUNKS) - 1, CHUNKS[c], C),)
        vs = vs + (load(v, first(CHUNKS, c), sizes.nk, place, c == len(CHUNKS) - 1, CHUNKS[c], C),)

    for block in tl.range(part, tl.cdiv(nq, BLOCK_M), parts):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        qs = load_q(q, block * BLOCK_M, prologue, place, BLOCK_M, C)
        logits = ()
        for c in tl.static_range(len(CHUNKS)):
            n = first(CHUNKS, c) + tl.arange(0, CHUNKS[c])
            s = product(qs, ks[c], C)
            s = adjust(s, m[:, None], n[None, :], place, scale, changes, c == len(CHUNKS) - 1, C)
            logits = logits + (s,)
        top = tl.max(logits[0], 1)
        for c in tl.static_range(1, len(CHUNKS)):
            top = tl.maximum(top, tl.max(logits[c], 1))
        if not C.scale_first:
            top = top * scale
        if C.holes:
            top = _finite(top)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = zero_pieces(BLOCK_M, C)
        for c in tl.static_range(len(CHUNKS)):
            p = weights(logits[c], scale, top[:, None], C)
            total += tl.sum(p, 1)
            n = first(CHUNKS, c) + tl.arange(0, CHUNKS[c])
            acc = add_product(drop(p, m[:, None], n[None, :], place, changes), vs[c], acc, C)
        store(out, m, nq, acc, _inverse(total), place, C)
        if softmax is not None:
            store_softmax(softmax_of(softmax, place, sizes), m, nq, top, total, C)


@triton.jit
def _online(
    qs, k, v, m, start, place, scale, changes, prologue, acc, total, top,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax."""
    ks = load_k(k, start, prologue, place, MASKED, WIDTH, C)
    n = start + tl.arange(0, WIDTH)
    s = adjust(product(qs, ks, C), m[:, None], n[None, :], place, scale, changes, MASKED, C)
    here = tl.max(s, 1)
    if not C.scale_first:
        here = here * scale
    new_top = tl.maximum(top, here)
    base = new_top
    if C.holes:
        base = _finite(new_top)
    p = weights(s, scale, base[:, None], C)
    shrink = power(top - base, C)
    total = total * shrink + tl.sum(p, 1)
    scaled = ()
    for i in tl.static_range(len(acc)):
        scaled = scaled + (acc[i] * shrink[:, None],)
    vs = load(v, start, place.nk, place, MASKED, WIDTH, C)
    return add_product(drop(p, m[:, None], n[None, :], place, changes), vs, scaled, C), total, new_top


@triton.jit
def _long(
    q, k, v, out, softmax, sizes, changes, prologue,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One block of queries."""
    row, place = locate(tl.program_id(0), sizes.nq, sizes, BLOCK_M, C)
    nq = place.nq
    nk = place.nk
    scale = sizes.scale
    q = head_of(q, place, C)
    k = head_of(k, place, C)
    v = head_of(v, place, C)
    out = head_of(out, place, C)

    m = row + tl.arange(0, BLOCK_M)
    qs = load_q(q, row, prologue, place, BLOCK_M, C)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_pieces(BLOCK_M, C)
    full = nk // BLOCK_N * BLOCK_N
    # What a bias's addresses share, kept from block to block, would take registers that a wide head lacks.
    CROWDED: tl.constexpr = C.scale_first and C.head_dim > 128
    for start in tl.range(0, full, BLOCK_N, disable_licm=CROWDED):
        acc, total, top = _online(
            qs, k, v, m, start, place, scale, changes, prologue, acc, total, top, False, BLOCK_N, C
        )  # fmt: skip
    if sizes.cu_seqlens is not None:  # whose lengths are known only here
        for start in tl.range(full, nk, BLOCK_N):
            acc, total, top = _online(
                qs, k, v, m, start, place, scale, changes, prologue, acc, total, top, True, BLOCK_N, C
            )  # fmt: skip
    if TAIL > 0:
        acc, total, top = _online(qs, k, v, m, full, place, scale, changes, prologue, acc, total, top, False, TAIL, C)
    if LAST > 0:
        acc, total, top = _online(
            qs, k, v, m, full + TAIL, place, scale, changes, prologue, acc, total, top, True, LAST, C
        )
    store(out, m, nq, acc, _inverse(total), place, C)
    if softmax is not None:
        store_softmax(softmax_of(softmax, place, sizes), m, nq, top, total, C)
