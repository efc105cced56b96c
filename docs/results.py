"""Prints the README's table of measured models from the committed record: `python docs/results.py`."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent.parent / "benchmarks/results/amd-epyc-avx512-bf16/cpu.json"


def table() -> str:
    lines = [
        "| model | batch | dtype | eager img/s | fastvit img/s | speed-up | of the peak, eager | fastvit | error, eager | fastvit |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(RECORD.read_text())["rows"]:
        if row["operator"] == "model":
            name, batch = row["name"].split(", batch ")
            eager, fast = (int(batch) * 1e3 / row[f"{who}_milliseconds"] for who in ("eager", "fastvit"))
            share = row["fraction_of_limit"]
            cells = [
                *(f"`{name}`", batch, row["dtype"], f"{eager:.1f}", f"{fast:.1f}", f"{row['speedup']:.2f}x"),
                *(f"{share * eager / fast:.0%}", f"{share:.0%}", f"{row['eager_error']:.1e}"),
                f"{row['fastvit_error']:.1e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
