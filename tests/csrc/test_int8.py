"""int8 weights in every kernel that takes them, against the plain int8 of the reference and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvit import _C, reference
from fastvit.reference import int8
from tests import nasty
from tests.csrc import call, plain
from tests.tolerances import INT8, INT8_TIES, relative_l2

WIDTHS = (1, 15, 16, 33, 72, 88, 192, 768, 1152, 2730, 4304)


@pytest.mark.parametrize("k", WIDTHS)
def test_rows_are_quantized_as_the_reference_does(isa: str, dtype: torch.dtype, k: int) -> None:
    x = nasty.tokens(37, k).to(dtype)
    x[5] = 0.0
    q, scale = call.quantized(x)
    expected, expected_scale = int8.quantize(int8.rotate(x.float()))
    assert torch.allclose(scale, expected_scale, rtol=1e-5, atol=0.0)
    difference = (q.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 0.002
    assert scale[5] == 0
    assert (q[5] == 0).all()


def test_strided_rows_and_threads(isa: str) -> None:
    x = nasty.tokens(50, 72).float()
    expected = call.quantized(x)
    for other in (call.quantized(nasty.strided(x, "sliced")), *(call.quantized(x, threads=t) for t in (1, 3, 7))):
        assert all(map(torch.equal, other, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(isa: str, dtype: torch.dtype, bad: float) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(20, 72), nasty.weight(40, 72), nasty.vector(40))
    clean = call.norm_linear(x, call.quantized(w), b, compute=dtype)
    x[3, 7] = bad
    w[11, 70] = bad
    out = call.norm_linear(x, call.quantized(w), b, compute=dtype)
    spoiled = torch.zeros(20, 40, dtype=torch.bool)
    spoiled[3], spoiled[:, 11] = True, True
    assert out[spoiled].isnan().all()
    assert torch.equal(out[~spoiled], clean[~spoiled])


# Half a step in the last place of bf16.
BF16 = 2.0**-9


def close(actual: Tensor, int8_reference: Tensor, truth: Tensor, roundings: int = 1) -> None:
    """roundings: places where, in bf16, the kernel may round and the reference not, or differently."""
    ties = INT8_TIES + (roundings * BF16 if actual.dtype == torch.bfloat16 else 0.0)
    assert relative_l2(actual, int8_reference) <= ties
    assert relative_l2(actual, truth) <= INT8


def check_norm_linear(m: int, n: int, k: int, dtype: torch.dtype, activation="none", norm="layer", threads=2) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(m, k), nasty.weight(n, k), nasty.vector(n))
    g, s = plain.cast(dtype, nasty.vector(k, 3, mean=1.0), nasty.vector(k, 4))
    options = {"norm": norm, "activation": activation}
    if norm != "none":
        options |= {"norm_weight": g, "norm_bias": s if norm == "layer" else None}
    double = {key: v.double() if isinstance(v, Tensor) else v for key, v in options.items()}
    actual = call.norm_linear(x, call.quantized(w), b, compute=dtype, threads=threads, **options)
    truth = reference.norm_linear(*plain.cast(torch.float64, x, w, b), **double)
    close(actual, reference.norm_linear(x, w, b, **options, quantize="int8"), truth)


@pytest.mark.parametrize("norm", call.NORMS)
@pytest.mark.parametrize("activation", call.ACTIVATIONS)
def test_norms_and_activations(isa: str, dtype: torch.dtype, norm: str, activation: str) -> None:
    check_norm_linear(50, 200, 96, dtype, activation, norm)


@pytest.mark.parametrize(
    "m,n,k",
    [
        (1, 1, 64),
        (1, 588, 37),
        (197, 37, 588),
        (5, 64, 16),
        (577, 72, 72),
        (13, 192, 4304),
        (23, 192, 4304),
        (29, 130, 2730),
    ],
)
def test_shapes(isa: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    check_norm_linear(m, n, k, dtype)


def test_rows_beyond_one_block(isa: str) -> None:
    # 27,000 rows of 1,000 bytes do not fit the row buffer.
    check_norm_linear(27_000, 17, 1000, torch.float32)


def test_massive_tokens_and_zeros_change_no_others(isa: str, dtype: torch.dtype) -> None:
    x, w, b = plain.cast(dtype, nasty.tokens(20, 96), nasty.weight(40, 96), nasty.vector(40))
    quiet = call.norm_linear(x, call.quantized(w), b, compute=dtype)
    x[3] *= 1000.0
    x[4] = 0.0
    w[7] = 0.0
    out = call.norm_linear(x, call.quantized(w), b, compute=dtype)
    assert torch.equal(out[4], b)
    assert torch.equal(out[:, 7], b[7].expand(20))
    quiet[:, 7] = b[7]
    same = [i for i in range(20) if i not in (3, 4)]
    assert torch.equal(out[same], quiet[same])


@pytest.mark.parametrize("samples,tokens,n,k", [(2, 25, 72, 88), (3, 67, 96, 192), (3, 2, 33, 4304)])
def test_linear_residual(isa: str, dtype: torch.dtype, samples: int, tokens: int, n: int, k: int) -> None:
    # A small residual: beside a large one nothing of the branch is seen.
    x, residual = nasty.tokens(samples, tokens, k), nasty.tokens(samples, tokens, n, seed=5, massive=0) * 0.1
    w, b, gamma = nasty.weight(n, k), nasty.vector(n), nasty.vector(n, 6, mean=1.0)
    tensors = plain.cast(dtype, x, w, b, residual, gamma)
    factors = torch.tensor([1.0, 0.0, 2.0][:samples])

    def of(tensors: list[Tensor], **kwargs) -> Tensor:
        x, w, b, residual, gamma = tensors
        options = {"residual": residual, "layer_scale": gamma, "drop_path": factors}
        return reference.linear_residual(x, w, b, **options, **kwargs).flatten(0, 1)

    x, w, b, residual, gamma = tensors
    rows = (x.flatten(0, 1), call.quantized(w), b, residual.flatten(0, 1))
    actual = call.linear_residual(*rows, gamma, factors, rows_per_sample=tokens, compute=dtype)
    close(actual, of(tensors, quantize="int8"), of(plain.cast(torch.float64, *tensors)))
    assert torch.equal(actual[tokens : 2 * tokens], residual[1])


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "relu"])
@pytest.mark.parametrize("which", ["both", "fc1", "fc2"])
def test_mlp(isa: str, dtype: torch.dtype, activation: str, which: str) -> None:
    m, d, h = 58, 96, 140
    rows = 2 * h if activation == "swiglu" else h
    x = nasty.tokens(m, d) * 0.01
    w1, b1, w2, b2 = nasty.weight(rows, d), nasty.vector(rows), nasty.weight(d, h), nasty.vector(d, 5)
    g, s, gamma = nasty.vector(d, 3, mean=1.0), nasty.vector(d, 4), nasty.vector(d, 6, mean=1.0)
    x, w1, b1, w2, b2, g, s, gamma = plain.cast(dtype, x, w1, b1, w2, b2, g, s, gamma)
    row_scale = torch.tensor([1.0, 2.0])
    quantize = ("int8" if which != "fc2" else None, "int8" if which != "fc1" else None)
    operands = [call.quantized(w) if q else w for w, q in zip((w1, w2), quantize, strict=True)]
    ends = (g, s, activation, gamma, row_scale, m // 2)
    results = [
        call.mlp(x, operands[0], b1, operands[1], b2, *ends, compute=dtype, threads=threads) for threads in (1, 2, 5)
    ]
    assert all(torch.equal(results[0], r) for r in results)
    x = x.view(2, m // 2, d)

    def of(dtype: torch.dtype, **kwargs) -> Tensor:
        tensors = plain.cast(dtype, x, w1, b1, w2, b2)
        gg, ss, ls = plain.cast(dtype, g, s, gamma)
        options = {"norm_weight": gg, "norm_bias": ss, "layer_scale": ls, "drop_path": row_scale}
        return reference.mlp(*tensors, **options, activation=activation, **kwargs).view(m, d)

    close(results[0], of(dtype, quantize=quantize), of(torch.float64), roundings=4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("which", ["both", "qkv", "proj"])
def test_self_attention(isa: str, dtype: torch.dtype, packed: bool, which: str) -> None:
    samples, tokens, heads, d = 2, 29, 3, 72
    x = (nasty.tokens(samples * tokens, d) * 0.01).to(dtype)
    w, b, wp, bp = nasty.weight(3 * d, d), nasty.vector(3 * d), nasty.weight(d, d, seed=8), nasty.vector(d, 5)
    g, s, gamma = nasty.vector(d, 3, mean=1.0), nasty.vector(d, 4), nasty.vector(d, 6, mean=1.0)
    w, b, wp, bp, g, s, gamma = plain.cast(dtype, w, b, wp, bp, g, s, gamma)
    bias = torch.randn(tokens, tokens, generator=nasty.generator(7))
    row_scale = torch.tensor([1.0, 2.0])
    quantize = ("int8" if which != "proj" else None, "int8" if which != "qkv" else None)
    weights, biases = ([w], [b]) if packed else (w.split(d), b.split(d))
    maybe = [lambda t, q=q: call.quantized(t) if q else t for q in quantize]
    projections = [(maybe[0](weight), bb) for weight, bb in zip(weights, biases, strict=True)]
    expanded = bias.expand(samples, heads, tokens, tokens)
    ends = (maybe[1](wp), bp, g, s, expanded, gamma, row_scale, samples, heads)
    results = [call.self_attention(x, projections, *ends, compute=dtype, threads=threads) for threads in (1, 2, 5)]
    assert all(torch.equal(results[0], r) for r in results)

    def of(dtype: torch.dtype, **kwargs) -> Tensor:
        xx, ww, bb, wwp, bbp = plain.cast(dtype, x.view(samples, tokens, d), w, b, wp, bp)
        gg, ss, ls = plain.cast(dtype, g, s, gamma)
        options = {"norm_weight": gg, "norm_bias": ss, "layer_scale": ls, "drop_path": row_scale, "bias": bias}
        return reference.self_attention(xx, ww, bb, wwp, bbp, num_heads=heads, **options, **kwargs).view(-1, d)

    close(results[0], of(dtype, quantize=quantize), of(torch.float64), roundings=4)


def test_the_peak_of_integers_is_a_rate(isa: str) -> None:
    assert 0.1 < _C.peak("int8", 1, 0.005) < 1e6
