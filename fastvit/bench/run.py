"""What `fastvit bench`, `check` and `attention` measure, as data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.adapters import Report, optimize, report
from fastvit.adapters.compare import difference, tensors
from fastvit.bench import DTYPES, Progress, UsageError, passes
from fastvit.bench.image import load
from fastvit.bench.models import build, needed_flops, randomize, try_forward
from fastvit.bench.timing import paired
from fastvit.ops import attention


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, DTYPES[name])


def _silent(_: str, __: float) -> None:
    pass


@dataclass(frozen=True)
class BenchRow:
    """Eager PyTorch against fastvit for one dtype and batch size."""

    model: str
    dtype: str
    batch: int
    threads: int
    rounds: int
    eager_images_per_second: float
    fastvit_images_per_second: float
    speedup: float
    fraction_of_peak: float | None
    peak_gflops: float | None
    eager_error: float
    fastvit_error: float

    @property
    def limit_images_per_second(self) -> float | None:
        """Images per second if every operation ran at the machine's measured peak."""
        return self.fastvit_images_per_second / self.fraction_of_peak if self.fraction_of_peak else None


def bench(
    name: str,
    *,
    library: str = "auto",
    batches: Sequence[int] = (8,),
    dtypes: Sequence[str] = ("f32", "bf16"),
    image: Path | None = None,
    seconds: float = 30.0,
    device: str = "cpu",
    cuda_graphs: bool = False,
    progress: Progress = _silent,
) -> list[BenchRow]:
    """Measure a model on a photograph; weights are random with a fixed seed.

    Args:
        cuda_graphs: as in `fastvit.optimize`.
        seconds: measuring time over all rows, warming up included and the float64 truth not.
        progress: told (what is being done, fraction done).
    """
    progress(f"building {name}", 0.0)
    torch.manual_seed(0)
    model, size = build(name, library)
    pictures = load(image, max(batches), size)
    progress("float64 truth", 0.02)
    with torch.inference_mode():
        truth = _first(try_forward(copy.deepcopy(model).double(), pictures[:1].double(), name))
    flops = needed_flops(model, pictures[:1])
    if not report(optimize(copy.deepcopy(model))).replaced:
        raise UsageError(
            f"{name}: fastvit found no Vision Transformer block to replace (fastvit check {name} says why)"
        )
    rows = []
    share = seconds / (len(batches) * len(dtypes))
    for i, (dtype_name, batch) in enumerate((d, b) for d in dtypes for b in batches):
        dtype = _dtype(dtype_name)
        eager = copy.deepcopy(model).to(device, dtype)
        fast = optimize(copy.deepcopy(eager), cuda_graphs=cuda_graphs)
        x = pictures[:batch].to(device, dtype)
        title = f"{name} {dtype_name} batch {batch}"

        def step(done: float, title: str = title, i: int = i) -> None:
            progress(title, 0.05 + 0.95 * (i + done) / (len(batches) * len(dtypes)))

        step(0.0)
        with torch.inference_mode():
            errors = [difference("", _first(m(x[:1])).cpu(), truth).relative_l2 for m in (eager, fast)]
            measured = paired(
                partial(eager, x),
                partial(fast, x),
                dtype=dtype,
                device=device,
                seconds=share,
                on_round=step,
            )
        rate = batch / measured.candidate_seconds
        rows.append(
            BenchRow(
                model=name,
                dtype=dtype_name,
                batch=batch,
                threads=torch.get_num_threads(),
                rounds=measured.rounds,
                eager_images_per_second=batch / measured.baseline_seconds,
                fastvit_images_per_second=rate,
                speedup=measured.speedup,
                fraction_of_peak=rate * flops / measured.peak if measured.peak else None,
                peak_gflops=measured.peak / 1e9 if measured.peak else None,
                eager_error=errors[0],
                fastvit_error=errors[1],
            )
        )
    progress("done", 1.0)
    return rows


def _first(output: Any) -> Tensor:
    """The first floating-point tensor of a model's output."""
    return next(iter(tensors(output).values()))


@dataclass(frozen=True)
class CheckRow:
    """One output tensor in one dtype, eager and fastvit against float64."""

    dtype: str
    output: str
    eager_error: float
    fastvit_error: float
    max_abs: float
    cosine: float

    @property
    def ratio(self) -> float:
        return self.fastvit_error / self.eager_error if self.eager_error else float(self.fastvit_error > 0.0)

    @property
    def passed(self) -> bool:
        return passes(self.dtype, self.fastvit_error, self.eager_error)


@dataclass(frozen=True)
class Check:
    rows: list[CheckRow]
    report: Report

    @property
    def passed(self) -> bool:
        return bool(self.report.replaced) and all(row.passed for row in self.rows)


def check(
    name: str,
    *,
    library: str = "auto",
    dtypes: Sequence[str] = ("f32", "bf16"),
    batch: int = 2,
    image_size: int | None = None,
    device: str = "cpu",
    progress: Progress = _silent,
) -> Check:
    """Numerical comparison of a model with random weights: float64 original as truth, eager and fastvit per dtype."""
    progress(f"building {name}", 0.0)
    torch.manual_seed(0)
    model, size = build(name, library, image_size)
    randomize(model)
    x = torch.randn(batch, *size)
    rows: list[CheckRow] = []
    result: Report | None = None
    for i, dtype_name in enumerate(dtypes):
        dtype = _dtype(dtype_name)
        progress(f"{name} {dtype_name}: eager", (i + 0.2) / (len(dtypes) + 0.2))
        low = copy.deepcopy(model).to(device, dtype)
        with torch.inference_mode():
            # The truth has the same rounded weights and image.
            inputs = x.to(device, dtype)
            truth = tensors(try_forward(copy.deepcopy(low).double(), inputs.double(), name))
            eager = tensors(low(inputs))
            progress(f"{name} {dtype_name}: fastvit", (i + 0.8) / (len(dtypes) + 0.2))
            fast = tensors(optimize(low)(inputs))
        result = report(low)
        for key, reference in truth.items():
            mine, theirs = difference(key, fast[key], reference), difference(key, eager[key], reference)
            rows.append(CheckRow(dtype_name, key, theirs.relative_l2, mine.relative_l2, mine.max_abs, mine.cosine))
    assert result is not None
    progress("done", 1.0)
    return Check(rows, result)


@dataclass(frozen=True)
class AttentionRow:
    """Fused attention against torch's scaled_dot_product_attention on packed qkv."""

    dtype: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    sdpa_milliseconds: float
    fastvit_milliseconds: float
    speedup: float
    fraction_of_peak: float | None
    sdpa_error: float
    fastvit_error: float


def bench_attention(
    *,
    tokens: Sequence[int] = (197, 577, 1370),
    heads: int = 12,
    head_dims: Sequence[int] = (64,),
    dtypes: Sequence[str] = ("f32", "bf16"),
    batch: int = 1,
    seconds: float = 12.0,
    device: str = "cpu",
    progress: Progress = _silent,
) -> list[AttentionRow]:
    """Measure attention from packed (B, N, 3, H, D) to (B, N, H * D), layout changes included on both sides."""
    cases = [(d, n, h) for d in dtypes for n in tokens for h in head_dims]
    rows = []
    for i, (dtype_name, n, head_dim) in enumerate(cases):
        dtype = _dtype(dtype_name)
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, n, 3, heads, head_dim, generator=generator).to(device, dtype)

        def sdpa(qkv: Tensor = qkv) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        def fused(qkv: Tensor = qkv) -> Tensor:
            return attention(*qkv.unbind(2))

        def step(done: float, i: int = i, title: str = f"N={n} D={head_dim} {dtype_name}") -> None:
            progress(title, (i + done) / len(cases))

        step(0.0)
        with torch.inference_mode():
            truth = sdpa(qkv.double())
            errors = [difference("", call(), truth).relative_l2 for call in (sdpa, fused)]
            measured = paired(sdpa, fused, dtype=dtype, device=device, seconds=seconds / len(cases), on_round=step)
        flops = 4 * batch * heads * n * n * head_dim
        rows.append(
            AttentionRow(
                dtype=dtype_name,
                batch=batch,
                tokens=n,
                heads=heads,
                head_dim=head_dim,
                sdpa_milliseconds=measured.baseline_seconds * 1e3,
                fastvit_milliseconds=measured.candidate_seconds * 1e3,
                speedup=measured.speedup,
                fraction_of_peak=flops / measured.candidate_seconds / measured.peak if measured.peak else None,
                sdpa_error=errors[0],
                fastvit_error=errors[1],
            )
        )
    progress("done", 1.0)
    return rows
