"""Every operator and model against eager PyTorch on this CPU.

    python -m benchmarks.cpu [--seconds 1] [--only attention ...] [--peers compile openvino onnxruntime]

prints a table and writes cpu.json, cpu.png and cpu-roofline.png to benchmarks/results/<device>/.
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
from benchmarks.peers import PEERS, missing
from benchmarks.plots import bars, roofline

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


def cases(only: list[str] | None, peers: list[str]) -> Iterator[Case]:
    for operator, module in BENCHMARKS.items():
        if only and operator not in only:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for name in module.NAMES:
                for batch in BATCHES:
                    more = {"peers": peers} if module is bench_model else {}
                    yield module.case(name, dtype, batch, **more)


def line(row: Row) -> str:
    share = "-" if row.fraction_of_limit is None else f"{100 * row.fraction_of_limit:.0f} % of {row.limit}"
    return (
        f"{row.operator:<16}{row.name:<40}{row.dtype:<6}{row.eager_milliseconds:>10.3f}{row.fastvit_milliseconds:>10.3f}"
        f"{row.speedup:>8.2f}x  {share:<20}{row.eager_error:>9.1e}{row.fastvit_error:>9.1e}"
        f"{''.join(f'  {who} {ms / row.fastvit_milliseconds:.2f}x' for who, ms in row.peer_milliseconds.items())}"
        f"{'' if row.passed else '  WRONG'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of a case")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), help="some of the benchmarks")
    parser.add_argument("--output", type=Path, help="a folder (default: benchmarks/results/<device>)")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=[], help="measure models with these too")
    arguments = parser.parse_args()

    environment = fastvit.env()
    cpu = environment["cpu"]
    machine = f"{cpu['name']}, {cpu['isa'] or 'no extension'}, {cpu['torch_threads']} threads"
    print(
        f"{machine}\n{'operator':<16}{'case':<40}{'dtype':<6}{'eager ms':>10}{'fast ms':>10}{'speed-up':>9}  "
        f"{'share of its limit':<20}{'eager err':>9}{'fast err':>9}"
    )
    absent = {peer: reason for peer in arguments.peers if (reason := missing(peer))}
    for peer, reason in absent.items():
        print(f"left out: {peer}: {reason}")
    rows = []
    for case in cases(arguments.only, [peer for peer in arguments.peers if peer not in absent]):
        rows.append(measure(case, arguments.seconds))
        print(line(rows[-1]), flush=True)

    name = re.sub(r"[^a-z0-9]+", "-", f"{cpu['name']} {cpu['isa'] or 'plain'}".lower()).strip("-")
    folder: Path = arguments.output or RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    # What figures depend on, without the paths of one machine.
    record = {"environment": {key: environment[key] for key in ("versions", "cpu")}, "rows": [asdict(r) for r in rows]}
    (folder / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    bars(rows, folder / "cpu.png", machine)
    roofline(rows, folder / "cpu-roofline.png", machine)
    print(f"written: {', '.join(str(folder / name) for name in ('cpu.json', 'cpu.png', 'cpu-roofline.png'))}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
