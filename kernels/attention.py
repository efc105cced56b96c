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

Everything that changes a logit (bias, mask, relative positions) happens in `_adjust`, which the backward
(attention_backward.py) runs on the same arguments.  Windows and packed sequences only change which rows a program
reads: `_locate` and `_rows`.
"""

# ruff: noqa: RUF005, SIM108 - Triton's tuples only grow by +, and its constant `if` is no expression

from __future__ import annotations

import math
from typing import Any, NamedTuple

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


class Problem(NamedTuple):
    """What the launchers of forward and backward share: sizes, and the kernels' arguments and constants by name."""

    sequences: int  # B; windows of all images; packed sequences
    nq: int  # of one sequence; with packed sequences of all
    nk: int
    heads: int
    width: int  # of the padded head dim
    arguments: dict[str, Any]
    constants: dict[str, Any]
    kind: str  # of product: "16", "tf32", "ieee"
    changed: bool  # are there logits to add to or to mask, whose tiles take registers?


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    lse: Tensor | None = None,
) -> Tensor:
    """Launch: the meaning of `fastvit.ops.attention`, with q and k already rotated and normalised.

    lse: float32 `lse_shape`, where the log2 of every row's sum is written for the backward.
    """
    q, k, v = (unit_stride(t) for t in (q, k, v))
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(batch, tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    p = problem(
        q, k, v, out, scale=scale, bias=bias, key_mask=key_mask, cu_seqlens=cu_seqlens, rel_pos_h=rel_pos_h,
        rel_pos_w=rel_pos_w, bias_table=bias_table, bias_index=bias_index, grid=grid, window=window, shift=shift,
        dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
    p.arguments["lse"] = lse
    name = arch(q.device)
    block_m = 16 if p.nq <= 16 else 64
    limits = next((limits for widest, limits in _SHORT[name].items() if p.width <= widest), (0, 0))
    if p.kind == "16" and p.nk <= limits[p.changed] and cu_seqlens is None:
        blocks = -(-p.nq // block_m)
        # A program for each head fills the GPU a few times over in a large batch; a small one needs more of them.
        parts = min(blocks, -(-4 * multiprocessors(q.device) // (p.sequences * heads)))
        launch(
            _short,
            p.sequences * heads * parts,
            q,
            **p.arguments,
            parts=parts,
            **p.constants,
            CHUNKS=next(chunks for longest, chunks in _CHUNKS if p.nk <= longest),
            BLOCK_M=block_m,
            num_warps=4,
            num_stages=1,
        )
        return out
    tile = _LONG[name][p.kind, min(256, max(64, triton.next_power_of_2(p.width)))]
    block_m = min(tile.block_m, block_m)
    # A tile of bias takes the registers of a tile of logits; in float32 what a product holds counts for more.
    block_n = tile.block_n // 2 if p.changed and p.kind == "16" else tile.block_n
    tail, last = _tail(p.nk % block_n) if cu_seqlens is None else (0, 0)
    launch(
        _long,
        programs(p, block_m, cu_seqlens),
        q,
        **p.arguments,
        **p.constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        TAIL=tail,
        LAST=last,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def lse_shape(q: Tensor, window: tuple[int, int] | None, grid: tuple[int, int] | None) -> tuple[int, int, int]:
    """(sequences, heads, queries of each); packed sequences count as one."""
    batch, tokens, heads, _ = q.shape
    if window is None:
        return batch, heads, tokens
    area = window[0] * window[1]
    return batch * tokens // area, heads, area


def unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def programs(p: Problem, block: int, cu_seqlens: Tensor | None) -> int:
    """One for each head and block of each sequence; of packed sequences every one may end in part of a block."""
    if cu_seqlens is not None:
        return p.heads * (p.nq // block + p.sequences)
    return p.sequences * p.heads * -(-p.nq // block)


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    scale: float | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    grid: tuple[int, int] | None,
    window: tuple[int, int] | None,
    shift: tuple[int, int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Problem:
    """q, k, v and out have unit stride in the last dimension.  `lse` and tiles are the launcher's to add."""
    batch, nq, heads, head_dim = q.shape
    nk = k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    sequences, windows = batch, None
    if cu_seqlens is not None:
        sequences = cu_seqlens.shape[0] - 1
    if window is not None:
        assert grid is not None
        windows = (*grid, *window, *shift)
        area = window[0] * window[1]
        sequences, nq, nk = batch * grid[0] * grid[1] // area, area, area
    if bias is not None:
        bias = (bias.float() if bias.dtype == torch.float64 else bias).expand(sequences, heads, nq, nk)
    if rel_pos_h is not None and rel_pos_w is not None:
        rel_pos_h, rel_pos_w = unit_stride(rel_pos_h), unit_stride(rel_pos_w)
    table_grid = None
    if bias_table is not None:
        # A head's entries side by side, so that a tile's lie on a few cache lines.
        bias_table = bias_table.float().t().contiguous()
        if bias_index is None:
            height, width = window or grid or (1, nq)
            table_grid = (height, width, nq - height * width, bias_table.shape[1])
        else:
            bias_index = bias_index.to(torch.int32).contiguous()
    name = arch(q.device)
    kind = "16" if q.dtype != torch.float32 else precision(q.dtype) if head_dim <= _WIDEST_TF32[name] else "ieee"
    split = _split(head_dim, 32 if q.dtype == torch.float32 else _WIDEST[name])
    if dropout_p == 0.0:
        dropout_seed = None
    changed = any(t is not None for t in (bias, key_mask, rel_pos_h, bias_table, dropout_seed)) or any(shift)
    arguments = {
        "k": k,
        "v": v,
        "out": out,
        "bias": bias,
        "key_mask": None if key_mask is None else key_mask.view(torch.uint8),
        "rel_h": rel_pos_h,
        "rel_w": rel_pos_w,
        "table": bias_table,
        "index": bias_index,
        "seed": dropout_seed,
        "cu_seqlens": cu_seqlens,
        "heads": heads,
        "nq": nq,
        "nk": nk,
        "scale": scale * math.log2(math.e),
        "sequences": sequences,
        "entries": 0 if bias_table is None else bias_table.shape[1],
        "dropped": round(dropout_p * 2**31),
        "kept_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
    }
    arguments |= _strides("q", q) | _strides("k", k) | _strides("v", v)
    arguments |= {"out_batch": out.stride(0), "out_row": out.stride(1)}
    arguments |= _strides("bias", bias, ("batch", "head", "q", "k"))
    arguments |= _strides("mask", key_mask, ("batch", "k"))
    arguments |= _strides("rel_h", rel_pos_h, ("batch", "head", "q"))
    arguments |= _strides("rel_w", rel_pos_w, ("batch", "head", "q"))
    added = bias is not None or rel_pos_h is not None or bias_table is not None
    constants = {
        "HEAD_DIM": head_dim,
        "SPLIT": split,
        "ALIGN": math.gcd(16, head_dim, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2]),
        # The row maximum may be scaled after it is found only if scaling keeps the order.
        "SCALE_FIRST": added or scale <= 0,
        "HOLES": bias is not None or key_mask is not None or any(shift),
        "WINDOW": windows,
        "TABLE": table_grid,
        "KEYS": None if rel_pos_h is None else (rel_pos_h.shape[-1], rel_pos_w.shape[-1]),  # type: ignore[union-attr]
        "SEQUENCES": 1 if cu_seqlens is None else triton.next_power_of_2(sequences),
        "PRECISION": "tf32" if kind == "16" else kind,
    }
    return Problem(sequences, nq, nk, heads, sum(split), arguments, constants, kind, changed)


def _strides(name: str, t: Tensor | None, dims: tuple[str, ...] = ("batch", "row", "head")) -> dict[str, int]:
    return {f"{name}_{dim}": 0 if t is None else t.stride(i) for i, dim in enumerate(dims)}


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
def _zero_pieces(ROWS: tl.constexpr, SPLIT: tl.constexpr):
    pieces = ()
    for i in tl.static_range(len(SPLIT)):
        pieces = pieces + (_zeros(ROWS, SPLIT[i]),)
    return pieces


@triton.jit
def _locate(
    program, heads, nq, nk, cu_seqlens, sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """(batch, sequence, head, first row, nq, nk, tokens of the batch before the sequence, window's corner y, x)."""
    if cu_seqlens is not None:
        # The sequence whose blocks, counted through all sequences, hold the program's.
        per_head = tl.num_programs(0) // heads
        head = (program // per_head).to(tl.int64)
        block = program % per_head
        i = tl.arange(0, SEQUENCES)
        starts = tl.load(cu_seqlens + i, mask=i < sequences, other=0)
        ends = tl.load(cu_seqlens + i + 1, mask=i < sequences, other=0)
        blocks = tl.cdiv(ends - starts, BLOCK)
        sequence = tl.minimum(tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32)), sequences - 1)
        row = (block - tl.sum(tl.where(i < sequence, blocks, 0))) * BLOCK
        start = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - start
        if row >= length:  # more programs than blocks: no keys, no work
            length = 0
        zero = tl.cast(0, tl.int64)
        return zero, sequence.to(tl.int64), head, row, length, length, start.to(tl.int64), 0, 0
    else:
        # Neighbouring programs share a head's keys and values in L2.
        blocks = tl.cdiv(nq, BLOCK)
        sequence = (program // blocks // heads).to(tl.int64)
        head = (program // blocks % heads).to(tl.int64)
        batch, y, x = _window(sequence, WINDOW)
        return batch, sequence, head, program % blocks * BLOCK, nq, nk, tl.cast(0, tl.int64), y, x


@triton.jit
def _statistics(ptr, sequence, head, before, heads, nq, all_tokens, cu_seqlens):
    """Where a head's row of lse or delta, (sequences, heads, nq) or packed (1, heads, tokens), begins."""
    if cu_seqlens is not None:
        return ptr + (head * all_tokens + before)
    else:
        return ptr + (sequence * heads + head) * nq


@triton.jit
def _window(sequence, WINDOW: tl.constexpr):
    """(image, corner y, x) of the n-th window (GRID_H, GRID_W, H, W, SHIFT_H, SHIFT_W), in the shifted image."""
    if WINDOW is None:
        return sequence, 0, 0
    else:
        across = WINDOW[1] // WINDOW[3]
        windows = WINDOW[0] // WINDOW[2] * across
        inside = (sequence % windows).to(tl.int32)
        return sequence // windows, inside // across * WINDOW[2], inside % across * WINDOW[3]


@triton.jit
def _rows(n, corner, WINDOW: tl.constexpr):
    """Where in its image (or sequence) the n-th token of a window (or sequence) lies."""
    if WINDOW is None:
        return n
    else:
        y = (corner[0] + n // WINDOW[3] + WINDOW[4]) % WINDOW[0]
        x = (corner[1] + n % WINDOW[3] + WINDOW[5]) % WINDOW[1]
        return y * WINDOW[1] + x


@triton.jit
def _load_piece(ptr, n, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    at = ptr + (n[:, None] + d[None, :])
    if MASKED:
        if FIRST + WIDTH > HEAD_DIM:
            return tl.load(at, mask=valid[:, None] & (d[None, :] < HEAD_DIM), other=0.0)
        else:
            return tl.load(at, mask=valid[:, None], other=0.0)
    else:
        if FIRST + WIDTH > HEAD_DIM:
            return tl.load(at, mask=d[None, :] < HEAD_DIM, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def _load(
    ptr, stride, start, limit, corner, MASKED: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of a head, as one tile per piece of the head dim."""
    n = tl.arange(0, ROWS)
    valid = n < limit - start
    if WINDOW is None:
        ptr += tl.cast(start, tl.int64) * stride
        at = n * stride
    else:
        at = _rows(start + n, corner, WINDOW).to(tl.int64) * stride
    pieces = ()
    for i in tl.static_range(len(SPLIT)):
        pieces = pieces + (_load_piece(ptr, at, valid, MASKED, HEAD_DIM, _first(SPLIT, i), SPLIT[i]),)
    return pieces


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a b^T over the pieces of the head dim."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.constexpr_function
def _has_regions(window):
    return window is not None and (int(window[4]) > 0 or int(window[5]) > 0)


@triton.jit
def _region(n, corner, WINDOW: tl.constexpr):
    """Which part of the image, before it was shifted, a token of a window comes from (Liu et al. 2021)."""
    y = corner[0] + n // WINDOW[3]
    x = corner[1] + n % WINDOW[3]
    down = (y >= WINDOW[0] - WINDOW[4]).to(tl.int32)
    right = (x >= WINDOW[1] - WINDOW[5]).to(tl.int32)
    return down * 2 + right


@triton.jit
def _table_entry(m, n, index, nk, TABLE: tl.constexpr):
    """Which entry of the table a query and a key read: BEiT's and Swin's numbering, or the index given."""
    if index is not None:
        return tl.load(index + (m * nk + n))
    else:
        GRID_H: tl.constexpr = TABLE[0]
        GRID_W: tl.constexpr = TABLE[1]
        PREFIX: tl.constexpr = TABLE[2]
        ENTRIES: tl.constexpr = TABLE[3]
        STEP: tl.constexpr = 2 * GRID_W - 1
        q = (m - PREFIX) // GRID_W * STEP + (m - PREFIX) % GRID_W
        k = (n - PREFIX) // GRID_W * STEP + (n - PREFIX) % GRID_W
        entry = q - k + ((GRID_H - 1) * STEP + GRID_W - 1)
        if PREFIX > 0:  # the class token
            entry = tl.where(m == 0, tl.where(n == 0, ENTRIES - 1, ENTRIES - 3), tl.where(n == 0, ENTRIES - 2, entry))
        return entry


@triton.jit
def _adjust(
    s, m, n, nq, nk, scale, extras, MASKED: tl.constexpr, SCALE_FIRST: tl.constexpr, WINDOW: tl.constexpr,
    TABLE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits of queries m and keys n, of which one is a row and one a column.

    In units of log 2 if SCALE_FIRST, else unscaled; -inf for a masked key, and beyond the last if MASKED.

    extras: the program's sequence, head and window, and what its kernel was given to change logits with.
    """
    (
        sequence, head, y, x, _, _, _, bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    ) = extras  # fmt: skip
    corner = (y, x)
    if SCALE_FIRST:
        s = s * scale
    # Rows beyond the last are never stored: read the last one instead of masking.
    row = tl.minimum(m, nq - 1)
    column = n
    if MASKED:
        column = tl.minimum(n, nk - 1)
    if bias is not None:
        bias += sequence * bias_batch + head * bias_head
        at = bias + (row.to(tl.int64) * bias_q + n * bias_k)
        if MASKED:
            b = tl.load(at, mask=n < nk, other=0.0)
        else:
            b = tl.load(at)
        s = tl.fma(b.to(tl.float32), 1.4426950408889634, s)
    if rel_h is not None:
        rel_h += sequence * rel_h_batch + head * rel_h_head
        rel_w += sequence * rel_w_batch + head * rel_w_head
        b = tl.load(rel_h + (row.to(tl.int64) * rel_h_q + column // KEYS[1])).to(tl.float32)
        b += tl.load(rel_w + (row.to(tl.int64) * rel_w_q + column % KEYS[1])).to(tl.float32)
        s = tl.fma(b, 1.4426950408889634, s)
    if table is not None:
        b = tl.load(table + head * entries + _table_entry(row, column, index, nk, TABLE))
        s = tl.fma(b, 1.4426950408889634, s)
    if key_mask is not None:
        key_mask += sequence * mask_batch
        s = tl.where(tl.load(key_mask + column * mask_k) != 0, s, float("-inf"))
    if _has_regions(WINDOW):
        s = tl.where(_region(m, corner, WINDOW) == _region(n, corner, WINDOW), s, float("-inf"))
    if MASKED:
        s = tl.where(n < nk, s, float("-inf"))
    return s


@triton.jit
def _drop(p, m, n, kept_scale, extras):
    """p where attention dropout keeps it, scaled, else 0: bits of Philox (Salmon et al. 2011) at (key, query, head)."""
    sequence, head, _, _, seed, dropped, heads = extras[:7]
    if seed is not None:
        stream = (sequence * heads + head).to(tl.int32)
        zero = tl.zeros(p.shape, tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seed), zero + n, zero + m, zero + stream, zero)
        p = tl.where((bits >> 1).to(tl.int32) >= dropped, p * kept_scale, 0.0)
    return p


@triton.jit
def _weights(s, scale, top, SCALE_FIRST: tl.constexpr):
    """exp2(scaled s - top)."""
    if SCALE_FIRST:
        return tl.exp2(s - top)
    else:
        return tl.exp2(tl.fma(s, scale, -top))


@triton.jit
def _times(p, v, acc, PRECISION: tl.constexpr):
    """acc + p v, a piece of the head dim at a time."""
    new = ()
    for i in tl.static_range(len(v)):
        new = new + (tl.dot(p.to(v[i].dtype), v[i], acc[i], input_precision=PRECISION),)
    return new


@triton.jit
def _store_piece(ptr, n, valid, acc, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    tl.store(
        ptr + (n[:, None] + d[None, :]), acc.to(ptr.dtype.element_ty), mask=valid[:, None] & (d[None, :] < HEAD_DIM)
    )


@triton.jit
def _store(
    ptr, stride, m, limit, acc, factor, corner, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr
):
    """factor * acc into rows m of a head."""
    at = _rows(m, corner, WINDOW).to(tl.int64) * stride
    for i in tl.static_range(len(SPLIT)):
        _store_piece(ptr, at, m < limit, acc[i] * factor, HEAD_DIM, _first(SPLIT, i), SPLIT[i])


@triton.jit
def _inverse(total):
    """A row whose every key is masked has a total of 0 and gives zeros."""
    return (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def _store_lse(lse, m, nq, top, total):
    # The backward takes exp2(s - inf), which is 0, of a row whose every key is masked.
    value = tl.where(total == 0.0, float("inf"), top + tl.log2(total))
    tl.store(lse + m, value, mask=m < nq)


@triton.jit
def _finite(top):
    """A row that is -inf so far has no maximum to subtract."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _short(
    q, k, v, out, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q, parts,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
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
    q += tl.multiple_of(batch * q_batch + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + head * HEAD_DIM, ALIGN)
    extras = (
        sequence, head, y, x, seed, dropped, heads,
        bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    )  # fmt: skip

    ks = ()
    vs = ()
    for c in tl.static_range(len(CHUNKS)):
        ks = ks + (
            _load(k, k_row, _first(CHUNKS, c), nk, corner, c == len(CHUNKS) - 1, CHUNKS[c], HEAD_DIM, SPLIT, WINDOW),
        )
        vs = vs + (
            _load(v, v_row, _first(CHUNKS, c), nk, corner, c == len(CHUNKS) - 1, CHUNKS[c], HEAD_DIM, SPLIT, WINDOW),
        )

    for block in tl.range(part, tl.cdiv(nq, BLOCK_M), parts):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        qs = _load(q, q_row, block * BLOCK_M, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
        logits = ()
        for c in tl.static_range(len(CHUNKS)):
            n = _first(CHUNKS, c) + tl.arange(0, CHUNKS[c])
            s = _adjust(
                _product(qs, ks[c], PRECISION), m[:, None], n[None, :], nq, nk, scale, extras,
                c == len(CHUNKS) - 1, SCALE_FIRST, WINDOW, TABLE, KEYS,
            )  # fmt: skip
            logits = logits + (s,)
        top = tl.max(logits[0], 1)
        for c in tl.static_range(1, len(CHUNKS)):
            top = tl.maximum(top, tl.max(logits[c], 1))
        if not SCALE_FIRST:
            top = top * scale
        if HOLES:
            top = _finite(top)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = _zero_pieces(BLOCK_M, SPLIT)
        for c in tl.static_range(len(CHUNKS)):
            p = _weights(logits[c], scale, top[:, None], SCALE_FIRST)
            total += tl.sum(p, 1)
            n = _first(CHUNKS, c) + tl.arange(0, CHUNKS[c])
            acc = _times(_drop(p, m[:, None], n[None, :], kept_scale, extras), vs[c], acc, PRECISION)
        _store(out, out_row, m, nq, acc, _inverse(total), corner, HEAD_DIM, SPLIT, WINDOW)
        if lse is not None:
            _store_lse(_statistics(lse, sequence, head, 0, heads, nq, nq, None), m, nq, top, total)


@triton.jit
def _online(
    qs, k, k_row, v, v_row, m, start, nq, nk, scale, kept_scale, acc, total, top, corner, extras,
    MASKED: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    HOLES: tl.constexpr, WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of the online softmax."""
    ks = _load(k, k_row, start, nk, corner, MASKED, WIDTH, HEAD_DIM, SPLIT, WINDOW)
    n = start + tl.arange(0, WIDTH)
    s = _adjust(
        _product(qs, ks, PRECISION), m[:, None], n[None, :], nq, nk, scale, extras,
        MASKED, SCALE_FIRST, WINDOW, TABLE, KEYS,
    )  # fmt: skip
    here = tl.max(s, 1)
    if not SCALE_FIRST:
        here = here * scale
    new_top = tl.maximum(top, here)
    base = new_top
    if HOLES:
        base = _finite(new_top)
    p = _weights(s, scale, base[:, None], SCALE_FIRST)
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    scaled = ()
    for i in tl.static_range(len(SPLIT)):
        scaled = scaled + (acc[i] * shrink[:, None],)
    vs = _load(v, v_row, start, nk, corner, MASKED, WIDTH, HEAD_DIM, SPLIT, WINDOW)
    return _times(_drop(p, m[:, None], n[None, :], kept_scale, extras), vs, scaled, PRECISION), total, new_top


@triton.jit
def _long(
    q, k, v, out, lse, bias, key_mask, rel_h, rel_w, table, index, seed, cu_seqlens,
    heads, nq, nk, scale, sequences, dropped, kept_scale, entries,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row,
    bias_batch, bias_head, bias_q, bias_k, mask_batch, mask_k,
    rel_h_batch, rel_h_head, rel_h_q, rel_w_batch, rel_w_head, rel_w_q,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, SCALE_FIRST: tl.constexpr, HOLES: tl.constexpr,
    WINDOW: tl.constexpr, TABLE: tl.constexpr, KEYS: tl.constexpr, SEQUENCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    all_tokens = nq
    batch, sequence, head, row, nq, nk, before, y, x = _locate(
        tl.program_id(0), heads, nq, nk, cu_seqlens, sequences, BLOCK_M, SEQUENCES, WINDOW
    )
    corner = (y, x)
    if ALIGN < 16:  # else Triton finds it in the arguments
        q_row = tl.multiple_of(q_row, ALIGN)
        k_row = tl.multiple_of(k_row, ALIGN)
        v_row = tl.multiple_of(v_row, ALIGN)
        out_row = tl.multiple_of(out_row, ALIGN)
    q += tl.multiple_of(batch * q_batch + before * q_row + head * q_head, ALIGN)
    k += tl.multiple_of(batch * k_batch + before * k_row + head * k_head, ALIGN)
    v += tl.multiple_of(batch * v_batch + before * v_row + head * v_head, ALIGN)
    out += tl.multiple_of(batch * out_batch + before * out_row + head * HEAD_DIM, ALIGN)
    extras = (
        sequence, head, y, x, seed, dropped, heads,
        bias, bias_batch, bias_head, bias_q, bias_k, key_mask, mask_batch, mask_k,
        rel_h, rel_h_batch, rel_h_head, rel_h_q, rel_w, rel_w_batch, rel_w_head, rel_w_q, table, index, entries,
    )  # fmt: skip

    m = row + tl.arange(0, BLOCK_M)
    qs = _load(q, q_row, row, nq, corner, True, BLOCK_M, HEAD_DIM, SPLIT, WINDOW)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = _zero_pieces(BLOCK_M, SPLIT)
    full = nk // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N):
        acc, total, top = _online(
            qs, k, k_row, v, v_row, m, start, nq, nk, scale, kept_scale, acc, total, top, corner, extras,
            False, BLOCK_N, HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION,
        )  # fmt: skip
    if cu_seqlens is not None:  # whose lengths are known only here
        for start in tl.range(full, nk, BLOCK_N):
            acc, total, top = _online(
                qs, k, k_row, v, v_row, m, start, nq, nk, scale, kept_scale, acc, total, top, corner, extras,
                True, BLOCK_N, HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION,
            )  # fmt: skip
    if TAIL > 0:
        acc, total, top = _online(
            qs, k, k_row, v, v_row, m, full, nq, nk, scale, kept_scale, acc, total, top, corner, extras,
            False, TAIL, HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION,
        )  # fmt: skip
    if LAST > 0:
        acc, total, top = _online(
            qs, k, k_row, v, v_row, m, full + TAIL, nq, nk, scale, kept_scale, acc, total, top, corner, extras,
            True, LAST, HEAD_DIM, SPLIT, SCALE_FIRST, HOLES, WINDOW, TABLE, KEYS, PRECISION,
        )  # fmt: skip
    _store(out, out_row, m, nq, acc, _inverse(total), corner, HEAD_DIM, SPLIT, WINDOW)
    if lse is not None:
        if HOLES:
            top = _finite(top)
        _store_lse(_statistics(lse, sequence, head, before, heads, nq, all_tokens, cu_seqlens), m, nq, top, total)
