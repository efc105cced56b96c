"""Calls of every Triton launcher, on meta tensors: each kernel at the shapes of real models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fastvit.kernels import choices
from fastvit.kernels.attention import attention
from fastvit.kernels.attention_backward import attention_backward
from fastvit.kernels.attention_call import Call
from fastvit.kernels.attention_prologue import prologue, prologue_backward
from fastvit.kernels.launch import ARCHS
from fastvit.kernels.linear_residual import SCHEDULES as RESIDUAL_SCHEDULES
from fastvit.kernels.linear_residual import linear_residual, linear_residual_backward
from fastvit.kernels.mlp import mlp, mlp_backward
from fastvit.kernels.norm_linear import SCHEDULES as NORM_SCHEDULES
from fastvit.kernels.norm_linear import norm_linear, norm_linear_backward
from fastvit.kernels.patch_embed import patch_embed, unfold
from fastvit.kernels.pool import pool
from torch import Tensor

from fastvit.ops.attention import softmax_numbers

# Their names in Triton's signatures.
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}


class Case(NamedTuple):
    """A call of a launcher on meta tensors."""

    operator: str
    label: str
    dtype: torch.dtype
    call: Callable[[], Any]
    archs: tuple[str, ...] = ARCHS


def cases() -> Iterator[Case]:
    """Every kernel, every tile of its table and every compile-time feature, at the shapes of real models."""
    yield from _attention_cases()
    yield from _norm_linear_cases()
    yield from _linear_residual_cases()
    yield from _mlp_cases()
    yield from _backward_cases()
    yield from _patch_embed_cases()
    yield from _pool_cases()


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention_cases() -> Iterator[Case]:
    def case(
        label: str, n: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, *, nq: int | None = None,
        bias: bool = False, tf32: bool = False, archs: tuple[str, ...] = ARCHS, backward: bool = False, **options: Any,
    ) -> Case:  # fmt: skip
        def call() -> None:
            batch = 1 if "cu_seqlens" in options else 64
            q, k, v = _meta(batch, n, 3, heads, head_dim, dtype=dtype).unbind(2)
            q = q if nq is None else _meta(64, nq, heads, head_dim, dtype=dtype)
            arguments = dict(options)
            if bias:
                arguments["bias"] = _meta(heads, q.shape[1], n, dtype=dtype)
            with _matmul_precision("high" if tf32 else "highest"):
                if not backward:
                    attention(q, k, v, **arguments)
                    return
                softmax = _meta(
                    softmax_numbers(bias, dtype), *Call(q, k, v, **arguments).row_shape, dtype=torch.float32
                )
                out = _meta(*q.shape[:2], heads * head_dim, dtype=dtype)
                index = _meta(*softmax.shape[3:] * 2, dtype=torch.int64) if "bias_table" in options else None
                attention_backward(
                    q, k, v, out, torch.empty_like(out), softmax, bias_needs_grad=bias, table_index=index, **arguments
                )

        operator = "attention backward" if backward else "attention"
        return Case(operator, f"{label}, N={n}, D={head_dim}", dtype, call, archs)

    # Every chunking of the short path, then its longest rows at every other width.
    short = ("sm90", "sm100")
    for n in (10, 25, 50, 77, 101, 144, 190, 197, 256, 257):
        yield case("short", n, 12, 64, archs=short)
    for n, head_dim in ((197, 88), (101, 128)):
        yield case("short", n, 16, head_dim, archs=short)
    yield case("short", 257, 12, 64, torch.float16, archs=short)
    for head_dim in (64, 96):
        yield case("short with bias", 101, 12, head_dim, bias=True, archs=short)
    # Every tile of the streaming path, then both blocks of a tail.
    for head_dim in (64, 88, 128, 256):
        yield case("long", 577, 12, head_dim)
        yield case("long with bias", 577, 12, head_dim, bias=True)
    for head_dim in (64, 104, 256):
        for tf32 in (False, True):
            yield case("long with bias", 577, 12, head_dim, torch.float32, bias=True, tf32=tf32)
    yield case("long, one query", 577, 12, 64, nq=1)
    yield case("long", 730, 16, 72)
    # Backward: every tile, in one program per head and in kernels for queries and keys.
    for head_dim in (64, 88, 128):
        yield case("whole", 197, 12, head_dim, backward=True)
        yield case("split with bias", 577, 12, head_dim, bias=True, backward=True)
    for head_dim in (64, 104):
        for tf32 in (False, True):
            yield case("split with bias", 577, 12, head_dim, torch.float32, bias=True, tf32=tf32, backward=True)
    # What changes a logit, and which rows are read.
    swin = {"grid": (56, 56), "window": (7, 7), "shift": (3, 3), "bias_table": _meta(169, 12)}
    beit = {"grid": (24, 24), "bias_table": _meta(2212, 12)}
    sam = {"rel_pos_h": _meta(64, 12, 4096, 64), "rel_pos_w": _meta(64, 12, 4096, 64)}
    seed = {"dropout_p": 0.1, "dropout_seed": _meta(1, dtype=torch.int64)}
    packed = {"cu_seqlens": _meta(33, dtype=torch.int32)}
    for label, n, options in (
        ("Swin window", 3136, swin), ("BEiT table", 577, beit), ("SAM rel_pos", 4096, sam), ("dropout", 577, seed),
        ("packed", 8192, packed), ("key mask", 577, {"key_mask": _meta(64, 577, dtype=torch.bool)}),
    ):  # fmt: skip
        for backward in (False, True):
            yield case(label, n, 12, 64, backward=backward, **options)

    # q and k normalised and rotated as they are loaded, in both kernels: every style, every padding of a half.
    def prepared(
        label: str, n: int, head_dim: int, norm: str = "layer", rope: str = "half",
        dtype: torch.dtype = torch.bfloat16, **options: Any,
    ) -> Case:  # fmt: skip
        weight = None if norm == "none" else _meta(head_dim, dtype=dtype)
        bias = weight if norm == "layer" else None
        table = _meta(n - 5, head_dim, dtype=torch.float32)
        return case(
            f"{label}, norm {norm}, RoPE {rope}", n, 12, head_dim, dtype, qk_norm=norm, q_norm_weight=weight,
            q_norm_bias=bias, k_norm_weight=weight, k_norm_bias=bias, rope=None if rope == "none" else (table, table),
            rope_interleaved=rope == "interleaved", **options,
        )  # fmt: skip

    for n, head_dim in ((201, 64), (144, 72), (144, 80), (201, 80), (144, 96), (128, 128), (261, 64), (77, 64)):
        for rope in ("half", "interleaved"):
            yield prepared("prepared", n, head_dim, "layer", rope)
    for norm, rope in (("none", "half"), ("none", "interleaved"), ("rms", "half"), ("rms", "interleaved")):
        yield prepared("prepared", 201, 64, norm, rope)
    for head_dim in (64, 128):
        yield prepared("prepared", 201, head_dim, "layer", "none")
    for head_dim in (64, 72, 104, 128):
        yield prepared("prepared packed", 4096, head_dim, cu_seqlens=_meta(33, dtype=torch.int32))
    for tf32 in (False, True):
        yield prepared("prepared", 101, 64, "layer", "interleaved", torch.float32, tf32=tf32)
        yield prepared("prepared", 101, 104, "layer", "half", torch.float32, tf32=tf32)
    yield prepared("prepared with bias", 101, 64, bias=True)
    for head_dim in (64, 80):
        yield Case("attention prologue", f"LayerNorm and RoPE, D={head_dim}", torch.bfloat16, _prologue(head_dim))


def _prologue(head_dim: int) -> Callable[[], None]:
    def call() -> None:
        q = _meta(64, 201, 3, 12, head_dim)[:, :, 0]
        vector, table = _meta(head_dim), _meta(196, head_dim, dtype=torch.float32)
        options = {"norm": "layer", "weight": vector, "bias": vector, "rope": (table, table)}
        prologue(q, **options)
        prologue_backward(_meta(64, 201, 12, head_dim), q, **options)

    return call


def _norm_linear_cases() -> Iterator[Case]:
    def case(
        label: str, batch: int, k: int, features: int, dtype: torch.dtype = torch.bfloat16, *, norm: str = "layer",
        activation: str = "none", x_dtype: torch.dtype | None = None, tf32: bool = False, schedule: str | None = None,
        archs: tuple[str, ...] = ARCHS,
    ) -> Case:  # fmt: skip
        def call() -> None:
            x = _meta(batch, 197, k, dtype=x_dtype or dtype)
            vector = None if norm == "none" else _meta(k, dtype=torch.float32)
            with _matmul_precision("high" if tf32 else "highest"), _schedule(schedule):
                norm_linear(
                    x,
                    _meta(features, k, dtype=dtype),
                    _meta(features, dtype=dtype),
                    norm=norm,
                    norm_weight=vector,
                    norm_bias=vector if norm == "layer" else None,
                    activation=activation,
                )

        how = "" if schedule is None else f", {schedule}"
        return Case("norm_linear", f"{label}, M={batch * 197}{how}", dtype, call, archs)

    # What choices.json may ask for beside the kernel's own rule.
    for schedule in NORM_SCHEDULES:
        yield case("FC1 GELU", 256, 768, 3072, activation="gelu", schedule=schedule)
    yield case("SwiGLU", 256, 1408, 6144, norm="rms", activation="swiglu", schedule="normalising")
    for batch in (1, 32, 256):
        yield case("FC1 GELU", batch, 768, 3072, activation="gelu")
        yield case("SwiGLU", batch, 1408, 6144, norm="rms", activation="swiglu")
    # The persistent product's registers leave no room: every epilogue.
    for activation in ("none", "gelu_tanh", "quick_gelu", "silu", "relu"):
        yield case(f"FC1 {activation}", 256, 768, 3072, activation=activation, archs=("sm90", "sm100"))
    yield case("FC1 GELU, x fp32", 256, 768, 3072, activation="gelu", x_dtype=torch.float32)
    yield case("FC1 tanh GELU", 256, 768, 3072, torch.float16, activation="gelu_tanh")
    yield case("no norm, K=2730", 256, 2730, 1024, norm="none")
    for tf32 in (False, True):
        yield case("FC1 GELU", 256, 768, 3072, torch.float32, activation="gelu", tf32=tf32)
        yield case("SwiGLU", 256, 1408, 6144, torch.float32, activation="swiglu", tf32=tf32)


def _linear_residual_cases() -> Iterator[Case]:
    def case(
        label: str, batch: int, k: int, n: int, dtype: torch.dtype, residual: torch.dtype, tf32: bool = False,
        schedule: str | None = None, scaled: bool = True, archs: tuple[str, ...] = ARCHS,
    ) -> Case:  # fmt: skip
        def call() -> None:
            with _matmul_precision("high" if tf32 else "highest"), _schedule(schedule):
                linear_residual(
                    _meta(batch, 197, k, dtype=dtype),
                    _meta(n, k, dtype=dtype),
                    _meta(n, dtype=dtype),
                    residual=_meta(batch, 197, n, dtype=residual),
                    layer_scale=_meta(n, dtype=torch.float32) if scaled else None,
                    drop_path=_meta(batch, dtype=torch.float32) if scaled else None,
                )

        how = "" if schedule is None else f", {schedule}"
        return Case("linear_residual", f"{label}, M={batch * 197}{how}", dtype, call, archs)

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for schedule in RESIDUAL_SCHEDULES:
        yield case("FC2", 256, 3072, 768, bf16, bf16, schedule=schedule)
        yield case("FC2, residual fp32", 256, 3072, 768, bf16, f32, schedule=schedule)
    for batch in (2, 32):
        yield case("FC2", batch, 3072, 768, bf16, bf16)
    # The persistent product's registers leave no room: every epilogue.
    for dtype, residual in ((bf16, bf16), (bf16, f32), (f16, f16), (f16, f32)):
        for scaled in (False, True):
            label = f"FC2{'' if scaled else ' unscaled'}, residual {TYPES[residual]}"
            yield case(label, 256, 3072, 768, dtype, residual, scaled=scaled, archs=("sm90", "sm100"))
    for tf32 in (False, True):
        yield case("FC2", 256, 3072, 768, f32, f32, tf32)


def _mlp_cases() -> Iterator[Case]:
    def case(
        d: int, hidden: int, dtype: torch.dtype = torch.bfloat16, *, activation: str = "gelu", norm: str = "layer",
        x_dtype: torch.dtype | None = None,
    ) -> Case:  # fmt: skip
        def call() -> None:
            vector, bias = _meta(d, dtype=torch.float32), _meta(d, dtype=dtype)
            with choices.force("fused"):
                mlp(
                    _meta(256, 197, d, dtype=x_dtype or dtype),
                    _meta(hidden, d, dtype=dtype),
                    _meta(hidden, dtype=dtype),
                    _meta(d, hidden, dtype=dtype),
                    bias,
                    norm=norm,
                    norm_weight=vector,
                    norm_bias=vector if norm == "layer" else None,
                    eps=1e-6,
                    activation=activation,
                    layer_scale=vector,
                    drop_path=_meta(256, dtype=torch.float32),
                )

        return Case("mlp", f"fused, {norm} {activation}, D={d}, H={hidden}, x {TYPES[x_dtype or dtype]}", dtype, call)

    # The registers leave no room: every activation, the widest rows.
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu"):
        yield case(192, 768, activation=activation)
    yield case(192, 768, torch.float16)
    yield case(192, 768, x_dtype=torch.float32)
    for d in (64, 256):
        yield case(d, 4 * d)
    yield case(192, 776, norm="rms")


def _backward_cases() -> Iterator[Case]:
    def linear(k: int, dtype: torch.dtype, residual: torch.dtype) -> Case:
        def call() -> None:
            x, weight, grad = (
                _meta(64, 197, k, dtype=dtype),
                _meta(768, k, dtype=dtype),
                _meta(64, 197, 768, dtype=residual),
            )
            vector, factors = _meta(768, dtype=torch.float32), _meta(64, dtype=torch.float32)
            linear_residual_backward(
                grad, x, weight, _meta(768, dtype=dtype), layer_scale=vector, drop_path=factors, needs=(True,) * 4
            )

        return Case("linear_residual", f"backward, K={k}, residual {TYPES[residual]}", dtype, call)

    def norm(k: int, dtype: torch.dtype, x_dtype: torch.dtype, norm: str, activation: str = "none") -> Case:
        def call() -> None:
            x, weight = _meta(64, 197, k, dtype=x_dtype), _meta(1536, k, dtype=dtype)
            features = 768 if activation == "swiglu" else 1536
            vector = _meta(k, dtype=torch.float32)
            norm_linear_backward(
                _meta(64, 197, features, dtype=dtype),
                x,
                weight,
                _meta(1536, dtype=dtype),
                norm=norm,
                norm_weight=vector,
                norm_bias=vector if norm == "layer" else None,
                eps=1e-6,
                activation=activation,
                needs=(True,) * 5,
            )

        return Case("norm_linear", f"backward, {norm} {activation}, K={k}, x {TYPES[x_dtype]}", dtype, call)

    def both(d: int, dtype: torch.dtype, activation: str) -> Case:
        def call() -> None:
            wide = 8 * d if activation == "swiglu" else 4 * d
            x, fc1, fc2 = _meta(64, 197, d, dtype=dtype), _meta(wide, d, dtype=dtype), _meta(d, 4 * d, dtype=dtype)
            vector, factors = _meta(d, dtype=torch.float32), _meta(64, dtype=torch.float32)
            options = {
                "norm": "layer", "norm_weight": vector, "norm_bias": vector, "eps": 1e-6, "activation": activation,
                "layer_scale": vector, "drop_path": factors,
            }  # fmt: skip
            bias, pre = _meta(d, dtype=dtype), _meta(64 * 197, wide, dtype=dtype)
            mlp(x, fc1, _meta(wide, dtype=dtype), fc2, bias, **options, pre=pre)
            mlp_backward(_meta(64, 197, d, dtype=dtype), pre, x, fc1, fc2, bias, **options, needs=(True,) * 8)

        return Case("mlp", f"training, {activation}, D={d}", dtype, call)

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    yield linear(768, bf16, bf16)
    yield linear(3072, bf16, f32)
    yield linear(768, f32, f32)
    for k in (384, 1408, 4096):
        yield norm(k, bf16, bf16, "layer")
    yield norm(768, bf16, f32, "rms")
    yield norm(1408, f32, f32, "layer")
    for activation in ("gelu_tanh", "quick_gelu"):
        yield norm(768, f16, f16, "layer", activation)
    for activation in ("gelu", "swiglu"):
        yield norm(768, f32, f32, "layer", activation)
        yield norm(768, bf16, bf16, "layer", activation)
        yield both(768, bf16, activation)


def _patch_embed_cases() -> Iterator[Case]:
    def case(
        label: str, batch: int, patch: int, dtype: torch.dtype = torch.bfloat16, *, uint8: bool = False,
        channels_last: bool = False, tf32: bool = False,
    ) -> Case:  # fmt: skip
        def call() -> None:
            image = _meta(batch, 3, 224, 224, dtype=torch.uint8 if uint8 else dtype)
            if channels_last:
                image = image.to(memory_format=torch.channels_last)
            numbers = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} if uint8 else {}
            with _matmul_precision("high" if tf32 else "highest"):
                patch_embed(
                    image,
                    _meta(768, 3, patch, patch, dtype=dtype),
                    _meta(768, dtype=dtype),
                    pos_embed=_meta(1, (224 // patch) ** 2, 768, dtype=dtype),
                    prefix=_meta(5, 768, dtype=dtype),
                    **numbers,
                )

        return Case("patch_embed", f"{label}, P={patch}, B={batch}", dtype, call)

    def backward(patch: int, dtype: torch.dtype, image_dtype: torch.dtype) -> Case:
        def call() -> None:
            numbers = (0.5, 0.5, 0.5)
            unfold(_meta(64, 3, 224, 224, dtype=image_dtype), patch, patch, numbers, numbers, dtype)

        return Case("patch_embed", f"backward, P={patch}, image {TYPES[image_dtype]}", dtype, call)

    yield backward(16, torch.bfloat16, torch.bfloat16)
    yield backward(14, torch.bfloat16, torch.uint8)
    yield backward(16, torch.float32, torch.float32)
    for batch in (1, 256):
        yield case("NCHW", batch, 16)
        yield case("NHWC uint8", batch, 14, uint8=True, channels_last=True)
    yield case("NCHW", 256, 14)
    for tf32 in (False, True):
        yield case("NCHW", 256, 16, torch.float32, tf32=tf32)
        yield case("NHWC uint8", 256, 14, torch.float32, uint8=True, channels_last=True, tf32=tf32)


def _pool_cases() -> Iterator[Case]:
    def case(mode: str, norm: str, dim: int, dtype: torch.dtype) -> Case:
        def call() -> None:
            vector = _meta(dim, dtype=dtype)
            norm_bias = vector if norm == "layer" else None
            pool(
                _meta(64, 197, dim, dtype=dtype),
                mode=mode,
                norm=norm,
                norm_weight=vector,
                norm_bias=norm_bias,
                weight=_meta(1000, dim, dtype=dtype),
                bias=_meta(1000, dtype=dtype),
            )

        return Case("pool", f"{mode} {norm}, D={dim}", dtype, call)

    for mode in ("token", "avg", "norm_avg"):
        yield case(mode, "layer", 768, torch.bfloat16)
    for dim in (192, 1408):
        yield case("norm_avg", "layer", dim, torch.float32)


def _schedule(name: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name is None else choices.force(name)


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
