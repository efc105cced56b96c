"""The plot of `fastvit bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvit._compat import import_library
from fastvit.bench.run import BenchRow

_EAGER, _FASTVIT, _LIMIT, _INK = "#b8bcc6", "#e4572e", "#2e4057", "#22252b"


def save(rows: Sequence[BenchRow], path: Path, machine: str) -> None:
    """Bars of images per second, eager beside fastvit, with the machine's limit as a tick above them."""
    import_library("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 + 1.7 * max(len(rows), 2), 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.36
    for i, row in enumerate(rows):
        eager, fast = row.eager_images_per_second, row.fastvit_images_per_second
        axes.bar(i - width / 2, eager, width * 0.94, color=_EAGER, label="eager PyTorch" if i == 0 else None)
        axes.bar(i + width / 2, fast, width * 0.94, color=_FASTVIT, label="fastvit" if i == 0 else None)
        axes.annotate(
            f"{eager:.1f}", (i - width / 2, eager), (0, 3), textcoords="offset points", ha="center", color=_INK
        )
        axes.annotate(
            f"{fast:.1f}\n{row.speedup:.2f}x",
            (i + width / 2, fast),
            (0, -5),
            textcoords="offset points",
            ha="center",
            va="top",
            color="white",
            fontweight="bold",
        )
        if row.limit_images_per_second:
            axes.hlines(
                row.limit_images_per_second,
                i - width,
                i + width,
                colors=_LIMIT,
                linestyles=(0, (4, 2)),
                linewidth=1.4,
                label="this machine's measured peak" if i == 0 else "",
            )
    top = max(
        max(r.limit_images_per_second or 0.0, r.fastvit_images_per_second, r.eager_images_per_second) for r in rows
    )
    axes.set_ylim(0, top * 1.14)
    axes.set_xlim(-0.6, max(len(rows) - 0.4, 1.4))
    axes.set_xticks(range(len(rows)), [f"{r.dtype}\nbatch {r.batch}" for r in rows], color=_INK)
    axes.set_ylabel("images per second", color=_INK)
    axes.set_title(rows[0].model, loc="left", fontweight="bold", color=_INK)
    axes.set_title(machine, loc="right", fontsize=8.5, color="#6b707b")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", length=0, labelcolor=_INK)
    axes.grid(axis="y", color="#e7e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)
    figure.savefig(path)
