"""Pictures of measured rows."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.case import Row
from fastvit._compat import import_library

# Precisions in the order in which they are shown.
_COLORS = {"f32": "#e4572e", "bf16": "#2e4057", "f16": "#2e4057", "int8": "#3a7d44"}
_INK, _GREY = "#22252b", "#6b707b"
# Told apart by shape and by color.
_OPERATORS = {
    "patch_embed": ("o", "#1f77b4"),
    "norm_linear": ("s", "#e08214"),
    "attention": ("^", "#1b9e3e"),
    "linear_residual": ("D", "#c51b3c"),
    "self_attention": ("v", "#7b4fb5"),
    "mlp": ("P", "#7f4f24"),
    "pool": ("X", "#d44fae"),
    "model": ("*", "#22252b"),
}
# Shares of the peak that the enlarged part shows.
_CORNER = 0.4


def _figure(width: float, height: float) -> Any:
    import_library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _precisions(rows: list[Row]) -> list[str]:
    return [dtype for dtype in _COLORS if any(row.dtype == dtype for row in rows)]


def bars(rows: list[Row], path: Path, machine: str) -> None:
    """Speed-ups as horizontal bars, a column for each precision, with the fraction of the limit beside each."""
    dtypes = _precisions(rows)
    cases = list(dict.fromkeys((row.operator, row.name) for row in rows))
    figure = _figure(3.4 + 3.6 * len(dtypes), 1.2 + 0.24 * len(cases))
    all_axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(all_axes, dtypes, strict=True):
        chosen = [row for row in rows if row.dtype == dtype]
        for row in chosen:
            at = cases.index((row.operator, row.name))
            axes.barh(at, row.speedup, 0.72, color=_COLORS[dtype])
            share = "" if row.fraction_of_limit is None else f"   {100 * row.fraction_of_limit:.0f} % of {row.limit}"
            axes.annotate(
                f"{row.speedup:.2f}x{share}",
                (max(row.speedup, 1.0), at),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(1.0, color=_INK, linewidth=0.8)
        axes.set_xlim(0, max(row.speedup for row in chosen) * 1.25 + 1.2)
        axes.set_xlabel(f"{dtype}: times as fast as eager PyTorch", fontsize=8.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
    all_axes[0].set_yticks(range(len(cases)), [f"{operator}   {name}" for operator, name in cases], fontsize=8)
    all_axes[0].invert_yaxis()
    figure.suptitle(f"fastvit on {machine}", fontsize=10, color=_GREY, x=0.99, ha="right")
    figure.savefig(path)


def roofline(rows: list[Row], path: Path, machine: str) -> None:
    """Each case by its arithmetic intensity and the share of the peak that it reaches, under the machine's roof.

    Above the whole roof, below it the crowded corner on a linear scale.  The share is of the peak measured beside that
    case, so that a machine whose speed drifts has one roof all the same.
    """
    known = [row for row in rows if row.peak and row.bandwidth]
    dtypes = _precisions(known)
    figure = _figure(1.2 + 5.4 * max(len(dtypes), 1), 9.6)
    if not dtypes:
        figure.text(0.5, 0.5, "no peak was measured", ha="center", color=_GREY)
        figure.savefig(path)
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    whole, corner = figure.subplots(2, len(dtypes), sharey="row", squeeze=False)
    floor = min(0.5, *(_reached(row) for row in known)) * 0.7
    for upper, lower, dtype in zip(whole, corner, dtypes, strict=True):
        chosen = [row for row in known if row.dtype == dtype]
        near = [row for row in chosen if _reached(row) >= _CORNER]
        peak, bandwidth = (median(values) for values in zip(*((r.peak, r.bandwidth) for r in chosen), strict=True))
        upper.set_title(f"{dtype}: {peak / 1e9:.0f} G/s, {bandwidth / 1e9:.0f} GB/s", loc="left", fontweight="bold")
        _roof(upper, chosen, floor)
        upper.set(yscale="log", ylim=(floor, 1.6))
        lower.set(ylim=(_CORNER, 1.04), xlabel="operations per byte of inputs, weights and output")
        lower.axhline(1.0, color=_INK, linewidth=1.2)
        lower.set_visible(bool(near))
        for axes, points, steps in ((upper, chosen, (1,)), (lower, near, (1, 2, 5))):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
            for row in points:
                _point(axes, row)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(which="both", color="#e6e8ec", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in (whole[0], corner[0]):
        axes.set_ylabel("share of the arithmetic peak")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    whole[0].yaxis.set_minor_formatter(lambda value, _: f"{value:.0%}" if round(value, 3) in (0.2, 0.5) else "")
    figure.suptitle(machine, fontsize=10, color=_GREY, x=0.99, ha="right")
    _legend(figure, [operator for operator in _OPERATORS if any(row.operator == operator for row in known)])
    figure.savefig(path)


def _reached(row: Row) -> float:
    """Share of the arithmetic peak."""
    return 1e3 * row.flops / row.fastvit_milliseconds / (row.peak or 1.0)


def _point(axes: Any, row: Row) -> None:
    marker, color = _OPERATORS[row.operator]
    axes.scatter(
        row.flops / row.bytes,
        _reached(row),
        marker=marker,
        s=62 if marker == "*" else 40,
        facecolors="none" if row.batch == 1 else color,
        edgecolors=color,
        linewidths=1.1,
        alpha=0.9,
        zorder=3,
    )


def _roof(axes: Any, rows: list[Row], floor: float) -> None:
    """The lower of what the bus and the arithmetic units allow, from the cheapest case to the dearest."""
    ridge = median((row.peak or 0.0) / (row.bandwidth or 1.0) for row in rows)
    low = max(min(row.flops / row.bytes for row in rows) / 2, floor * ridge)
    high = max(row.flops / row.bytes for row in rows) * 2
    edges = sorted({low, min(max(ridge, low), high), high})
    axes.plot(edges, [min(1.0, x / ridge) for x in edges], color=_INK, linewidth=1.2)
    label = {"textcoords": "offset points", "fontsize": 8, "color": _GREY, "ha": "right"}
    axes.annotate("arithmetic peak", (high, 1.0), (-2, 4), **label)
    if low < ridge / 4:
        middle = (low * ridge) ** 0.5
        axes.annotate("memory\nbandwidth", (middle, middle / ridge), (-8, 4), va="center", **label)


def _legend(figure: Any, operators: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker=_OPERATORS[o][0], color=_OPERATORS[o][1], linestyle="none", label=o) for o in operators
    ]
    for label, face in (("batch 1", "none"), ("larger", _GREY)):
        handles.append(Line2D([], [], marker="o", color=_GREY, markerfacecolor=face, linestyle="none", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
