from __future__ import annotations

from typing import Any

import pytest
import torch
from fastvit.kernels.attention import attention
from fastvit.kernels.launch import record
from torch import Tensor

from fastvit import ops, reference
from tests import nasty
from tests.tolerances import assert_close

BATCH, HEADS = 2, 2


def plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """The definition, in the arguments' dtype: float64 for the truth, lower for what eager PyTorch would make of it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(-1)
    if bias is not None:
        weights = weights.masked_fill(torch.isneginf(logits).all(-1, keepdim=True), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def qkv(n: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Slices of a packed projection with massive channels in v and peaked logits."""
    packed = nasty.tokens(BATCH, n, 3, HEADS, head_dim, seed=seed, massive=0)
    packed[:, :, 0] *= 2.0
    packed[:, :, 2] = nasty.tokens(BATCH, n, HEADS, head_dim, seed=seed + 1)
    q, k, v = packed.to(dtype).unbind(2)
    return q, k, v


def check(device: torch.device, q: Tensor, k: Tensor, v: Tensor, **options) -> None:
    double = {name: o.double() if isinstance(o, Tensor) else o for name, o in options.items()}
    truth = plain(q.double(), k.double(), v.double(), **double)
    eager = plain(q, k, v, **{name: o.to(q.dtype) if isinstance(o, Tensor) else o for name, o in options.items()})
    options = {name: o.to(device) if isinstance(o, Tensor) else o for name, o in options.items()}
    result = attention(q.to(device), k.to(device), v.to(device), **options).cpu()
    assert result.dtype == q.dtype
    assert_close(result, truth, eager=eager)


@pytest.mark.parametrize("n", [1, 5, 50, 77, 197, 257, 299])
def test_token_counts(device: torch.device, n: int) -> None:
    check(device, *qkv(n, 64, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 50, 299])
def test_other_dtypes(device: torch.device, n: int, dtype: torch.dtype) -> None:
    check(device, *qkv(n, 64, dtype))


@pytest.mark.parametrize("n", [101, 210])
@pytest.mark.parametrize("head_dim", [8, 20, *(d for d in nasty.HEAD_DIMS if d != 64), 160])
def test_head_dims(device: torch.device, head_dim: int, n: int) -> None:
    check(device, *qkv(n, head_dim, torch.float16))


@pytest.mark.parametrize("head_dim", nasty.HEAD_DIMS)
def test_head_dims_in_float32(device: torch.device, head_dim: int) -> None:
    check(device, *qkv(37, head_dim, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("nq", "nk"), [(1, 197), (70, 50)])
def test_cross_attention(device: torch.device, nq: int, nk: int, dtype: torch.dtype) -> None:
    q, _, _ = qkv(nq, 72, dtype)
    _, k, v = qkv(nk, 72, dtype, seed=3)
    check(device, q, k, v)


@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float32), (50, torch.float16), (150, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape", ["full", "heads", "keys", "rows"])
def test_bias(device: torch.device, shape: str, n: int, dtype: torch.dtype) -> None:
    sizes = {"full": (BATCH, HEADS, n, n), "heads": (HEADS, n, n), "keys": (BATCH, 1, 1, n), "rows": (n, 1)}
    bias = torch.randn(sizes[shape], generator=nasty.generator(5), dtype=torch.float64).float()
    check(device, *qkv(n, 40, dtype), bias=bias)


@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float32), (50, torch.float16), (150, torch.float16)], ids=str)
def test_masked_keys(device: torch.device, n: int, dtype: torch.dtype) -> None:
    """Padded keys, keys that are masked in a whole block before others count, and a row without any key."""
    bias = torch.zeros(BATCH, 1, n, n)
    bias[0, :, :, n // 3 :] = float("-inf")
    bias[1, :, :, : n - 2] = float("-inf")
    bias[1, :, 3] = float("-inf")
    q, k, v = qkv(n, 64, dtype)
    check(device, q, k, v, bias=bias)
    assert not attention(q.to(device), k.to(device), v.to(device), bias=bias.to(device))[1, 3].any()


@pytest.mark.parametrize("least", [torch.finfo(t).min for t in (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("n", "dtype"), [(50, torch.float32), (50, torch.bfloat16), (150, torch.bfloat16)], ids=str)
def test_the_least_float_masks_a_key_but_not_a_row(
    device: torch.device, n: int, dtype: torch.dtype, least: float
) -> None:
    """Added to any logit it gives itself, so that all keys of a row weigh the same."""
    bias = torch.zeros(n, n)
    bias[3], bias[4, 5:] = least, least
    infinite = torch.zeros(n, n)
    infinite[4, 5:] = float("-inf")
    q, k, v = qkv(n, 40, dtype)
    out, expected = (attention(*(t.to(device) for t in (q, k, v)), bias=b.to(device)).cpu() for b in (bias, infinite))
    mean = v.double().mean(1).flatten(1)
    assert_close(out[:, 3], mean, eager=mean.to(dtype))
    assert torch.equal(out[:, 4:], expected[:, 4:])


@pytest.mark.parametrize("n", [50, 280])
@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(device: torch.device, scale: float, n: int) -> None:
    check(device, *qkv(n, 32, torch.float16), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_outermost(device: torch.device, dtype: torch.dtype) -> None:
    """(B, H, N, D) seen as (B, N, H, D)."""
    check(device, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(70, 36, dtype)))


def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    check(device, *(nasty.strided(t, "transposed") for t in qkv(20, 32, torch.float32)))


def test_large_logits(device: torch.device) -> None:
    """exp of the logits themselves would overflow."""
    q, k, v = qkv(197, 64, torch.float16)
    check(device, q * 30, k * 3, v)


def prepared(n: int, head_dim: int, norm: str = "layer", *, prefix: int = 5, interleaved: bool = False) -> dict:
    """float64 options: random weights of a norm of q and k, and a rotation of all tokens but `prefix`."""
    options: dict[str, Any] = {"qk_norm": norm, "qk_norm_eps": 1e-5, "rope_interleaved": interleaved}
    for i, name in enumerate(("q_norm", "k_norm")):
        if norm != "none":
            options[f"{name}_weight"] = nasty.vector(head_dim, seed=i, mean=1.0)
        if norm == "layer":
            options[f"{name}_bias"] = nasty.vector(head_dim, seed=2 + i)
    angles = (torch.randn(n - prefix, head_dim, generator=nasty.generator(i), dtype=torch.float64) for i in (6, 7))
    cos, sin = angles
    return options | {"rope": (cos.cos(), sin.sin())}


def check_prepared(device: torch.device, operands: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    def all_to(dtype: torch.dtype, to: torch.device | str) -> dict:
        def change(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(change, value))
            if not isinstance(value, Tensor):
                return value
            return value.to(to, dtype if value.is_floating_point() else value.dtype)

        return {name: change(value) for name, value in options.items()}

    dtype = operands[0].dtype
    options = all_to(dtype, "cpu")
    truth = reference.attention(*(t.double() for t in operands), **all_to(torch.float64, "cpu"))
    eager = reference.attention(*operands, **all_to(dtype, "cpu"))
    assert_close(attention(*(t.to(device) for t in operands), **all_to(dtype, device)).cpu(), truth, eager=eager)


@pytest.mark.parametrize("head_dim", [20, 64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize("interleaved", [False, True])
def test_prepared_head_dims(device: torch.device, head_dim: int, interleaved: bool) -> None:
    check_prepared(device, qkv(21, head_dim, torch.float16), **prepared(21, head_dim, interleaved=interleaved))


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("n", "dtype"), [(140, torch.bfloat16), (50, torch.float32)], ids=str)
def test_prepared(device: torch.device, n: int, dtype: torch.dtype, interleaved: bool, norm: str) -> None:
    """Several chunks of keys and blocks of queries in one kernel, a loop and a tail in the other."""
    check_prepared(device, qkv(n, 40, dtype), **prepared(n, 40, norm, interleaved=interleaved))


@pytest.mark.parametrize("prefix", [0, 1, 21])
def test_prepared_prefix_of_separate_tensors(device: torch.device, prefix: int) -> None:
    q, k, v = (t.contiguous() for t in qkv(21, 32, torch.float32))
    check_prepared(device, (q, k.transpose(1, 2).contiguous().transpose(1, 2), v), **prepared(21, 32, prefix=prefix))


def test_normed_cross_attention(device: torch.device) -> None:
    q, _, _ = qkv(3, 72, torch.float16)
    _, k, v = qkv(50, 72, torch.float16, seed=3)
    check_prepared(device, (q, k, v), **prepared(50, 72) | {"rope": None})
    check_prepared(device, (q, k, v), qk_norm="layer", qk_norm_eps=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_prepared_packed_sequences(device: torch.device, interleaved: bool) -> None:
    bounds = torch.tensor([0, 33, 33, 34, 80]).int()
    q, k, v = (t[:1] for t in qkv(80, 72, torch.float16))
    check_prepared(device, (q, k, v), cu_seqlens=bounds, **prepared(80, 72, interleaved=interleaved))


def test_prepared_windows_and_masks(device: torch.device) -> None:
    """Rotated by the place in the image, not in the window."""
    options = prepared(24, 32, prefix=0)
    check_prepared(device, qkv(24, 32, torch.float32), grid=(8, 3), window=(4, 3), shift=(2, 1), **options)
    mask = torch.ones(BATCH, 24, dtype=torch.bool)
    mask[1, 20:] = False
    check_prepared(device, qkv(24, 32, torch.float16), key_mask=mask, **options)


def test_prepared_by_a_pass_over_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvit.kernels.attention._prepares_inside", lambda call: False)
    check_prepared(device, qkv(21, 72, torch.float16), **prepared(21, 72))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_tables_are_read_where_they_lie(
    device: torch.device, inside: bool, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cos and sin as timm has them: halves of one tensor."""
    monkeypatch.setattr("fastvit.kernels.attention._prepares_inside", lambda call: inside)
    q, k, v = (t.to(device) for t in qkv(21, 40, torch.float32))
    halves = torch.randn(16, 80, generator=nasty.generator()).to(device).chunk(2, -1)
    expected = attention(q, k, v, rope=tuple(t.contiguous() for t in halves), rope_interleaved=interleaved)
    assert torch.equal(attention(q, k, v, rope=halves, rope_interleaved=interleaved), expected)
    uneven = (halves[0], halves[1].contiguous())
    assert torch.equal(attention(q, k, v, rope=uneven, rope_interleaved=interleaved), expected)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942"])
@pytest.mark.parametrize(
    ("batch", "n", "head_dim", "launches"), [(64, 201, 64, 1), (64, 201, 128, 1), (1, 577, 64, 1), (64, 577, 64, 3)]
)
def test_launches_of_inference(arch: str, batch: int, n: int, head_dim: int, launches: int) -> None:
    """One, unless queries are so many that every key would be prepared again and again."""
    q, k, v = torch.empty(batch, n, 3, 12, head_dim, dtype=torch.bfloat16, device="meta").unbind(2)
    table = torch.empty(n - 5, head_dim, device="meta")
    with record(arch) as launched:
        attention(q, k, v, qk_norm="rms", rope=(table, table))
    assert len(launched) == launches


@pytest.mark.parametrize(("length", "launches"), [(197, 1), (600, 3)])
def test_launches_for_packed_sequences(length: int, launches: int) -> None:
    q, k, v = torch.empty(1, 32 * length, 3, 12, 64, dtype=torch.bfloat16, device="meta").unbind(2)
    bounds = torch.empty(33, dtype=torch.int32, device="meta")
    with record("sm90") as launched:
        attention(q, k, v, cu_seqlens=bounds, qk_norm="layer")
    assert len(launched) == launches


def test_operator_launches_one_kernel(device: torch.device) -> None:
    q, k, v = (t.to(device) for t in qkv(201, 64, torch.float16))
    table = torch.empty(196, 64, device=device)
    with ops.use_backend("triton"), record("sm90") as launched:
        ops.attention(q, k, v, qk_norm="layer", rope=(table, table))
    assert len(launched) == 1
