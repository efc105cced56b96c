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
a quarter in registers and nothing in memory.  Nk likewise: 197 runs as 128 + 64 + 16.
"""

# ruff: noqa: RUF005, SIM108 - Triton's tuples only grow by +, and its constant `if` is no expression

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastvit.kernels.launch import arch, launch, multiprocessors, precision
from torch import Tensor


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


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
        ("16", 64): _Tile(64, 64, 4, 2),
        ("16", 128): _Tile(64, 32, 4, 2),
        ("16", 256): _Tile(32, 32, 8, 2),
    },
    "sm90": {
        ("16", 64): _Tile(64, 128, 4, 2),
        ("16", 128): _Tile(64, 64, 4, 2),
        ("16", 256): _Tile(64, 32, 4, 2),
    },
    "sm100": {
        ("16", 64): _Tile(64, 64, 4, 2),
        ("16", 128): _Tile(64, 64, 4, 2),
        ("16", 256): _Tile(64, 32, 4, 2),
    },
    "gfx942": {
        ("16", 64): _Tile(64, 64, 4, 2),
        ("16", 128): _Tile(64, 64, 4, 2),
        ("16", 256): _Tile(32, 32, 4, 2),
    },
}
for _tiles in _LONG.values():
    _tiles |= {
        ("tf32", 64): _Tile(32, 32, 4, 1),
        ("tf32", 128): _Tile(64, 32, 8, 1),
        ("ieee", 64): _Tile(32, 32, 4, 1),
        ("ieee", 128): _Tile(32, 32, 4, 1),
        ("ieee", 256): _Tile(16, 32, 4, 1),
    }

# Padded head dim up to -> longest Nk that `_short` serves in 16 bits, without and with bias.  Beyond it, registers (on
# sm100 tensor memory) run out; on sm80 and gfx942, where products read registers, at once.
_SHORT = {
    "sm80": {},
    "sm90": {64: (272, 128), 80: (208, 128), 96: (192, 128), 128: (128, 0)},
    "sm100": {64: (272, 128), 80: (256, 128), 96: (192, 128), 128: (128, 0)},
    "gfx942": {},
}

# The widest head whose tf32 operands fit the registers.
_WIDEST_TF32 = {"sm80": 64, "sm90": 128, "sm100": 128, "gfx942": 128}

# The widest piece of a head dim whose products need no spill.
_WIDEST = {"sm80": 64, "sm90": 256, "sm100": 256, "gfx942": 256}


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.attention`."""
    batch, nq, heads, head_dim = q.shape
    nk = k.shape[1]
    q, k, v = (t if t.stride(-1) == 1 or head_dim == 1 else t.contiguous() for t in (q, k, v))
    out = torch.empty(batch, nq, heads * head_dim, dtype=q.dtype, device=q.device)
    if scale is None:
        scale = head_dim**-0.5
    if bias is not None:
        bias = (bias.float() if bias.dtype == torch.float64 else bias).expand(batch, heads, nq, nk)
    name = arch(q.device)
    split = _split(head_dim, 32 if q.dtype == torch.float32 else _WIDEST[name])
    width = sum(split)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], nq * heads * head_dim, heads * head_dim)
    arguments = (q, k, v, bias, out, heads, nq, nk, scale * math.log2(math.e), *strides)
    arguments += (0, 0, 0, 0) if bias is None else bias.stride()
    constants = {
        "HEAD_DIM": head_dim,
        "SPLIT": split,
        "ALIGN": math.gcd(16, head_dim, *strides),
        # The row maximum may be scaled after it is found only if scaling keeps the order.
        "SCALE_FIRST": bias is not None or scale <= 0,
        "PRECISION": precision(q.dtype) if head_dim <= _WIDEST_TF32[name] else "ieee",
    }
    block_m = 16 if nq <= 16 else 64
    limits = next((limits for widest, limits in _SHORT[name].items() if width <= widest), (0, 0))
    if q.dtype != torch.float32 and nk <= limits[bias is not None]:
        blocks = -(-nq // block_m)
        # A program for each head fills the GPU a few times over in a large batch; a small one needs more of them.
        parts = min(blocks, -(-4 * multiprocessors(q.device) // (batch * heads)))
        launch(
            _short,
            batch * heads * parts,
            *arguments,
            parts,
            **constants,
            CHUNKS=next(chunks for longest, chunks in _CHUNKS if nk <= longest),
            BLOCK_M=block_m,
            num_warps=4,
            num_stages=1,
        )
        return out
    kind = "16" if q.dtype != torch.float32 else constants["PRECISION"]
    tile = _LONG[name][kind, min(256, max(64, triton.next_power_of_2(width)))]
    block_m = min(tile.block_m, block_m)
    # A tile of bias takes the registers of a tile of logits; in float32 what a product holds counts for more.
    block_n = tile.block_n if bias is None or kind != "16" else tile.block_n // 2
    tail, last = _tail(nk % block_n)
    launch(
        _long,
        batch * heads * -(-nq // block_m),
        *arguments,
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TAIL=tail,
        LAST=last,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _split(head_dim: int, widest: int) -> tuple[int, ...]:
    """Powers of two from 16 (the least that tensor cores take) to `widest` that cover `head_dim`."""
    pieces = [widest] * (head_dim // widest)
    if rest := head_dim % widest:
        first = max(16, 1 << (rest.bit_length() - 1))
        pieces.append(first)
        if rest > first:
            pieces.append(max(16, triton.next_power_of_2(rest - first)))
    return tuple(pieces)


def _tail(keys: int) -> tuple[int, int]:
    """The widths of an unmasked and of a masked block (0: none) for the keys that the main loop leaves."""
    full = 1 << (keys.bit_length() - 1) if keys >= 16 else 0
    return full, max(16, triton.next_power_of_2(keys - full)) if keys > full else 0


@triton.constexpr_function
def _first(widths, i):
    """Where the i-th of several neighbouring blocks begins."""
    return sum(int(w) for w in widths[:i])


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def _load_piece(
    ptr, stride, n, limit, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    d = FIRST + tl.arange(0, WIDTH)
    at = ptr + (n[:, None] * stride + d[None, :])
    if MASKED:
        if FIRST + WIDTH > HEAD_DIM:
            return tl.load(at, mask=(n[:, None] < limit) & (d[None, :] < HEAD_DIM), other=0.0)
        else:
            return tl.load(at, mask=n[:, None] < limit, other=0.0)
    else:
        if FIRST + WIDTH > HEAD_DIM:
            return tl.load(at, mask=d[None, :] < HEAD_DIM, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _load(
    ptr, stride, start, limit, MASKED: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr
):
    """Rows start .. start + ROWS of a head, as one tile per piece of the head dim."""
    ptr += tl.cast(start, tl.int64) * stride
    n = tl.arange(0, ROWS)
    pieces = ()
    for i in tl.static_range(len(SPLIT)):
        pieces = pieces + (_load_piece(ptr, stride, n, limit - start, MASKED, HEAD_DIM, _first(SPLIT, i), SPLIT[i]),)
    return pieces


@triton.jit
def _logits(
    q,
    k,
    scale,
    bias,
    bias_q,
    bias_k,
    row,
    start,
    nq,
    nk,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """In units of log 2 if SCALE_FIRST, else unscaled; -inf beyond the last key if MASKED."""
    s = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(q)):
        s = tl.dot(q[i], tl.trans(k[i]), s, input_precision=PRECISION)
    n = start + tl.arange(0, WIDTH)
    if SCALE_FIRST:
        s = s * scale
    if bias is not None:
        # Rows beyond the last are never stored: read the last one instead of masking.
        m = tl.minimum(tl.arange(0, ROWS), nq - 1 - row)
        at = bias + tl.cast(row, tl.int64) * bias_q + (m[:, None] * bias_q + n[None, :] * bias_k)
        if MASKED:
            b = tl.load(at, mask=n[None, :] < nk, other=0.0)
        else:
            b = tl.load(at)
        s = tl.fma(b.to(tl.float32), 1.4426950408889634, s)
    if MASKED:
        s = tl.where(n[None, :] < nk, s, float("-inf"))
    return s


@triton.jit
def _weights(s, scale, top, SCALE_FIRST: tl.constexpr):
    """exp2(scaled s - top)."""
    if SCALE_FIRST:
        return tl.exp2(s - top[:, None])
    else:
        return tl.exp2(tl.fma(s, scale, -top[:, None]))


@triton.jit
def _times_values(p, v, acc, PRECISION: tl.constexpr):
    new = ()
    for i in tl.static_range(len(v)):
        new = new + (tl.dot(p.to(v[i].dtype), v[i], acc[i], input_precision=PRECISION),)
    return new


@triton.jit
def _store_piece(out, stride, m, acc, nq, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = (m[:, None] < nq) & (d[None, :] < HEAD_DIM)
    tl.store(out + m[:, None].to(tl.int64) * stride + d[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store(out, stride, m, acc, total, nq, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr):
    # A row whose every key is masked has a total of 0 and gives zeros.
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    for i in tl.static_range(len(SPLIT)):
        _store_piece(out, stride, m, acc[i] * inverse[:, None], nq, HEAD_DIM, _first(SPLIT, i), SPLIT[i])


@triton.jit
def _finite(top):
    """A row that is -inf so far has no maximum to subtract."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _short(
    q, k, v, bias, out, heads, nq, nk, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, parts,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    batch = (tl.program_id(0) // parts // heads).to(tl.int64)
    head = (tl.program_id(0) // parts % heads).to(tl.int64)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + head * HEAD_DIM, ALIGN)
    if bias is not None:
        bias += batch * bias_batch + head * bias_head

    ks = ()
    vs = ()
    for c in tl.static_range(len(CHUNKS)):
        ks = ks + (_load(k, k_row, _first(CHUNKS, c), nk, c == len(CHUNKS) - 1, CHUNKS[c], HEAD_DIM, SPLIT),)
        vs = vs + (_load(v, v_row, _first(CHUNKS, c), nk, c == len(CHUNKS) - 1, CHUNKS[c], HEAD_DIM, SPLIT),)

    for block in tl.range(part, tl.cdiv(nq, BLOCK_M), parts):
        row = block * BLOCK_M
        qs = _load(q, q_row, row, nq, True, BLOCK_M, HEAD_DIM, SPLIT)
        logits = ()
        for c in tl.static_range(len(CHUNKS)):
            s = _logits(
                qs, ks[c], scale, bias, bias_q, bias_k, row, _first(CHUNKS, c), nq, nk,
                c == len(CHUNKS) - 1, BLOCK_M, CHUNKS[c], SCALE_FIRST, PRECISION,
            )  # fmt: skip
            logits = logits + (s,)
        top = tl.max(logits[0], 1)
        for c in tl.static_range(1, len(CHUNKS)):
            top = tl.maximum(top, tl.max(logits[c], 1))
        if not SCALE_FIRST:
            top = top * scale
        if bias is not None:
            top = _finite(top)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = ()
        for i in tl.static_range(len(SPLIT)):
            acc = acc + (_zeros(BLOCK_M, SPLIT[i]),)
        for c in tl.static_range(len(CHUNKS)):
            p = _weights(logits[c], scale, top, SCALE_FIRST)
            total += tl.sum(p, 1)
            acc = _times_values(p, vs[c], acc, PRECISION)
        _store(out, out_row, row + tl.arange(0, BLOCK_M), acc, total, nq, HEAD_DIM, SPLIT)


@triton.jit
def _online(
    qs, k, k_row, v, v_row, bias, bias_q, bias_k, row, start, nq, nk, scale, acc, total, top,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr,
    SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax."""
    ks = _load(k, k_row, start, nk, MASKED, WIDTH, HEAD_DIM, SPLIT)
    s = _logits(qs, ks, scale, bias, bias_q, bias_k, row, start, nq, nk, MASKED, BLOCK_M, WIDTH, SCALE_FIRST, PRECISION)
    here = tl.max(s, 1)
    if not SCALE_FIRST:
        here = here * scale
    new_top = tl.maximum(top, here)
    base = new_top
    if bias is not None:
        base = _finite(new_top)
    p = _weights(s, scale, base, SCALE_FIRST)
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    scaled = ()
    for i in tl.static_range(len(SPLIT)):
        scaled = scaled + (acc[i] * shrink[:, None],)
    vs = _load(v, v_row, start, nk, MASKED, WIDTH, HEAD_DIM, SPLIT)
    return _times_values(p, vs, scaled, PRECISION), total, new_top


@triton.jit
def _long(
    q, k, v, bias, out, heads, nq, nk, scale,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(nq, BLOCK_M)
    # Neighbouring programs share a head's keys and values in L2.
    row = tl.program_id(0) % blocks * BLOCK_M
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + head * HEAD_DIM, ALIGN)
    if bias is not None:
        bias += batch * bias_batch + head * bias_head

    qs = _load(q, q_row, row, nq, True, BLOCK_M, HEAD_DIM, SPLIT)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = ()
    for i in tl.static_range(len(SPLIT)):
        acc = acc + (_zeros(BLOCK_M, SPLIT[i]),)
    full = nk // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        acc, total, top = _online(
            qs, k, k_row, v, v_row, bias, bias_q, bias_k, row, start, nq, nk, scale, acc, total, top,
            False, BLOCK_M, BLOCK_N, HEAD_DIM, SPLIT, SCALE_FIRST, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        acc, total, top = _online(
            qs, k, k_row, v, v_row, bias, bias_q, bias_k, row, full, nq, nk, scale, acc, total, top,
            False, BLOCK_M, TAIL, HEAD_DIM, SPLIT, SCALE_FIRST, PRECISION,
        )  # fmt: skip
    if LAST > 0:
        acc, total, top = _online(
            qs, k, k_row, v, v_row, bias, bias_q, bias_k, row, full + TAIL, nq, nk, scale, acc, total, top,
            True, BLOCK_M, LAST, HEAD_DIM, SPLIT, SCALE_FIRST, PRECISION,
        )  # fmt: skip
    _store(out, out_row, row + tl.arange(0, BLOCK_M), acc, total, nq, HEAD_DIM, SPLIT)
