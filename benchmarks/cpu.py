"""Every operator and model against eager PyTorch on this CPU.

    python -m benchmarks.cpu [--seconds 1] [--only attention ...]

prints a table and writes cpu.json and cpu.png to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch

import fastvit
from benchmarks import (
    bench_attention,
    bench_linear_residual,
    bench_mlp,
    bench_model,
    bench_norm_linear,
    bench_patch_embed,
    bench_pool,
    bench_self_attention,
)
from benchmarks.case import BATCHES, Case, Row, measure
from fastvit._compat import import_library

RESULTS = Path(__file__).parent / "results"
BENCHMARKS: dict[str, ModuleType] = {
    "patch_embed": bench_patch_embed,
    "norm_linear": bench_norm_linear,
    "attention": bench_attention,
    "linear_residual": bench_linear_residual,
    "self_attention": bench_self_attention,
    "mlp": bench_mlp,
    "pool": bench_pool,
    "model": bench_model,
}


def cases(only: list[str] | None, device: str = "cpu") -> Iterator[Case]:
    for operator, module in BENCHMARKS.items():
        if only and operator not in only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for name in module.NAMES:
                for batch in BATCHES:
                    yield module.case(name, dtype, batch, device)


def line(row: Row) -> str:
    share = "-" if row.fraction_of_limit is None else f"{100 * row.fraction_of_limit:.0f} % of {row.limit}"
    return (
        f"{row.operator:<16}{row.name:<40}{row.dtype:<6}{row.eager_milliseconds:>10.3f}{row.fastvit_milliseconds:>10.3f}"
        f"{row.speedup:>8.2f}x  {share:<20}{row.eager_error:>9.1e}{row.fastvit_error:>9.1e}"
        f"{'' if row.passed else '  WRONG'}"
    )


def plot(rows: list[Row], path: Path, machine: str) -> None:
    """Speed-ups as horizontal bars, with the fraction of the limit beside each."""
    import_library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.27 * len(rows)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = {"f32": "#e4572e", "bf16": "#2e4057"}
    for i, row in enumerate(rows):
        axes.barh(i, row.speedup, 0.72, color=colors[row.dtype])
        share = "" if row.fraction_of_limit is None else f"   {100 * row.fraction_of_limit:.0f} % of {row.limit}"
        axes.annotate(
            f"{row.speedup:.2f}x{share}",
            (max(row.speedup, 1.0), i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1.0, color="#22252b", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r.operator}  {r.name}  {r.dtype}" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(r.speedup for r in rows) * 1.35)
    axes.margins(y=0.01)
    axes.set_title("fastvit: speed-up over eager PyTorch", loc="left", fontweight="bold")
    axes.set_title(machine, loc="right", fontsize=8.5, color="#6b707b")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a case")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), help="some of the benchmarks")
    parser.add_argument("--output", type=Path, help="a folder (default: benchmarks/results/<device>)")
    arguments = parser.parse_args()

    environment = fastvit.env()
    cpu = environment["cpu"]
    machine = f"{cpu['name']}, {cpu['isa'] or 'no extension'}, {cpu['torch_threads']} threads"
    print(
        f"{machine}\n{'operator':<16}{'case':<40}{'dtype':<6}{'eager ms':>10}{'fast ms':>10}{'speed-up':>9}  "
        f"{'share of its limit':<20}{'eager err':>9}{'fast err':>9}"
    )
    rows = []
    for case in cases(arguments.only):
        rows.append(measure(case, arguments.seconds))
        print(line(rows[-1]), flush=True)

    name = re.sub(r"[^a-z0-9]+", "-", f"{cpu['name']} {cpu['isa'] or 'plain'}".lower()).strip("-")
    folder: Path = arguments.output or RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    # What figures depend on, without the paths of one machine.
    record = {"environment": {key: environment[key] for key in ("versions", "cpu")}, "rows": [asdict(r) for r in rows]}
    (folder / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(rows, folder / "cpu.png", machine)
    print(f"written: {folder / 'cpu.json'}, {folder / 'cpu.png'}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
