"""Prints the README's table of measured models from the committed record: `python docs/results.py`."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent.parent / "benchmarks/results/amd-epyc-family-26-model-2-avx512-bf16/cpu.json"


# In the order of the columns; a peer without this precision has a dash.
PEERS = {"compile": "torch.compile", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def table() -> str:
    heads = ["model", "batch", "dtype", "eager img/s", *PEERS.values(), "fastvit", "over eager", "of the peak"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in json.loads(RECORD.read_text())["rows"]:
        if row["operator"] == "model":
            name, batch = row["name"].split(", batch ")
            times = [
                row["eager_milliseconds"],
                *(row["peer_milliseconds"].get(peer) for peer in PEERS),
                row["fastvit_milliseconds"],
            ]
            rates = ["-" if ms is None else f"{int(batch) * 1e3 / ms:.1f}" for ms in times]
            cells = [f"`{name}`", batch, row["dtype"], *rates, f"{row['speedup']:.2f}x"]
            share = row["flops"] / row["peak"] / row["fastvit_milliseconds"] * 1e3
            lines.append(f"| {' | '.join(cells)} | {share:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
