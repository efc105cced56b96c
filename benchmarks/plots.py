"""Pictures of measured rows."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Row
from fastvit._compat import import_library

_COLORS = {"f32": "#e4572e", "bf16": "#2e4057"}
_INK, _GREY = "#22252b", "#6b707b"
_MARKERS = {
    "patch_embed": "o",
    "norm_linear": "s",
    "attention": "^",
    "linear_residual": "D",
    "self_attention": "v",
    "mlp": "P",
    "pool": "X",
    "model": "*",
}


def _figure(width: float, height: float) -> Any:
    import_library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bars(rows: list[Row], path: Path, machine: str) -> None:
    """Speed-ups as horizontal bars, with the fraction of the limit beside each."""
    figure = _figure(9, 0.9 + 0.27 * len(rows))
    axes = figure.subplots()
    for i, row in enumerate(rows):
        axes.barh(i, row.speedup, 0.72, color=_COLORS[row.dtype])
        share = "" if row.fraction_of_limit is None else f"   {100 * row.fraction_of_limit:.0f} % of {row.limit}"
        axes.annotate(
            f"{row.speedup:.2f}x{share}",
            (max(row.speedup, 1.0), i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1.0, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r.operator}  {r.name}  {r.dtype}" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(r.speedup for r in rows) * 1.35)
    axes.margins(y=0.01)
    axes.set_title("fastvit: speed-up over eager PyTorch", loc="left", fontweight="bold")
    axes.set_title(machine, loc="right", fontsize=8.5, color=_GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path)


def roofline(rows: list[Row], path: Path, machine: str) -> None:
    """Each case by its arithmetic intensity and the share of the peak that it reaches, under the machine's roof.

    The share is of the peak measured beside that case, so that a machine whose speed drifts has one roof all the same.
    """
    figure = _figure(11, 5.2)
    dtypes = [d for d in _COLORS if any(r.dtype == d and r.peak and r.bandwidth for r in rows)]
    all_axes = figure.subplots(1, max(len(dtypes), 1), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(all_axes, dtypes, strict=False):
        chosen = [r for r in rows if r.dtype == dtype and r.peak and r.bandwidth]
        ridge = median(r.peak / r.bandwidth for r in chosen)
        low, high = min(r.flops / r.bytes for r in chosen) / 2, max(r.flops / r.bytes for r in chosen) * 2
        edges = sorted({low, min(max(ridge, low), high), high})
        axes.plot(edges, [min(1.0, x / ridge) for x in edges], color=_INK, linewidth=1.2)
        axes.annotate(
            "arithmetic", (high, 1.0), (-4, 4), textcoords="offset points", ha="right", fontsize=8, color=_GREY
        )
        for operator, marker in _MARKERS.items():
            points = [
                (r.flops / r.bytes, 1e3 * r.flops / r.fastvit_milliseconds / r.peak)
                for r in chosen
                if r.operator == operator
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, s=46, label=operator, alpha=0.85, linewidths=0)
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte of inputs, weights and output")
        axes.set_title(dtype, loc="left", fontweight="bold")
        axes.grid(which="both", color="#e6e8ec", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("share of the machine's arithmetic peak")
    all_axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    all_axes[0].legend(frameon=False, fontsize=8)
    all_axes[-1].set_title(machine, loc="right", fontsize=8.5, color=_GREY)
    figure.savefig(path)
