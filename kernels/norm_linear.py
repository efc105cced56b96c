"""norm_linear: activation(norm(x) @ weight.T + bias), forward and backward.

Shapes: x (M, K), weight (N, K), or (2 N, K) = [gate; value] for swiglu, out (M, N).

Cost in 16 bits: 2 M N K flops (twice that for swiglu), 2 (M K + N K + M N) bytes.  ViT-B/16, batch 256, FC1
(M = 50,432, K = 768, N = 3,072): 238 GFLOP and 392 MB, 607 flops a byte: the tensor cores bound it everywhere, and what
counts is that neither norm(x) nor the product before its activation touches memory (78 and 310 MB each way).

One of four schedules runs, by choices.json or the number of rows.  Two are of two launches.

Few rows, float32, float16: `norm.statistics` reads x once for mean and 1/std of each row (2 M K bytes, bound by
memory), `_product` normalises tiles of x on their way to the tensor cores.  Padding K with zeros is harmless: where
weight is 0, whatever norm(x) makes of the padding counts nothing.

Many rows of bfloat16: the norm is folded into the weight, W' = norm_weight * W, so that nothing stands between memory
and tensor cores, and its statistics come in the epilogue:

    norm(x) @ W.T + bias = rstd * (x @ W'.T) - rstd * mean * s + (bias + W @ norm_bias),  s = the row sums of W'

s is summed from W' as rounded, so that the mean cancels exactly however large it is.  `_prepare` makes W' in the launch
that makes the statistics: 4 N K bytes, 1 % of the product's time at M = 50,432, where the statistics' 2 M K bytes, 77
MB, take 26 us at 3 TB/s beside the 300 of the product.  It does so in every call: there is no copy that a changed
parameter, or a CUDA graph replayed after the change, could leave stale.  (float16 would lose small norm_weight * W to
its range.)  On Hopper and Blackwell the product may be persistent and warp-specialised, fed by TMA.

And three launches: a pass that normalises, cuBLAS, a pass that activates.

The backward needs the inputs alone.  Its two products (4 M N K flops) are pure and are cuBLAS's; what was before the
activation is made again (2 M N K more) where it was not kept, one pass multiplies the gradient by the derivative and
sums the bias's, and the norm's backward is one pass more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastvit.kernels import choices
from fastvit.kernels.activations import activate, activation_backward, activation_forward
from fastvit.kernels.launch import arch, compute_dtype, launch, multiprocessors, precision, rows
from fastvit.kernels.norm import norm_backward, normalize, row_block, row_moments, statistics
from fastvit.kernels.product import (
    GROUP_M,
    PERSISTENT_ROWS,
    Persistent,
    Tile,
    persists,
    streamed_products,
    tile_for,
    tile_index,
    tile_product,
    weight_gradient,
)
from torch import Tensor

SCHEDULES = ("normalising", "folded", "persistent", "cublas")

# Products with the norm folded into the weight: tiles, and the rows above which they run where choices.json knows
# nothing better.
_FOLDED = {
    "sm80": Tile(128, 128, 32, 8, 3),
    "sm90": Tile(128, 128, 64, 8, 3),
    "sm100": Tile(128, 128, 64, 8, 3),
    "gfx942": Tile(128, 128, 32, 8, 2),
}
_FOLDED_ROWS = 2048

# The same by persistent programs, by whether they are gated: gate and value are two accumulators.
_PERSISTENT = {
    ("sm90", False): Persistent(Tile(128, 256, 64, 4, 3), 2, False),
    ("sm90", True): Persistent(Tile(128, 256, 64, 4, 3), 2, False),
    ("sm100", False): Persistent(Tile(128, 256, 64, 8, 3), 1, True),
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):  # as Persistent says of flat loops
    _PERSISTENT["sm100", True] = Persistent(Tile(128, 128, 64, 8, 4), 2, False)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    pre: Tensor | None = None,
) -> Tensor:
    """Launch: same signature and meaning as `fastvit.ops.norm_linear`.

    The result has the dtype that products run in: the narrower of `x` and `weight`.  `pre` (M, rows of weight), of that
    dtype, receives what the activation is applied to.
    """
    dtype = compute_dtype(x, weight)
    gated = activation == "swiglu"
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty(*x.shape[:-1], features, dtype=dtype, device=x.device)
    x, weight = rows(x), rows(weight.to(dtype))
    m, k = x.shape
    bias, norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (bias, norm_weight, norm_bias))
    schedule = _schedule(x, weight, norm, activation, pre is not None)
    if schedule == "cublas":
        return _by_cublas(x, weight, bias, norm, norm_weight, norm_bias, eps, activation, out, pre)
    mean = rstd = sums = None
    tile = tile_for(x.device, dtype, m)
    if schedule != "normalising":
        mean, rstd, weight, sums, bias = prepare(x, weight, bias, norm_weight, norm_bias, norm, eps)
        if schedule == "persistent":
            _launch_persistent(x, weight, bias, mean, rstd, sums, out, activation)
            return out
        tile = _FOLDED[arch(x.device)]
    elif norm != "none":
        mean, rstd = statistics(x, norm, eps)
    block_n = tile.block_n // 2 if gated else tile.block_n
    launch(
        _product,
        triton.cdiv(m, tile.block_m) * triton.cdiv(features, block_n),
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        bias,
        mean,
        rstd,
        sums,
        norm_weight,
        norm_bias,
        out,
        pre,
        m,
        features,
        k,
        NORM=norm if sums is None else "none",
        ACTIVATION=activation,
        EVEN_K=k % tile.block_k == 0,
        ALIGN=math.gcd(16, k, x.stride(0), weight.stride(0)),
        PRECISION=precision(dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def _schedule(x: Tensor, weight: Tensor, norm: str, activation: str, keeps_pre: bool) -> str:
    """One of SCHEDULES that can run this product: the one known to be the fastest, or else by the number of rows."""
    (m, k), n, on = x.shape, weight.shape[0], arch(x.device)
    folds = norm != "none" and x.dtype == weight.dtype == torch.bfloat16
    gated = activation == "swiglu"
    features = n // 2 if gated else n
    # The folded weight and the result are contiguous.
    aligned = k % 8 == 0 and features % 8 == 0 and persists(x)
    persistent = folds and not keeps_pre and aligned and (on, gated) in _PERSISTENT
    able = {"normalising": True, "folded": folds, "persistent": persistent}
    able["cublas"] = activation != "none" or not keeps_pre
    chosen = choices.choose(on, choices.key("norm_linear", weight.dtype, f"{norm} {activation}", n, k), m, able)
    if chosen is not None:
        return chosen
    if persistent and m > PERSISTENT_ROWS:
        return "persistent"
    return "folded" if folds and m > _FOLDED_ROWS else "normalising"


def _by_cublas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    out: Tensor,
    pre: Tensor | None,
) -> Tensor:
    """A pass that normalises, a pure product, a pass that activates."""
    dtype = out.dtype
    normed = x.to(dtype) if norm == "none" else normalize(x, norm_weight, norm_bias, norm, eps, dtype)
    result = out.view(-1, out.shape[-1]) if activation == "none" else pre
    if result is None:
        result = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    if bias is None:
        torch.mm(normed, weight.t(), out=result)
    else:
        torch.addmm(bias.to(dtype), normed, weight.t(), out=result)
    if activation == "none":
        return out
    activation_forward(result, out, activation)
    return out


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean and rstd (M,) of x; W' (N, K) in the dtype of `weight`; its row sums (N,); bias + W @ norm_bias (N,)."""
    (m, k), n = x.shape, weight.shape[0]
    mean, rstd = torch.empty(2, m, dtype=torch.float32, device=x.device)
    folded = torch.empty(n, k, dtype=weight.dtype, device=x.device)
    sums, shift = torch.empty(2, n, dtype=torch.float32, device=x.device)
    block_m, block_k, num_warps = row_block(k)
    row_programs = triton.cdiv(m, block_m)
    launch(
        _prepare,
        row_programs + triton.cdiv(n, block_m),
        x,
        x.stride(0),
        mean,
        rstd,
        weight,
        weight.stride(0),
        bias,
        norm_weight,
        norm_bias,
        folded,
        sums,
        shift,
        m,
        n,
        k,
        row_programs,
        eps,
        CENTRED=norm == "layer",
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=1,
    )
    return mean, rstd, folded, sums, shift


def _launch_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    out: Tensor,
    activation: str,
) -> None:
    m, k = x.shape
    features, gated = out.shape[-1], activation == "swiglu"
    tile, parts, flat = _PERSISTENT[arch(x.device), gated]
    columns = tile.block_n // 2 if gated else tile.block_n
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(features, columns)
    programs = min(tiles, multiprocessors(x.device))
    launch(
        _persistent,
        programs,
        x,
        x.stride(0),
        weight,
        bias,
        mean,
        rstd,
        sums,
        out,
        m,
        features,
        k,
        programs,
        ACTIVATION=activation,
        PARTS=parts,
        FLAT=flat,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        descriptors=True,
    )


def norm_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, norm_weight and norm_bias, those that `needs` asks for, given that of the result.

    Args:
        grad: (..., N), any float dtype.
        weight, bias: in the dtype that products run in, as `norm_linear` takes them.

    Returns:
        x's in the dtype of `x`, all others in float32 or that of their argument.
    """
    dtype = compute_dtype(x, weight)
    grad, bias_sum = rows(grad), None
    if activation != "none":
        pre = rows(
            norm_linear(x, weight, bias, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps)
        )  # fmt: skip
        grad, _, bias_sum = activation_backward(grad, pre, activation)
    elif needs[2]:
        bias_sum = grad.sum(0, dtype=torch.float32)
    x_grad, weight_grad, *norm_grads = projection_backward(
        grad.to(dtype), x, weight, norm, norm_weight, norm_bias, eps, (needs[0], needs[1], needs[3] or needs[4])
    )
    return [x_grad, weight_grad, bias_sum, *norm_grads]


def projection_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    needs: Sequence[bool],
    add: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backward of norm(x) @ weight.T: gradients of x, weight, norm_weight and norm_bias.

    Args:
        grad: (M, N), the product's gradient, in the dtype that products run in.
        needs: of x, of weight, of either norm vector.
        add: of x's shape, added to x's gradient.
    """
    shape, x, weight = x.shape, rows(x), rows(weight)
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
    x_grad = weight_grad = norm_weight_grad = norm_bias_grad = None
    if needs[1]:
        dtype = weight.dtype
        normed = x.to(dtype) if norm == "none" else normalize(x, norm_weight, norm_bias, norm, eps, dtype)
        weight_grad = weight_gradient(grad, normed, dtype)
        del normed
    if needs[0] or needs[2]:
        normed_grad = torch.mm(grad, weight)
        if norm != "none":
            x_grad, norm_weight_grad, norm_bias_grad = norm_backward(
                normed_grad,
                x,
                norm_weight,
                norm,
                eps,
                add=None if add is None else rows(add),
                want_x=needs[0],
                want_affine=needs[2],
            )
        else:
            x_grad = normed_grad.to(x.dtype)
            if add is not None:
                x_grad = x_grad + rows(add)
    return None if x_grad is None else x_grad.view(shape), weight_grad, norm_weight_grad, norm_bias_grad


@triton.jit
def _prepare(
    x, x_row, mean, rstd, weight, weight_row, bias, norm_weight, norm_bias, folded, sums, shift, M, N, K,
    row_programs, eps, CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first programs make the statistics of rows of x, the others fold rows of the weight."""
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = k < K
    if program < row_programs:
        row = program * BLOCK_M
        at = x + tl.cast(row, tl.int64) * x_row + (i[:, None] * x_row + k)
        values = tl.load(at, mask=(row + i[:, None] < M) & inside, other=0.0).to(tl.float32)
        centre, scale = row_moments(values, K, eps, inside, CENTRED)
        tl.store(mean + row + i, centre, mask=row + i < M)
        tl.store(rstd + row + i, scale, mask=row + i < M)
    else:
        row = (program - row_programs) * BLOCK_M
        mask = (row + i[:, None] < N) & inside
        at = weight + tl.cast(row, tl.int64) * weight_row + (i[:, None] * weight_row + k)
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        offset = tl.zeros([BLOCK_M], tl.float32)
        if norm_bias is not None:
            offset += tl.sum(values * tl.load(norm_bias + k, mask=inside, other=0.0).to(tl.float32), 1)
        if bias is not None:
            offset += tl.load(bias + row + i, mask=row + i < N, other=0.0).to(tl.float32)
        if norm_weight is not None:
            values *= tl.load(norm_weight + k, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(folded.dtype.element_ty)
        tl.store(shift + row + i, offset, mask=row + i < N)
        tl.store(folded + tl.cast(row, tl.int64) * K + (i[:, None] * K + k), rounded, mask=mask)
        tl.store(sums + row + i, tl.sum(rounded.to(tl.float32), 1), mask=row + i < N)


@triton.jit
def unfold(acc, mean, rstd, sums, m, n, M, N):
    """rstd * (acc - mean * sums): norm(x) @ weight.T from x @ W'.T."""
    scale = tl.load(rstd + m, mask=m < M, other=0.0)
    centre = tl.load(mean + m, mask=m < M, other=0.0) * -scale
    total = tl.load(sums + n, mask=n < N, other=0.0)
    return tl.fma(acc, scale[:, None], centre[:, None] * total[None, :])


@triton.jit
def _persistent(
    x, x_row, weight, bias, mean, rstd, sums, out, M, N, K, programs,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Each program makes every `programs`-th tile: one group of warps loads, while the others multiply and store.

    The two PARTS of a tile are gate and value, or the halves of its columns.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    WIDE: tl.constexpr = 2 if GATED else 1
    PART: tl.constexpr = BLOCK_N // PARTS
    COLUMNS: tl.constexpr = PART if GATED else BLOCK_N
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [x_row, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(weight, [N * WIDE, K], [K, 1], [PART, BLOCK_K])
    out_tiles = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, PART])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLAT, warp_specialize=True):
        row, column = tile_index(tile, M, N, BLOCK_M, COLUMNS, GROUP_M)
        row *= BLOCK_M
        column *= COLUMNS
        second = column + (N if GATED else PART)
        left, right = streamed_products(
            x_tiles, weight_tiles, row, column, second, K, PARTS == 2, BLOCK_M, PART, BLOCK_K
        )
        m = row + tl.arange(0, BLOCK_M)
        n = tl.arange(0, PART)
        left = _unfold_biased(left, mean, rstd, sums, bias, m, column + n, M, N * WIDE)
        left = activate(left, "silu" if GATED else ACTIVATION, False)
        if not GATED:
            out_tiles.store([row, column], left.to(out.dtype.element_ty))
        if PARTS == 2:
            right = _unfold_biased(right, mean, rstd, sums, bias, m, second + n, M, N * WIDE)
            if GATED:
                out_tiles.store([row, column], (left * right).to(out.dtype.element_ty))
            else:
                out_tiles.store([row, second], activate(right, ACTIVATION, False).to(out.dtype.element_ty))


@triton.jit
def _unfold_biased(acc, mean, rstd, sums, bias, m, n, M, N):
    acc = unfold(acc, mean, rstd, sums, m, n, M, N)
    return acc + tl.load(bias + n, mask=n < N, other=0.0)[None, :]


@triton.jit
def _product(
    x, x_row, weight, weight_row, bias, mean, rstd, sums, norm_weight, norm_bias, out, pre, M, N, K,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    row, column = tile_index(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row *= BLOCK_M
    column *= BLOCK_N
    acc, value = tile_product(
        x, x_row, weight, weight_row, mean, rstd, norm_weight, norm_bias, row, column, M, N, K, N,
        NORM, GATED, EVEN_K, ALIGN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = row + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    if sums is not None:
        acc = unfold(acc, mean, rstd, sums, m, n, M, N)
        if GATED:
            value = unfold(value, mean, rstd, sums + N, m, n, M, N)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED and bias is not None:
        value += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    i = tl.arange(0, BLOCK_M)[:, None]
    if pre is not None:
        PRE_ROW: tl.constexpr = 2 if GATED else 1
        at = pre + tl.cast(row, tl.int64) * (N * PRE_ROW) + (i * (N * PRE_ROW) + n[None, :])
        tl.store(at, acc.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(at + N, value.to(pre.dtype.element_ty), mask=mask)
    if GATED:
        acc = activate(acc, "silu", True) * value
    else:
        acc = activate(acc, ACTIVATION, out.dtype.element_ty == tl.float32)
    at = out + tl.cast(row, tl.int64) * N + (i * N + n[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=mask)
