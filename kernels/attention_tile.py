"""What attention's kernels do to one tile, forward and backward: where it lies, its logits, its weights.

A head is read as one tile per piece of the head dim (`Static.split`), so tiles come and go as tuples.  Everything that
changes a logit (bias, mask, relative positions) happens in `adjust`, everything that changes a weight in `drop`;
windows and packed sequences only change which rows a program reads: `locate` and `image_rows`.

The arguments are attention_call.py's: `sizes`, `changes`, and the constant C, a `Static`.
"""

# ruff: noqa: RUF005, SIM108 - Triton's tuples only grow by +, and its constant `if` is no expression

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Place(NamedTuple):
    """Which head of which sequence a program works on."""

    batch: Any
    sequence: Any
    head: Any
    nq: Any  # of the sequence
    nk: Any
    before: Any  # tokens of the batch before the sequence
    y: Any  # the window's corner
    x: Any


class Head(NamedTuple):
    """The rows of one head."""

    ptr: Any
    row: Any  # from one to the next


class Softmax(NamedTuple):
    """The log of every row's sum, which the forward keeps for the backward.

    It is inf for a row whose every key is masked: its weights are then exp2(s - inf) = 0.
    """

    top: Any  # in the units of `weights`; if C.exact only the row's maximum, which may be too large to add to,
    rest: Any  # and, if C.exact, log2 of the sum of weights


@triton.constexpr_function
def first(widths, i):
    """Where the i-th of several neighbouring blocks begins."""
    return sum(int(w) for w in widths[:i])


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, C: tl.constexpr):
    SPLIT: tl.constexpr = C.split
    pieces = ()
    for i in tl.static_range(len(SPLIT)):
        pieces = pieces + (zeros(ROWS, SPLIT[i]),)
    return pieces


@triton.jit
def locate_head(index, sizes, C: tl.constexpr):
    """The index-th head of all sequences, none of them packed."""
    sequence = (index // sizes.heads).to(tl.int64)
    head = (index % sizes.heads).to(tl.int64)
    batch, y, x = _window(sequence, C)
    return Place(batch, sequence, head, sizes.nq, sizes.nk, tl.cast(0, tl.int64), y, x)


@triton.jit
def locate(program, rows, sizes, BLOCK: tl.constexpr, C: tl.constexpr):
    """The program's first row, of `rows` that are cut into blocks (queries or keys), and its place."""
    if sizes.cu_seqlens is not None:
        # The sequence whose blocks, counted through all sequences, hold the program's.
        SEQUENCES: tl.constexpr = C.sequences
        per_head = tl.num_programs(0) // sizes.heads
        head = (program // per_head).to(tl.int64)
        block = program % per_head
        i = tl.arange(0, SEQUENCES)
        starts = tl.load(sizes.cu_seqlens + i, mask=i < sizes.sequences, other=0)
        ends = tl.load(sizes.cu_seqlens + i + 1, mask=i < sizes.sequences, other=0)
        blocks = tl.cdiv(ends - starts, BLOCK)
        sequence = tl.minimum(tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32)), sizes.sequences - 1)
        row = (block - tl.sum(tl.where(i < sequence, blocks, 0))) * BLOCK
        start = tl.load(sizes.cu_seqlens + sequence)
        length = tl.load(sizes.cu_seqlens + sequence + 1) - start
        if row >= length:  # more programs than blocks: no keys, no work
            length = 0
        zero = tl.cast(0, tl.int64)
        return row, Place(zero, sequence.to(tl.int64), head, length, length, start.to(tl.int64), 0, 0)
    else:
        # Neighbouring programs share a head's keys and values in L2.
        blocks = tl.cdiv(rows, BLOCK)
        return program % blocks * BLOCK, locate_head(program // blocks, sizes, C)


@triton.jit
def head_of(t, place, C: tl.constexpr):
    ALIGN: tl.constexpr = C.align
    row = t.row
    if ALIGN < 16:  # else Triton finds it in the arguments
        row = row // ALIGN * ALIGN
    return Head(t.ptr + tl.multiple_of(place.batch * t.batch + place.before * t.row + place.head * t.head, ALIGN), row)


@triton.jit
def statistics(ptr, place, sizes):
    """Where a head's row of statistics, (sequences, heads, nq) or packed (1, heads, tokens), begins."""
    if sizes.cu_seqlens is not None:
        return ptr + (place.head * sizes.nq + place.before)
    else:
        return ptr + (place.sequence * sizes.heads + place.head) * sizes.nq


@triton.jit
def softmax_of(softmax, place, sizes):
    return Softmax(statistics(softmax.top, place, sizes), statistics(softmax.rest, place, sizes))


@triton.jit
def load_top(softmax, m, nq):
    """Rows beyond the last weigh nothing."""
    return tl.load(softmax.top + m, mask=m < nq, other=float("inf"))


@triton.jit
def load_rest(softmax, m, nq, C: tl.constexpr):
    """Apart from `load_top`, since its registers would spill where a product stands between."""
    if C.exact:
        return tl.load(softmax.rest + m, mask=m < nq, other=0.0)
    else:
        return tl.zeros(m.shape, tl.float32)  # not read


@triton.jit
def store_softmax(softmax, m, nq, top, total, C: tl.constexpr):
    """From a row's maximum and its sum of weights, which is 0 if every key is masked."""
    rest = tl.log2(tl.where(total == 0.0, 1.0, total))
    if C.exact:
        tl.store(softmax.rest + m, rest, mask=m < nq)
    else:
        if C.scale_first:
            rest *= 0.6931471805599453
        top += rest
    tl.store(softmax.top + m, tl.where(total == 0.0, float("inf"), top), mask=m < nq)


@triton.jit
def _window(sequence, C: tl.constexpr):
    """(image, corner y, x) of the n-th window, in the shifted image."""
    if C.window is None:
        return sequence, 0, 0
    else:
        WINDOW: tl.constexpr = C.window
        across = WINDOW[1] // WINDOW[3]
        windows = WINDOW[0] // WINDOW[2] * across
        inside = (sequence % windows).to(tl.int32)
        return sequence // windows, inside // across * WINDOW[2], inside % across * WINDOW[3]


@triton.jit
def image_rows(n, place, C: tl.constexpr):
    """Where in its image (or sequence) the n-th token of a window (or sequence) lies."""
    if C.window is None:
        return n
    else:
        WINDOW: tl.constexpr = C.window
        y = (place.y + n // WINDOW[3] + WINDOW[4]) % WINDOW[0]
        x = (place.x + n % WINDOW[3] + WINDOW[5]) % WINDOW[1]
        return y * WINDOW[1] + x


@triton.jit
def rows_of(head, start, place, ROWS: tl.constexpr, C: tl.constexpr):
    """A pointer, and what to add to it for each of rows start .. start + ROWS of a head."""
    n = tl.arange(0, ROWS)
    if C.window is None:
        return head.ptr + tl.cast(start, tl.int64) * head.row, n * head.row
    else:
        return head.ptr, image_rows(start + n, place, C).to(tl.int64) * head.row


@triton.jit
def load_piece(ptr, n, valid, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
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
def load(head, start, limit, place, MASKED: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    """Rows start .. start + ROWS of a head, as one tile per piece of the head dim."""
    HEAD_DIM: tl.constexpr = C.head_dim
    SPLIT: tl.constexpr = C.split
    valid = tl.arange(0, ROWS) < limit - start
    ptr, at = rows_of(head, start, place, ROWS, C)
    pieces = ()
    for i in tl.static_range(len(SPLIT)):
        pieces = pieces + (load_piece(ptr, at, valid, MASKED, HEAD_DIM, first(SPLIT, i), SPLIT[i]),)
    return pieces


@triton.jit
def product(a, b, C: tl.constexpr):
    """a b^T over the pieces of the head dim."""
    PRECISION: tl.constexpr = C.precision
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.constexpr_function
def _has_regions(window):
    return window is not None and (int(window[4]) > 0 or int(window[5]) > 0)


@triton.jit
def _region(n, place, C: tl.constexpr):
    """Which part of the image, before it was shifted, a token of a window comes from (Liu et al. 2021)."""
    WINDOW: tl.constexpr = C.window
    y = place.y + n // WINDOW[3]
    x = place.x + n % WINDOW[3]
    down = (y >= WINDOW[0] - WINDOW[4]).to(tl.int32)
    right = (x >= WINDOW[1] - WINDOW[5]).to(tl.int32)
    return down * 2 + right


@triton.jit
def _table_entry(m, n, index, nk, C: tl.constexpr):
    """Which entry of the table a query and a key read: BEiT's and Swin's numbering, or the index given."""
    if index is not None:
        return tl.load(index + (m * nk + n))
    else:
        TABLE: tl.constexpr = C.table
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
def adjust(s, m, n, place, scale, changes, MASKED: tl.constexpr, C: tl.constexpr):
    """Logits of queries m and keys n, of which one is a row and one a column.

    Scaled if C.scale_first; -inf for a masked key, and beyond the last if MASKED.
    """
    # Rows beyond the last are never stored: read the last one instead of masking.
    row = tl.minimum(m, place.nq - 1)
    column = n
    if MASKED:
        column = tl.minimum(n, place.nk - 1)
    if changes.bias is not None:
        bias = changes.bias.ptr + (place.sequence * changes.bias.batch + place.head * changes.bias.head)
        at = bias + (row.to(tl.int64) * changes.bias.q + n * changes.bias.k)
        if MASKED:
            b = tl.load(at, mask=n < place.nk, other=0.0)
        else:
            b = tl.load(at)
        s = tl.fma(s, scale, b.to(tl.float32))
        scale = 1.0
    if changes.rel_h is not None:
        COLUMNS: tl.constexpr = C.keys[1]
        rel_h = changes.rel_h.ptr + (place.sequence * changes.rel_h.batch + place.head * changes.rel_h.head)
        rel_w = changes.rel_w.ptr + (place.sequence * changes.rel_w.batch + place.head * changes.rel_w.head)
        b = tl.load(rel_h + (row.to(tl.int64) * changes.rel_h.q + column // COLUMNS)).to(tl.float32)
        b += tl.load(rel_w + (row.to(tl.int64) * changes.rel_w.q + column % COLUMNS)).to(tl.float32)
        s = tl.fma(s, scale, b)
        scale = 1.0
    if changes.table is not None:
        table = changes.table.ptr + place.head * changes.table.entries
        s = tl.fma(s, scale, tl.load(table + _table_entry(row, column, changes.table_index, place.nk, C)))
        scale = 1.0
    if C.scale_first:
        s = s * scale
    if changes.key_mask is not None:
        mask = changes.key_mask.ptr + place.sequence * changes.key_mask.batch
        s = tl.where(tl.load(mask + column * changes.key_mask.k) != 0, s, float("-inf"))
    if _has_regions(C.window):
        s = tl.where(_region(m, place, C) == _region(n, place, C), s, float("-inf"))
    if MASKED:
        s = tl.where(n < place.nk, s, float("-inf"))
    return s


@triton.jit
def drop(p, m, n, place, changes):
    """p where attention dropout keeps it, scaled, else 0: bits of Philox (Salmon et al. 2011) at (key, query, head)."""
    if changes.dropout is not None:
        stream = (place.sequence * changes.dropout.heads + place.head).to(tl.int32)
        zero = tl.zeros(p.shape, tl.int32)
        bits, _, _, _ = tl.philox(tl.load(changes.dropout.seed), zero + n, zero + m, zero + stream, zero)
        p = tl.where((bits >> 1).to(tl.int32) >= changes.dropout.threshold, p * changes.dropout.kept_scale, 0.0)
    return p


@triton.jit
def power(x, C: tl.constexpr):
    """e to x, which is in units of log 2 unless C.scale_first."""
    if C.scale_first:
        # The least finite bias, which some masks are made of, leaves the range in units of log 2: the difference first.
        return tl.exp2(x * 1.4426950408889634)
    else:
        return tl.exp2(x)


@triton.jit
def weights(s, scale, top, C: tl.constexpr):
    """e to the scaled s - top, where top is in units of log 2 unless C.scale_first."""
    if C.scale_first:
        return power(s - top, C)
    else:
        return tl.exp2(tl.fma(s, scale, -top))


@triton.jit
def normalised(s, scale, top, rest, C: tl.constexpr):
    """`weights` divided by their sum."""
    if C.exact:
        if C.scale_first:
            return tl.exp2(tl.fma(s - top, 1.4426950408889634, -rest))
        else:
            return tl.exp2(tl.fma(s, scale, -top) - rest)
    else:
        return weights(s, scale, top, C)


@triton.jit
def add_product(p, v, acc, C: tl.constexpr):
    """acc + p v, a piece of the head dim at a time."""
    PRECISION: tl.constexpr = C.precision
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
def store(head, m, limit, acc, factor, place, C: tl.constexpr):
    """factor * acc into rows m of a head."""
    HEAD_DIM: tl.constexpr = C.head_dim
    SPLIT: tl.constexpr = C.split
    at = image_rows(m, place, C).to(tl.int64) * head.row
    for i in tl.static_range(len(SPLIT)):
        _store_piece(head.ptr, at, m < limit, acc[i] * factor, HEAD_DIM, first(SPLIT, i), SPLIT[i])
