"""One call of attention: what is asked for, and how forward and backward kernels take it.

`Call` is the host's side.  A kernel takes tensors with their strides (`Rows` and others), `Sizes`, `Changes` and one
constant, `Static`; it hands them on whole, and the functions of attention_tile.py read from them what they need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from fastvit.kernels.launch import arch, precision
from torch import Tensor

# The widest head whose tf32 operands fit the registers.
_WIDEST_TF32 = {"sm80": 64, "sm90": 128, "sm100": 128, "gfx942": 128}

# The widest piece of a head dim whose products need no spill.
_WIDEST = {"sm80": 64, "sm90": 256, "sm100": 256, "gfx942": 256}


class Tile(NamedTuple):
    """A row of a kernel's table."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Rows(NamedTuple):
    """(B, N, H, D), its last stride 1."""

    ptr: Tensor
    batch: int
    row: int
    head: int


class Bias(NamedTuple):
    """(sequences, H, Nq, Nk)."""

    ptr: Tensor
    batch: int
    head: int
    q: int
    k: int


class KeyMask(NamedTuple):
    """uint8 (B, Nk)."""

    ptr: Tensor
    batch: int
    k: int


class Relative(NamedTuple):
    """(B, H, Nq, rows or columns of the grid), its last stride 1."""

    ptr: Tensor
    batch: int
    head: int
    q: int


class Table(NamedTuple):
    """float32 (H, entries)."""

    ptr: Tensor
    entries: int


class Dropout(NamedTuple):
    seed: Tensor
    threshold: int  # of 31 random bits, below which a weight is dropped
    kept_scale: float
    heads: int


class Changes(NamedTuple):
    """What is added to logits, masks them or drops their weights.

    Kernels ask whether one is None, so none of them holds a None itself: Triton 3.6 can't compare such a tuple.
    """

    bias: Bias | None
    key_mask: KeyMask | None
    rel_h: Relative | None
    rel_w: Relative | None
    table: Table | None
    table_index: Tensor | None  # int32 (Nq, Nk); None where the grid tells
    dropout: Dropout | None


class Prologue(NamedTuple):
    """What q and k are normalised and rotated with as they are loaded."""

    q_weight: Tensor | None  # (D,)
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    eps: float
    cos: Tensor | None  # (P, D)
    sin: Tensor | None
    prefix: int  # tokens that are not rotated


class Sizes(NamedTuple):
    heads: int
    nq: int  # of one sequence; with packed sequences of all
    nk: int
    sequences: int  # B; windows of all images; packed sequences
    scale: float  # of logits, in units of log 2 unless `Static.scale_first`
    cu_seqlens: Tensor | None


@dataclass(frozen=True)
class Static:
    """What a kernel is compiled for."""

    head_dim: int
    split: tuple[int, ...]  # widths of the pieces that cover it
    align: int  # elements that every stride is a multiple of
    scale_first: bool  # logits are scaled before anything is added, not as part of the exponential
    holes: bool  # may a row lack every key?
    window: tuple[int, ...] | None  # rows and columns of the grid, of a window, of the shift
    table: tuple[int, int, int, int] | None  # rows, columns, prefix tokens, entries
    keys: tuple[int, int] | None  # rows and columns that decomposed positions tell apart
    sequences: int  # a power of two
    precision: str
    exact: bool = False  # are the maximum of a row and the log of its sum kept apart for the backward?
    norm: str = "none"  # of q and k, as they are loaded
    rope: str = "none"  # "half", "interleaved": where a channel's partner lies
    rope_stride: int = 0  # of cos and sin, between positions
    halves: tuple[int, ...] = ()  # widths of the pieces that cover either half of a rotated head dim


@dataclass(frozen=True)
class Call:
    """What the launchers of forward and backward are asked for.

    Shapes and meanings as in `fastvit.ops.attention`; the backward takes q and k normalised and rotated already.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    rel_pos_h: Tensor | None = None
    rel_pos_w: Tensor | None = None
    bias_table: Tensor | None = None
    bias_index: Tensor | None = None
    grid: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    qk_norm: str = "none"
    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None
    qk_norm_eps: float = 1e-6
    rope: tuple[Tensor, Tensor] | None = None
    rope_interleaved: bool = False

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def nq(self) -> int:
        """Queries of one sequence; with packed sequences of all."""
        return self.q.shape[1] if self.window is None else self.window[0] * self.window[1]

    @property
    def nk(self) -> int:
        return self.k.shape[1] if self.window is None else self.nq

    @property
    def sequences(self) -> int:
        """B; windows of all images; packed sequences."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return self.q.shape[0] * (self.q.shape[1] // self.nq)

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """Of what is kept for every row of logits; packed sequences count as one."""
        return 1 if self.cu_seqlens is not None else self.sequences, self.heads, self.nq

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def scale_first(self) -> bool:
        # The row maximum may be scaled after it is found only if scaling keeps the order.
        given = (self.bias, self.rel_pos_h, self.bias_table)
        return any(t is not None for t in given) or self.logit_scale <= 0

    @property
    def kind(self) -> str:
        """Of product: "16", "tf32" or "ieee"."""
        if self.q.dtype != torch.float32:
            return "16"
        return precision(self.q.dtype) if self.head_dim <= _WIDEST_TF32[arch(self.q.device)] else "ieee"

    @cached_property
    def split(self) -> tuple[int, ...]:
        return _split(self.head_dim, 32 if self.q.dtype == torch.float32 else _WIDEST[arch(self.q.device)])

    @property
    def width(self) -> int:
        """Of the padded head dim."""
        return sum(self.split)

    @property
    def changed(self) -> bool:
        """Are there logits to add to or to mask, whose tiles take registers?"""
        given = (self.bias, self.key_mask, self.rel_pos_h, self.bias_table)
        return any(t is not None for t in given) or self.dropout_p > 0.0 or any(self.shift)

    @property
    def prepares(self) -> bool:
        """Are q and k to be normalised or rotated?"""
        return self.qk_norm != "none" or self.rope is not None

    def programs(self, rows: int, block: int) -> int:
        """One for each head and block of each sequence; of packed sequences every one may end in part of a block."""
        if self.cu_seqlens is not None:
            return self.heads * (rows // block + self.sequences)
        return self.sequences * self.heads * -(-rows // block)

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes."""
        scale = self.logit_scale if self.scale_first else self.logit_scale * math.log2(math.e)
        sizes = Sizes(self.heads, self.nq, self.nk, self.sequences, scale, self.cu_seqlens)
        q, k, v = (rows(t) for t in (self.q, self.k, self.v))
        return {"q": q, "k": k, "v": v, "sizes": sizes, "changes": self._changes()}

    def prologue(self) -> Prologue | None:
        """What the forward's kernels take beside that."""
        if not self.prepares:
            return None
        vectors = (self.q_norm_weight, self.q_norm_bias, self.k_norm_weight, self.k_norm_bias)
        cos, sin = (None, None) if self.rope is None else rope_tables(self.rope)
        prefix = 0 if cos is None else self.q.shape[1] - cos.shape[0]
        return Prologue(*(None if t is None else t.contiguous() for t in vectors), self.qk_norm_eps, cos, sin, prefix)

    def static(self, *others: Rows) -> Static:
        """others: what the kernel takes beside q, k and v."""
        table = None
        if self.bias_table is not None and self.bias_index is None:
            height, width = self.window or self.grid or (1, self.nq)
            table = (height, width, self.nq - height * width, self.bias_table.shape[0])
        windows = None
        if self.window is not None:
            assert self.grid is not None
            windows = (*self.grid, *self.window, *self.shift)
        keys = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            keys = (self.rel_pos_h.shape[-1], self.rel_pos_w.shape[-1])
        strides = [s for t in (rows(self.q), rows(self.k), rows(self.v), *others) for s in t[1:]]
        return Static(
            head_dim=self.head_dim,
            split=self.split,
            align=math.gcd(16, self.head_dim, *strides),
            scale_first=self.scale_first,
            holes=self.bias is not None or self.key_mask is not None or any(self.shift),
            window=windows,
            table=table,
            keys=keys,
            sequences=1 if self.cu_seqlens is None else triton.next_power_of_2(self.sequences),
            precision="tf32" if self.kind == "16" else self.kind,
            norm=self.qk_norm,
            rope="none" if self.rope is None else "interleaved" if self.rope_interleaved else "half",
            rope_stride=0 if self.rope is None else rope_tables(self.rope)[0].stride(0),
            halves=() if self.rope is None else _split(self.head_dim // 2, max(self.split)),
        )

    def _changes(self) -> Changes:
        bias = key_mask = rel_h = rel_w = table = index = dropout = None
        if self.bias is not None:
            t = self.bias.float() if self.bias.dtype == torch.float64 else self.bias
            t = t.expand(self.sequences, self.heads, self.nq, self.nk)
            bias = Bias(t, *t.stride())
        if self.key_mask is not None:
            key_mask = KeyMask(self.key_mask.view(torch.uint8), *self.key_mask.stride())
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            rel_h, rel_w = (Relative(t, *t.stride()[:3]) for t in map(unit_stride, (self.rel_pos_h, self.rel_pos_w)))
        if self.bias_table is not None:
            # A head's entries side by side, so that a tile's lie on a few cache lines.
            t = self.bias_table.float().t().contiguous()
            table = Table(t, t.shape[1])
            if self.bias_index is not None:
                index = self.bias_index.to(torch.int32).contiguous()
        if self.dropout_p > 0.0:
            assert self.dropout_seed is not None
            dropout = Dropout(
                self.dropout_seed, round(self.dropout_p * 2**31), 1.0 / (1.0 - self.dropout_p), self.heads
            )
        return Changes(bias, key_mask, rel_h, rel_w, table, index, dropout)


def unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def rope_tables(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cos and sin with the same strides, 1 in the last dimension: as they are if they are halves of one tensor."""
    cos, sin = map(unit_stride, rope)
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def rows(t: Tensor) -> Rows:
    """t (B, N, H, D) with unit stride in the last dimension."""
    return Rows(t, *t.stride()[:3])


def heads_of(t: Tensor, heads: int) -> Rows:
    """t (B, N, H * D)."""
    return rows(t.unflatten(-1, (heads, -1)))


def _split(head_dim: int, widest: int) -> tuple[int, ...]:
    """Powers of two from 16 (the least that tensor cores take) to `widest` that cover `head_dim`."""
    pieces = [widest] * (head_dim // widest)
    if rest := head_dim % widest:
        first = max(16, 1 << (rest.bit_length() - 1))
        pieces.append(first)
        if rest > first:
            pieces.append(max(16, triton.next_power_of_2(rest - first)))
    return tuple(pieces)
