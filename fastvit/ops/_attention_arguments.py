"""attention's arguments: their order, and the checks that name what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.ops import _checks


class Arguments(NamedTuple):
    """The operator's arguments, in the schema's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    rope_interleaved: bool = False
    qk_norm: str = "none"
    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None
    qk_norm_eps: float = 1e-6
    rel_pos_h: Tensor | None = None
    rel_pos_w: Tensor | None = None
    bias_table: Tensor | None = None
    bias_index: Tensor | None = None
    grid: Sequence[int] | None = None
    window: Sequence[int] | None = None
    shift: Sequence[int] = (0, 0)
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    training: bool = False
    dtype: torch.dtype | None = None

    def plain(self) -> bool:
        """Nothing but scale, bias and rope?"""
        given = (self.key_mask, self.cu_seqlens, self.rel_pos_h, self.bias_table, self.window)
        return all(g is None for g in given) and self.qk_norm == "none" and self.dropout_p == 0.0

    def rope(self) -> tuple[Tensor, Tensor] | None:
        return None if self.rope_cos is None or self.rope_sin is None else (self.rope_cos, self.rope_sin)

    def logits(self) -> tuple[int, int, int, int]:
        """The shape of what `bias` broadcasts to."""
        batch, nq, heads, _ = self.q.shape
        if self.window is None or self.grid is None:
            return batch, heads, nq, self.k.shape[1]
        area = self.window[0] * self.window[1]
        return batch * nq // area, heads, area, area


SCHEMA = """Tensor q, Tensor k, Tensor v, float scale, Tensor? bias, Tensor? key_mask, Tensor? cu_seqlens,
    Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, str qk_norm, Tensor? q_norm_weight, Tensor? q_norm_bias,
    Tensor? k_norm_weight, Tensor? k_norm_bias, float qk_norm_eps, Tensor? rel_pos_h, Tensor? rel_pos_w,
    Tensor? bias_table, Tensor? bias_index, int[]? grid, int[]? window, int[] shift, float dropout_p,
    Tensor? dropout_seed, bool training, ScalarType? dtype"""


@_checks.once
def check(a: Arguments) -> None:
    for name, t in (("q", a.q), ("k", a.k), ("v", a.v)):
        _checks.floating(name, t)
        _checks.ndim(name, t, 4, "(B, N, num_heads, head_dim)")
    q, k, v = a.q, a.k, a.v
    batch, nq, heads, head_dim = q.shape
    nk = k.shape[1]
    if k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q {tuple(q.shape)}; accepted: (B, Nk, H, D)")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} does not fit; accepted: k's, {tuple(k.shape)}")
    if nk == 0 and nq > 0:
        raise ValueError(f"k: shape {tuple(k.shape)} has no keys; accepted: Nk >= 1")
    if (a.rel_pos_h is None) != (a.rel_pos_w is None):
        raise TypeError("rel_pos: None for one of the pair; accepted: two tensors")
    for name, sides in (("grid", a.grid), ("window", a.window), ("shift", a.shift)):
        if sides is not None and len(sides) != 2:
            raise ValueError(f"{name}: {tuple(sides)}; accepted: (rows, columns)")
    _check_combinations(a)
    if a.window is not None or a.shift[0] or a.shift[1]:
        _check_window(a)
    _checks.attention_bias(a.bias, a.logits())
    if a.key_mask is not None:
        if a.key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask: dtype {a.key_mask.dtype} is not accepted; give torch.bool, True for a key kept")
        _shape("key_mask", a.key_mask, (batch, nk))
    if a.cu_seqlens is not None:
        if a.cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: dtype {a.cu_seqlens.dtype} is not accepted; give torch.int32")
        if a.cu_seqlens.ndim != 1 or a.cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens: shape {tuple(a.cu_seqlens.shape)} does not fit; accepted: (S + 1,), S >= 1")
        if batch != 1 or nq != nk:
            raise ValueError(f"cu_seqlens: q {tuple(q.shape)}, k {tuple(k.shape)}; accepted: both (1, T, H, D)")
    _checks.rope(a.rope_cos, a.rope_sin, nq, nk, head_dim)
    _checks.norm(a.qk_norm, a.q_norm_weight, a.q_norm_bias, head_dim, "qk_norm", "q_norm")
    _checks.norm(a.qk_norm, a.k_norm_weight, a.k_norm_bias, head_dim, "qk_norm", "k_norm")
    if a.rel_pos_h is not None and a.rel_pos_w is not None:
        for name, t in (("rel_pos[0]", a.rel_pos_h), ("rel_pos[1]", a.rel_pos_w)):
            _checks.floating(name, t)
            _shape(name, t, (batch, heads, nq, t.shape[-1]))
        if a.rel_pos_h.shape[-1] * a.rel_pos_w.shape[-1] != nk:
            sizes = (a.rel_pos_h.shape[-1], a.rel_pos_w.shape[-1])
            raise ValueError(f"rel_pos: {sizes[0]} rows and {sizes[1]} columns do not make the {nk} keys")
    _check_table(a)
    if not 0.0 <= a.dropout_p < 1.0:
        raise ValueError(f"dropout_p: {a.dropout_p}; accepted: 0 <= p < 1")
    if a.dropout_p > 0.0:
        if a.dropout_seed is None or a.dropout_seed.dtype != torch.int64:
            raise TypeError(f"dropout_seed: {a.dropout_seed} is not accepted; give an int64 tensor (1,)")
        _shape("dropout_seed", a.dropout_seed, (1,))
    if a.dtype is None:
        _checks.same_dtype("k", k, q.dtype, "q")
        _checks.same_dtype("v", v, q.dtype, "q")
    _checks.same_device(**{name: t for name, t in a._asdict().items() if isinstance(t, Tensor)})


def _check_combinations(a: Arguments) -> None:
    """Arguments that no backend serves together."""
    apart = {
        "cu_seqlens": ("bias", "key_mask", "rel_pos", "bias_table", "window"),
        "window": ("key_mask", "rel_pos", "bias_index"),
    }
    given = {
        "cu_seqlens": a.cu_seqlens,
        "window": a.window,
        "bias": a.bias,
        "key_mask": a.key_mask,
        "rel_pos": a.rel_pos_h,
        "bias_table": a.bias_table,
        "bias_index": a.bias_index,
    }
    for name, others in apart.items():
        for other in others:
            if given[name] is not None and given[other] is not None:
                raise ValueError(f"{name}: not served together with {other}; accepted: one of them")


def _check_window(a: Arguments) -> None:
    if a.window is None or a.grid is None:
        missing = "window" if a.window is None else "grid"
        raise ValueError(f"{missing}: None; accepted with window or shift: (rows, columns)")
    nq, nk = a.q.shape[1], a.k.shape[1]
    if nq != a.grid[0] * a.grid[1] or nk != nq:
        raise ValueError(f"grid: {tuple(a.grid)} with Nq={nq}, Nk={nk}; accepted with window: both rows * columns")
    for size, side, by in zip(a.grid, a.window, a.shift, strict=True):
        if side < 1 or size % side:
            raise ValueError(f"window: {tuple(a.window)} in a grid of {tuple(a.grid)}; accepted: divisors of it")
        if not 0 <= by < side:
            raise ValueError(f"shift: {tuple(a.shift)} of windows of {tuple(a.window)}; accepted: 0 <= shift < window")


def _check_table(a: Arguments) -> None:
    if a.bias_table is None:
        if a.bias_index is not None:
            raise ValueError("bias_index: given without bias_table; accepted: both")
        return
    _checks.floating("bias_table", a.bias_table)
    _, heads, nq, nk = a.logits()
    if a.bias_table.ndim != 2 or a.bias_table.shape[1] != heads:
        raise ValueError(f"bias_table: shape {tuple(a.bias_table.shape)} does not fit; accepted: (entries, {heads})")
    if a.bias_index is not None:
        if a.bias_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"bias_index: dtype {a.bias_index.dtype} is not accepted; give int32 or int64")
        _shape("bias_index", a.bias_index, (nq, nk))
        return
    sides = a.window or a.grid
    if sides is None:
        raise ValueError("bias_table: needs bias_index, window or grid")
    height, width = sides
    prefix = nq - height * width
    if prefix not in (0, 1) or nq != nk:
        raise ValueError(f"grid: {tuple(sides)} with Nq={nq}, Nk={nk}; accepted: rows * columns, or one token more")
    entries = (2 * height - 1) * (2 * width - 1) + 3 * prefix
    if a.bias_table.shape[0] != entries:
        raise ValueError(f"bias_table: {a.bias_table.shape[0]} entries; accepted for {height} x {width}: {entries}")


def _shape(name: str, t: Tensor, accepted: tuple[int, ...]) -> None:
    if t.shape != accepted:
        raise ValueError(f"{name}: shape {tuple(t.shape)} does not fit; accepted: {accepted}")


def check_values(a: Arguments) -> None:
    """What only the values tell, where reading them stops no GPU: kernels use them as addresses."""
    if a.cu_seqlens is not None and a.cu_seqlens.device.type == "cpu":
        bounds, tokens = a.cu_seqlens.tolist(), a.q.shape[1]
        if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens: {bounds}; accepted: from 0 to {tokens}, never falling")
    if a.bias_table is not None and a.bias_index is not None and a.bias_index.device.type == "cpu":
        entries = a.bias_table.shape[0]
        if a.bias_index.numel() and not 0 <= a.bias_index.min() <= a.bias_index.max() < entries:
            low, high = int(a.bias_index.min()), int(a.bias_index.max())
            raise ValueError(f"bias_index: values from {low} to {high}; accepted: 0 to {entries - 1}")
