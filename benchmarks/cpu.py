"""Every operator and model against eager PyTorch on this CPU.

    python -m benchmarks.cpu [--seconds 1] [--quick] [--only attention ...] [--peers compile openvino onnxruntime]

prints a table, and what of the project's goals is reached, and writes cpu.json, cpu.png and cpu-roofline.png to
benchmarks/results/<device>/.  With --only, the other benchmarks' rows stay, if versions and CPU are those of cpu.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

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
from benchmarks.case import BATCHES, FLOATS, Case, Row, measure, short
from benchmarks.peers import PEERS, missing
from benchmarks.plots import bars, roofline
from benchmarks.summary import summary
from fastvit.bench import peak

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


@dataclass(frozen=True)
class Step:
    """What will be measured, before anything of it is built."""

    operator: str
    name: Any
    dtype: torch.dtype
    batch: int

    def __str__(self) -> str:
        return f"{self.operator} {self.name} {short(self.dtype)} batch {self.batch}"

    def case(self, peers: list[str]) -> Case:
        more = {"peers": peers} if self.operator == "model" else {}
        return BENCHMARKS[self.operator].case(self.name, self.dtype, self.batch, **more)

    def measure(self, case: Case, seconds: float) -> Row:
        row = measure(case, seconds)
        if self.operator != "attention":
            return row
        return replace(
            row,
            extra_bytes=bench_attention.extra_bytes(self.name, self.dtype, self.batch),
            scores_bytes=bench_attention.scores_bytes(self.name),
        )


def steps(only: list[str] | None, quick: bool) -> Iterator[Step]:
    """In the order of the record.

    Of a module, DTYPES are its precisions, INT8_NAMES the cases that int8 serves, LONG those that --quick leaves out.
    """
    for operator, module in BENCHMARKS.items():
        if only and operator not in only:
            continue
        for dtype in getattr(module, "DTYPES", FLOATS):
            if dtype not in FLOATS and peak.flops(dtype) is None:
                continue
            names = module.NAMES if dtype in FLOATS else getattr(module, "INT8_NAMES", module.NAMES)
            for name in names:
                for batch in BATCHES:
                    if not quick or (name, batch) not in getattr(module, "LONG", ()):
                        yield Step(operator, name, dtype, batch)


HEAD = (
    f"{'operator':<16}{'case':<42}{'dtype':<6}{'eager ms':>10}{'fast ms':>10}{'speed-up':>9}{'limit ms':>10}  "
    f"{'share of the limit':<20}{'eager err':>9}{'fast err':>9}"
)


def line(row: Row) -> str:
    """fast ms by limit ms is the share: what is left to gain, and what binds."""
    share = "-" if row.fraction_of_limit is None else f"{100 * row.fraction_of_limit:.0f} % of {row.limit}"
    least = "-" if row.limit_milliseconds is None else f"{row.limit_milliseconds:.3f}"
    return (
        f"{row.operator:<16}{row.name:<42}{row.dtype:<6}{row.eager_milliseconds:>10.3f}{row.fastvit_milliseconds:>10.3f}"
        f"{row.speedup:>8.2f}x{least:>10}  {share:<20}{row.eager_error:>9.1e}{row.fastvit_error:>9.1e}"
        f"{''.join(f'  {who} {ratio:.2f}x' for who, ratio in row.peer_speedups.items())}"
        f"{'' if row.passed else '  WRONG'}"
    )


def progress(text: str) -> None:
    """A line that the next one overwrites, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def save(rows: list[Row], about: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def kept(only: list[str] | None, about: dict[str, Any], path: Path) -> list[Row]:
    """The rows of an earlier run that this one leaves as they are."""
    if only is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if earlier["environment"] != json.loads(json.dumps(about)):
        return []
    return [Row(**row) for row in earlier["rows"] if row["operator"] not in only]


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: list(BENCHMARKS).index(row.operator))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="measuring time of a case; long ones take their few rounds"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the cases that take minutes")
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), help="some of the benchmarks")
    parser.add_argument("--output", type=Path, help="a folder (default: benchmarks/results/<device>)")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=[], help="measure models with these too")
    arguments = parser.parse_args()

    environment = fastvit.env()
    cpu = environment["cpu"]
    machine = f"{cpu['name']}, {cpu['isa'] or 'no extension'}, {cpu['torch_threads']} threads"
    print(f"{machine}\n{HEAD}")
    absent = {peer: reason for peer in arguments.peers if (reason := missing(peer))}
    for peer, reason in absent.items():
        print(f"left out: {peer}: {reason}")
    peers = [peer for peer in arguments.peers if peer not in absent]
    name = re.sub(r"[^a-z0-9]+", "-", f"{cpu['name']} {cpu['isa'] or 'plain'}".lower()).strip("-")
    folder: Path = arguments.output or RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    # What figures depend on, without the paths of one machine.
    about = {key: environment[key] for key in ("versions", "cpu")}
    rows = kept(arguments.only, about, folder / "cpu.json")
    plan = list(steps(arguments.only, arguments.quick))
    for i, step in enumerate(plan):
        progress(f"[{i + 1}/{len(plan)}] {step}: building")
        case = step.case(peers)
        seconds = case.estimate(arguments.seconds, peak.flops(step.dtype))
        progress(f"[{i + 1}/{len(plan)}] {step}: about {seconds:.0f} s")
        rows.append(step.measure(case, arguments.seconds))
        progress("")
        print(line(rows[-1]), flush=True)
        # After every case: a run may be cut short.
        save(in_order(rows), about, folder / "cpu.json")

    rows = in_order(rows)
    bars(rows, folder / "cpu.png", machine)
    roofline(rows, folder / "cpu-roofline.png", machine)
    print(f"written: {', '.join(str(folder / name) for name in ('cpu.json', 'cpu.png', 'cpu-roofline.png'))}\n")
    print(summary(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
