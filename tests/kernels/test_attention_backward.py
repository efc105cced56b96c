"""Attention through the operator with Triton forced: output and every gradient against float64, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastvit.kernels import attention_backward
from torch import Tensor

from fastvit import ops, reference
from tests import nasty
from tests.tolerances import LOW_PRECISION_RATIO, assert_close, relative_l2


def qkv(n: int, heads: int = 2, head_dim: int = 32, batch: int = 2, nk: int | None = None) -> list[Tensor]:
    """Slices of packed projections with a massive channel in v and peaked logits."""
    packed = nasty.tokens(batch, n, 3, heads, head_dim, massive=0)
    packed[:, :, 0] *= 2.0
    packed[:, :, 2] = nasty.tokens(batch, n, heads, head_dim, seed=1, massive=1)
    q, k, v = packed.unbind(2)
    if nk is not None:
        _, k, v = qkv(nk, heads, head_dim, batch)
    return [q, k, v]


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=nasty.generator(seed), dtype=torch.float64)


def angles(patches: int, head_dim: int) -> tuple[Tensor, Tensor]:
    return noise(patches, head_dim, seed=6).cos(), noise(patches, head_dim, seed=7).sin()


def check(device: torch.device, dtype: torch.dtype, operands: list[Tensor], **options: Any) -> Tensor:
    """Assert that output and gradients are as near to float64 as `dtype` demands; returns the output."""
    given = [t.to(dtype) for t in operands]
    rounded = {name: _map(o, lambda t: t.to(dtype)) for name, o in options.items()}
    truth = _run(reference.attention, torch.float64, "cpu", given, rounded)
    eager = _run(reference.attention, dtype, "cpu", given, rounded)
    with ops.use_backend("triton"):
        actual = _run(ops.attention, dtype, device, given, rounded)
    for mine, exact, plain in zip(actual, truth, eager, strict=True):
        assert mine.dtype == dtype
        if not exact.any():
            # A lone key has weight 1 whatever its logit: p (dp - delta) cancels to the rounding of delta.
            assert mine.abs().max() <= 10 * torch.finfo(dtype).eps * truth[0].abs().max()
            continue
        assert_close(mine.cpu(), exact, eager=plain)
    return actual[0].cpu()


def _map(value: Any, change: Any) -> Any:
    """`change` every floating tensor in a value or tuple."""
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(
    function: Any, dtype: torch.dtype, device: torch.device | str, operands: list[Tensor], options: dict[str, Any]
) -> list[Tensor]:
    """The output, then the gradients of everything that floats but `rope`."""
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        # Strides are kept.
        leaves.append(t.to(device, dtype).detach().requires_grad_())
        return leaves[-1]

    arguments = [leaf(t) for t in operands]
    named = {}
    for name, option in options.items():
        change = (lambda t: t.to(device, dtype)) if name == "rope" else leaf
        value = _map(option, change)
        named[name] = value.to(device) if isinstance(value, Tensor) and not value.is_floating_point() else value
    out = function(*arguments, **named)
    seed = noise(*out.shape, seed=9).to(out.dtype).to(out.device)
    gradients = torch.autograd.grad(out, leaves, seed)
    return [out.detach(), *gradients]


@pytest.fixture(params=[("whole", torch.float16), ("split", torch.float32)], ids=["whole", "split"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Short sequences through the kernel for short ones in 16 bits, and through those for long ones."""
    path, dtype = request.param
    if path == "split":
        monkeypatch.setattr(attention_backward, "_WHOLE", 0)
    return dtype


@pytest.mark.parametrize("n", [1, 5, 70])
def test_token_counts(device: torch.device, n: int, dtype: torch.dtype) -> None:
    check(device, dtype, qkv(n))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision(device: torch.device, low: torch.dtype, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(attention_backward, "_WHOLE", 0)
    check(device, low, qkv(70, head_dim=64))


@pytest.mark.parametrize("head_dim", [20, 72, 76, 80, 88, 96, 104, 112, 128])
def test_head_dims(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    check(device, dtype, qkv(18, 1, head_dim, 1))


def test_wider_heads_recompute_the_reference(device: torch.device) -> None:
    check(device, torch.float32, qkv(5, 1, 136, 1))


@pytest.mark.parametrize(("nq", "nk"), [(1, 40), (40, 7)])
def test_cross_attention(device: torch.device, nq: int, nk: int, dtype: torch.dtype) -> None:
    check(device, dtype, qkv(nq, nk=nk))


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scale(device: torch.device, scale: float) -> None:
    check(device, torch.float32, qkv(20), scale=scale)


def test_layouts(device: torch.device) -> None:
    """Heads outermost, and a last dimension with a stride."""
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(20)]
    check(device, torch.float32, heads_first)
    check(device, torch.float32, [nasty.strided(t, "transposed") for t in qkv(20)])


@pytest.mark.parametrize("shape", [(2, 2, 37, 37), (1, 2, 37, 37), (37, 37), (2, 1, 1, 37)])
def test_bias(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(device, dtype, qkv(37), bias=noise(*shape))


@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.float32, -1e30),
        (torch.float32, torch.finfo(torch.float32).min),
        (torch.bfloat16, -1e30),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_least_float_masks_a_key_but_not_a_row(
    device: torch.device, dtype: torch.dtype, least: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it the log of the sum of a row's weights vanishes."""
    if not whole:
        monkeypatch.setattr(attention_backward, "_WHOLE", 0)
    bias = noise(37, 37)
    bias[5], bias[6, 3:], bias[7] = least, least, float("-inf")
    out = check(device, dtype, qkv(37), bias=bias)
    assert out[:, 5].any()
    assert not out[:, 7].any()


@pytest.mark.parametrize("size", [10.0, 100.0])
def test_large_logits(device: torch.device, size: float) -> None:
    """Of 1e3 and 1e5: rounded to float32, the log of a row's sum is off by as much as its weights would be."""
    q, k, v = (t.float() for t in qkv(70, head_dim=64))
    operands = [q * size, k * size, v]
    truth, eager = (_run(reference.attention, t, "cpu", operands, {}) for t in (torch.float64, torch.float32))
    with ops.use_backend("triton"):
        actual = _run(ops.attention, torch.float32, device, operands, {})
    assert_close(actual[3].cpu(), truth[3])
    # Beyond, one key has all of a row's weight, and p (dp - delta) cancels to the rounding of delta.
    if size == 10.0:
        for mine, exact, plain in zip(actual[1:3], truth[1:3], eager[1:3], strict=True):
            assert relative_l2(mine.cpu(), exact) <= LOW_PRECISION_RATIO * relative_l2(plain, exact)


def test_key_mask(device: torch.device, dtype: torch.dtype) -> None:
    """Padding behind, a hole in front wider than a block, and an image without any key."""
    mask = torch.ones(3, 90, dtype=torch.bool)
    mask[0, 50:] = False
    mask[1, :85] = False
    mask[2] = False
    out = check(device, dtype, qkv(4, batch=3, nk=90), key_mask=mask)
    assert not out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[18], [33, 0, 1, 40, 16]])
def test_packed_sequences(device: torch.device, lengths: list[int], dtype: torch.dtype) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out = check(device, dtype, [t[0] for t in qkv(sum(lengths), batch=1)], cu_seqlens=bounds)
    assert out.shape == (sum(lengths), 64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rope(device: torch.device, prefix: int, interleaved: bool) -> None:
    check(device, torch.float32, qkv(21, head_dim=20), rope=angles(21 - prefix, 20), rope_interleaved=interleaved)


def test_gradients_by_tables_that_are_halves_of_one_tensor(device: torch.device) -> None:
    operands = [t.to(device, torch.float32).requires_grad_() for t in qkv(21, head_dim=40)]
    halves = torch.cat(angles(16, 40), -1).to(device, torch.float32).chunk(2, -1)
    with ops.use_backend("triton"):
        results = [
            torch.autograd.grad(ops.attention(*operands, rope=rope).square().sum(), operands)
            for rope in (halves, tuple(t.contiguous() for t in halves))
        ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_qk_norm_and_rope(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    vectors = {"q_norm_weight": 1.0, "k_norm_weight": 1.0}
    if kind == "layer":
        vectors |= {"q_norm_bias": 0.0, "k_norm_bias": 0.0}
    parameters = {name: nasty.vector(40, seed=i, mean=mean) for i, (name, mean) in enumerate(vectors.items())}
    check(device, dtype, qkv(26, head_dim=40), qk_norm=kind, rope=angles(25, 40), **parameters)


def test_qk_norm_without_parameters(device: torch.device) -> None:
    check(device, torch.float32, qkv(7, head_dim=40), qk_norm="layer", qk_norm_eps=1e-2)


@pytest.mark.parametrize("sides", [(5, 7), (3, 19)])
def test_decomposed_relative_positions(device: torch.device, sides: tuple[int, int], dtype: torch.dtype) -> None:
    n = sides[0] * sides[1]
    # The columns' with a stride, as a transposed product leaves it.
    columns = noise(2, 2, sides[1], n, seed=4).transpose(-1, -2)
    check(device, dtype, qkv(n), rel_pos=(noise(2, 2, n, sides[0]), columns))


@pytest.mark.parametrize("prefix", [0, 1])
def test_table(device: torch.device, prefix: int, dtype: torch.dtype) -> None:
    check(device, dtype, qkv(15 + prefix), bias_table=noise(5 * 9 + 3 * prefix, 2), grid=(3, 5))


def test_table_with_an_index(device: torch.device) -> None:
    index = torch.randint(40, (12, 20), generator=nasty.generator())
    check(device, torch.float32, qkv(12, nk=20), bias_table=noise(40, 2), bias_index=index)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
def test_windows(device: torch.device, shift: tuple[int, int], dtype: torch.dtype) -> None:
    """Swin: a table of the window, and a mask where the shifted image wraps."""
    options = {"grid": (8, 3), "window": (4, 3), "shift": shift}
    check(device, dtype, qkv(24), bias_table=noise(7 * 5, 2), **options)


def test_windows_with_bias(device: torch.device) -> None:
    options = {"grid": (4, 6), "window": (4, 3), "shift": (1, 2)}
    check(device, torch.float32, qkv(24), bias=noise(2, 12, 12), **options)


def test_dropout(device: torch.device, dtype: torch.dtype) -> None:
    seed = torch.tensor([2**40 + 17])
    check(device, dtype, qkv(37), dropout_p=0.3, dropout_seed=seed)
    dropped = {"dropout_p": 0.5, "dropout_seed": seed}
    check(
        device, torch.float16, [t[0] for t in qkv(50, batch=1)], cu_seqlens=torch.tensor([0, 33, 50]).int(), **dropped
    )
    check(device, torch.float32, qkv(24), grid=(4, 6), window=(4, 3), shift=(1, 0), **dropped)


def test_autocast(device: torch.device) -> None:
    q, k, v = (t.float().to(device).requires_grad_() for t in qkv(20))
    with torch.autocast(device.type, torch.bfloat16), ops.use_backend("triton"):
        out = ops.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    gradient = torch.ones_like(out)
    mine = torch.autograd.grad(out, (q, k, v), gradient)
    exact = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    truth = torch.autograd.grad(reference.attention(*exact), exact, gradient.double().cpu())
    low = [t.detach().bfloat16().cpu().requires_grad_() for t in (q, k, v)]
    eager = torch.autograd.grad(reference.attention(*low), low, gradient.cpu())
    for a, t, e in zip(mine, truth, eager, strict=True):
        assert a.dtype == torch.float32
        assert_close(a.cpu(), t, eager=e)


def test_gradients_are_the_same_each_time(device: torch.device) -> None:
    operands = [t.float().to(device).requires_grad_() for t in (*qkv(15), noise(5 * 9, 2))]
    with ops.use_backend("triton"):
        out = ops.attention(*operands[:3], bias_table=operands[3], grid=(3, 5))
    first, second = (torch.autograd.grad(out, operands, torch.ones_like(out), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:Input #")  # no double precision
def test_gradcheck(device: torch.device) -> None:
    """Against finite differences of the kernels themselves, along a random direction."""
    shapes = [(1, 17, 2, 32)] * 3 + [(2, 17, 17)]
    operands = [noise(*shape, seed=i).float().mul(0.5).to(device).requires_grad_() for i, shape in enumerate(shapes)]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.attention(q, k, v, bias=bias, qk_norm="rms", scale=0.3)

    with ops.use_backend("triton"):
        assert torch.autograd.gradcheck(run, operands, eps=1e-2, atol=1e-5, rtol=5e-3, fast_mode=True)


def test_only_gradients_that_are_needed(device: torch.device) -> None:
    q, k, v = (t.float().to(device) for t in qkv(20))
    bias = noise(20, 20).float().to(device)
    with ops.use_backend("triton"):
        out = ops.attention(q, k.requires_grad_(), v, bias=bias)
    out.sum().backward()
    assert k.grad is not None and q.grad is None and bias.grad is None


def test_compiled_training_step(device: torch.device) -> None:
    """Forward and backward kernels are both operators: nothing of them is traced."""
    operands = [t.float().to(device).requires_grad_() for t in (*qkv(12), noise(2, 12, 12))]

    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ops.attention(q, k, v, bias=bias, qk_norm="layer").square().sum()

    with ops.use_backend("triton"):
        expected = torch.autograd.grad(step(*operands), operands)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*operands), operands)
    for mine, truth in zip(actual, expected, strict=True):
        assert_close(mine, truth.double())


def test_opcheck(device: torch.device) -> None:
    operands = [t.float().to(device).requires_grad_() for t in qkv(5)]
    bias = noise(2, 5, 5).float().to(device)
    rest = (None,) * 4 + (False, "none") + (None,) * 4 + (1e-6,) + (None,) * 6 + ([0, 0], 0.0, None, True, None)
    with ops.use_backend("triton"):
        torch.library.opcheck(torch.ops.fastvit.attention.default, (*operands, 0.3, bias, *rest))
        operands = [t.detach() for t in operands]
        out, softmax = torch.ops.fastvit.attention(*operands, 0.3, bias, *rest)
        wanted = [True, False, True, True] + [False] * 7
        arguments = (torch.ones_like(out), out, softmax, *operands, 0.3, bias, *rest, wanted)
        torch.library.opcheck(torch.ops.fastvit.attention_backward.default, arguments)
