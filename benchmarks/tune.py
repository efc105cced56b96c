"""Which schedule runs each product fastest on this GPU, measured and written to kernels/choices.json.

    python -m benchmarks.tune [--minutes 5] [--output FILE]
    python -m benchmarks.tune --dry-run     the same script without a GPU: tiny shapes in Triton's interpreter

Every schedule that can run a product is measured in turn with the others (A B C A B C ...), after its result was
compared with the first one's.  Products come in the order of what most people run, until the time is spent; what an
earlier run has measured is kept where this one does not reach.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.case import tensor
from fastvit.bench.timing import interleaved

# Relative L2 between two schedules' results in bfloat16, above which one of them is wrong.
_AGREEMENT = 0.02


class Product(NamedTuple):
    """norm_linear or linear_residual of `m` rows, (m, k) to (m, n), or mlp, (m, k) to hidden (m, n) to (m, k)."""

    operator: str
    epilogue: str
    m: int
    n: int
    k: int


def products(dry: bool) -> Iterator[Product]:
    """The four products of a block at the usual widths, at the usual numbers of rows; of narrow ones also the MLP."""
    from fastvit.kernels import mlp

    if dry:
        yield Product("norm_linear", "layer gelu", 40, 48, 32)
        yield Product("linear_residual", "residual", 40, 32, 48)
        yield Product("mlp", "layer gelu", 40, 48, 32)
        return
    for images in (256, 32, 1, 8):
        m = 197 * images
        for dim, hidden, activation in (
            (768, 3072, "gelu"),
            (1024, 4096, "gelu"),
            (384, 1536, "gelu"),
            (1152, 4304, "gelu_tanh"),
            (1280, 5120, "gelu"),
            (192, 768, "gelu"),
        ):
            yield Product("norm_linear", f"layer {activation}", m, hidden, dim)
            yield Product("linear_residual", "residual", m, dim, hidden)
            yield Product("norm_linear", "layer none", m, 3 * dim, dim)
            yield Product("linear_residual", "residual", m, dim, dim)
            if dim <= mlp.FUSED_WIDTH:
                yield Product("mlp", f"layer {activation}", m, hidden, dim)


def candidates(product: Product, device: str) -> dict[str, Callable[[], Tensor]]:
    """The product by each of its schedules, those that give the same result."""
    from fastvit.kernels import choices, linear_residual, mlp, norm_linear

    make = partial(tensor, dtype=torch.bfloat16, device=device)
    x, weight = make(product.m, product.k, seed=0), make(product.n, product.k, seed=1, scale=product.k**-0.5)
    bias, gamma, beta = make(product.n, seed=2), make(product.k, seed=3, mean=1.0), make(product.k, seed=4)
    residual = make(product.m, product.n, seed=5)
    fc2_weight, fc2_bias = make(product.k, product.n, seed=6, scale=product.n**-0.5), make(product.k, seed=7)

    def run(schedule: str) -> Tensor:
        with choices.force(schedule):
            if product.operator == "linear_residual":
                return linear_residual.linear_residual(x, weight, bias, residual=residual)
            norm, activation = product.epilogue.split()
            normed = {"norm": norm, "norm_weight": gamma, "norm_bias": beta, "eps": 1e-6, "activation": activation}
            if product.operator == "norm_linear":
                return norm_linear.norm_linear(x, weight, bias, **normed)
            return mlp.mlp(x, weight, bias, fc2_weight, fc2_bias, **normed, layer_scale=None, drop_path=None)

    schedules = {"norm_linear": norm_linear, "linear_residual": linear_residual, "mlp": mlp}[product.operator].SCHEDULES
    expected = run(schedules[0]).float()
    calls: dict[str, Callable[[], Tensor]] = {}
    for schedule in schedules:
        try:
            error = ((run(schedule).float() - expected).norm() / expected.norm()).item()
        except Exception as failure:  # one schedule's trouble must not cost the others their measurement
            print(f"  {schedule} failed: {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            continue
        if error <= _AGREEMENT:
            calls[schedule] = partial(run, schedule)
        else:
            print(f"  {schedule} is wrong: relative L2 {error:.1e}", flush=True)
    return calls


def measure(product: Product, device: str, seconds: float) -> dict[str, float]:
    """Median milliseconds by schedule."""
    calls = candidates(product, device)
    times, _ = interleaved(calls, dtype=torch.bfloat16, device=device, seconds=seconds)
    return {schedule: 1e3 * median(values) for schedule, values in times.items()}


def tune(path: Path, device: str, deadline: float, dry: bool) -> int:
    """Measure until the deadline, writing after each product; how many were measured."""
    from fastvit.kernels import choices
    from fastvit.kernels.launch import arch

    table = json.loads(path.read_text()) if path.exists() else {}
    mine = table.setdefault(arch(torch.device(device)), {})
    count = 0
    for product in products(dry):
        if time.time() > deadline:
            break
        with torch.inference_mode():
            milliseconds = measure(product, device, 0.02 if dry else 1.0)
        best = min(milliseconds, key=lambda schedule: milliseconds[schedule])
        name = choices.key(product.operator, torch.bfloat16, product.epilogue, product.n, product.k)
        mine.setdefault(name, {})[str(choices.bucket(product.m))] = best
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        ratios = "  ".join(f"{s} {ms / milliseconds[best]:.2f}x" for s, ms in milliseconds.items() if s != best)
        print(f"{name} m={product.m}: {best} {milliseconds[best]:.3f} ms  {ratios}", flush=True)
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="when to stop (default: 5)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter, without a GPU")
    parser.add_argument("--output", type=Path, help="a file (default: kernels/choices.json; of a dry run, none)")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported, and torch imports Triton
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.tune", *sys.argv[1:]])
        from tests.kernels import interpreter

        interpreter.use()
    elif not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand; --dry-run proves the script without one")
    from fastvit.kernels.choices import PATH

    path = arguments.output or (Path(tempfile.mkdtemp()) / "choices.json" if arguments.dry_run else PATH)
    device = "cpu" if arguments.dry_run else "cuda"
    count = tune(path, device, time.time() + 60 * arguments.minutes, arguments.dry_run)
    print(f"{count} products measured; written: {path}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
